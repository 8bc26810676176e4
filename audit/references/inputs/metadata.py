"""What an input says of a picture, kept as it is and given back with a match: an object of JSON, bounded."""

from __future__ import annotations

import json
import math
from typing import Any

from audit.locations import shown_urls
from audit.storable import storable_values

MOST_CHARACTERS = 4096
MOST_DEPTH = 8


def metadata_text(value: Any) -> str | None:
    """The text that is kept of an object of plain values, None for an empty one. Raises ValueError for what is none.

    Of its URLs users, passwords and queries are not kept: a query may sign one.
    """
    if not isinstance(value, dict):
        raise ValueError("its metadata is no object of JSON")
    if not value:
        return None
    _check(value, 0)
    text = json.dumps(storable_values(shown_urls(value)), ensure_ascii=False, sort_keys=True, default=str)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"its metadata has more than {MOST_CHARACTERS} characters")
    return text


def metadata_of(text: str | bytes) -> str | None:
    """The same of the text of a document of one of ours, or of a user's. Raises ValueError."""
    if len(text) > 4 * MOST_CHARACTERS:
        raise ValueError(f"its metadata has more than {MOST_CHARACTERS} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its metadata is no object of JSON") from error
    return metadata_text(value)


def plain(text: str | None) -> Any:
    """The values of what is kept; None for nothing, and for what somebody has made no JSON."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check(value: Any, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"its metadata is nested more than {MOST_DEPTH} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("its metadata holds a number that is not finite")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check(one, depth + 1)
    if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        raise ValueError("its metadata has names that are no text")
