"""Base models from the Hugging Face Hub: its client finds and stores the files, by a connection of our own.

Left to itself the client takes a login of this account, goes by the proxies of the environment, waits for ever, and
follows a Link to any host with the token. Here the token is HF_TOKEN's, it goes to the hub's own host alone, and no
proxy is used.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from audit.errors import CheckpointError

if TYPE_CHECKING:
    import httpx2

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
TIMEOUT = 60.0  # s without a byte
CONNECT_TIMEOUT = 10.0  # s
MOST_REDIRECTS = 5
GATED = (
    "ask for access on its page, and give that account's token in HF_TOKEN. Workers of a cluster have no token: for "
    "them name a folder that all machines see"
)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is owner/name, of a length and of characters that the hub has."""
    if _HUB_ID.fullmatch(name) is None:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_commit(revision: str) -> bool:
    """Whether ``revision`` is a commit and no branch."""
    return _COMMIT.fullmatch(revision) is not None


def download_snapshot(source: str, patterns: list[str]) -> Path:
    """The local snapshot of ``owner/name@commit``, downloading the files that match ``patterns`` where needed."""
    name, _, revision = source.partition("@")
    if not is_commit(revision):
        raise CheckpointError(
            f"{source}: name the commit, as owner/name@<40 hex digits>; a branch can change under an audit "
            "(the commit is on the model page under 'Files and versions')"
        )
    return snapshot(name, revision, patterns)


def snapshot(name: str, revision: str, patterns: list[str]) -> Path:
    """The folder with the files of ``name`` at the commit ``revision`` that match ``patterns``, fetched where needed.

    Raises CheckpointError.
    """
    import httpx2
    from huggingface_hub import constants, set_client_factory, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    set_client_factory(client)
    constants.HF_HUB_DISABLE_XET = True  # a client in Rust with rules of its own
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, token=token() or False))
    except GatedRepoError as error:
        raise CheckpointError(f"{name}@{revision} is gated: {GATED}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}@{revision} cannot be downloaded: {type(error).__name__}: {_without_queries(str(error))[:300]}"
        ) from error


def token() -> str | None:
    """The token of the environment; a login that the hub's client has stored is not used. Raises CheckpointError."""
    text = os.environ.get("HF_TOKEN", "").strip()
    if text and not re.fullmatch(r"[\x21-\x7e]{1,1000}", text):
        raise CheckpointError("HF_TOKEN does not hold a token: one line of printable characters without spaces")
    return text or None


def client() -> httpx2.Client:
    """A client of httpx2 that goes by no proxy and netrc, bounds waits and redirects, and keeps tokens to the hub."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    class OwnHost(httpx2.HTTPTransport):
        """Sees every request as it goes out, those after a redirect or a Link included."""

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            if constants.HF_HUB_OFFLINE:
                raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set: nothing is asked of the hub")
            check(str(request.url), request.headers, constants.ENDPOINT)
            return super().handle_request(request)

    return httpx2.Client(
        transport=OwnHost(trust_env=False),
        trust_env=False,
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        timeout=httpx2.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
    )


def check(url: str, headers: Any, endpoint: str) -> None:
    """Take tokens out of ``headers`` unless ``url`` is of ``endpoint``'s own host and scheme.

    Raises ValueError where ``url`` is neither https nor of this machine.
    """
    asked, own = urlsplit(url), urlsplit(endpoint)
    if asked.scheme != "https" and not _is_loopback(asked.hostname):
        raise ValueError(f"refused {asked.scheme}://{asked.hostname}: only https is used, except to this machine")
    if (asked.scheme, asked.hostname, asked.port) != (own.scheme, own.hostname, own.port):
        for name in ("Authorization", "Cookie"):
            headers.pop(name, None)


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _without_queries(text: str) -> str:
    """``text`` without what stands behind "?" in its URLs: those of a CDN are signed."""
    return re.sub(r"[^\s'\"]+", lambda one: one[0].partition("?")[0] if "://" in one[0] else one[0], text)
