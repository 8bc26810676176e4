"""diffusers and transformers without their bars and warnings."""

from __future__ import annotations


def be_quiet() -> None:
    """Let the libraries draw no bars and give no warnings while they load."""
    from diffusers.utils import logging as diffusers_logging
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()
    diffusers_logging.set_verbosity_error()  # what it warns of (long captions, missing filters) is our own to report
