"""JSON documents of strangers, parsed in a child process."""

from __future__ import annotations

from typing import Any

from audit.untrusted.pool import RefusedError, pool


def parse_json(raw: bytes | str) -> Any:
    """The plain value of a JSON document of a stranger. Raises ValueError where it is none, or is refused."""
    text = isinstance(raw, str)
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    try:
        return pool().ask("document", {"text": text}, data).answer
    except RefusedError as error:
        raise ValueError(str(error)) from error


def problem_of_configuration(raw: bytes) -> str | None:
    """What a configuration asks for that no real one does, None where there is nothing. Raises ValueError."""
    try:
        answer = pool().ask("configuration", {}, raw).answer
    except RefusedError as error:
        raise ValueError(str(error)) from error
    return None if answer is None else str(answer)[:500]
