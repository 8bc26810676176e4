"""Answers that are about us, not about what was asked for: a quota is used up, a region is shut out.

No item is to blame for them and none is recorded as failed: the crawl ends, remembers why, and goes on from there.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import requests

from audit.errors import PausedError

PAUSED = "paused"  # in a crawl's state
LONGEST = timedelta(days=7)
_WHAT = {
    429: "asks for fewer requests, still after all retries: a quota of this account or address is used up",
    451: "may not be asked from this region for legal reasons",
}


def check_pause(response: requests.Response, url: str) -> None:
    """Raise PausedError where the answer is one of these; ``url`` is how it is named."""
    status = response.status_code
    if status in _WHAT:
        raise PausedError(f"{url} {_WHAT[status]} (HTTP {status})", status=status, until=_again(response))


def _again(response: requests.Response) -> datetime | None:
    """When the source may be asked again, where it says so (Retry-After in seconds), within LONGEST."""
    said = response.headers.get("Retry-After", "")
    return datetime.now(UTC) + min(timedelta(seconds=int(said)), LONGEST) if re.fullmatch(r"\d{1,9}", said) else None


def noted(error: PausedError) -> dict[str, str | None]:
    """What a crawl's state keeps of a pause."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"why": str(error)[:500], "at": now, "until": error.until.isoformat() if error.until else None}
