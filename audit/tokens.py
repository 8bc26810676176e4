"""Who holds the tokens of sources: crawls, and the fetching of base models. Nobody else, workers least of all.

The same holds for the password of a signing key, which the process that was started reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SIGNING_PASSWORD = "LORA_AUDIT_SIGNING_KEY_PASSWORD"
# As lora-audit and the libraries beneath it read them from the environment.
TOKENS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "CIVITAI_TOKEN",
    "CIVITAI_API_TOKEN",
    SIGNING_PASSWORD,
)


def emptied() -> dict[str, str]:
    """Variables that take the place of the tokens in the environment of a process that parses strangers' files."""
    return dict.fromkeys(TOKENS, "")


@contextmanager
def put_away() -> Iterator[None]:
    """Take the tokens out of this process's environment, so that what it starts meanwhile does not inherit them."""
    kept = {name: os.environ.pop(name) for name in TOKENS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
