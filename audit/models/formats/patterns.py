"""Regular expressions from strangers: bounded before they are compiled, so that none can run for hours.

PEFT's configurations name modules by them. Python's engine goes back: nested repetition takes time exponential in the
name's length, and each further repetition in a row multiplies it once more. What is not read is refused in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LENGTH = 256
MAX_PATTERNS = 8192  # one a module is usual
MAX_WILD = 64  # that are more than a name
MAX_NAME = 300  # of a module
_PLAIN = re.compile(r"[\w.-]*")
_NESTED = re.compile(r"\)[*+{]")
_ESCAPED = re.compile(r"\\.|\[\^?\]?(?:\\.?|[^\]\\])*(?:\]|\Z)", re.DOTALL)


def checked(text: str, most_repeats: int) -> str:
    """``text`` as it is. Raises ValueError where it is no regular expression, or one that could run for long."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the pattern {text[:40]!r}... is longer than {MAX_LENGTH} characters")
    if not _PLAIN.fullmatch(text):
        if re.search(r"\\[1-9]", text):
            raise ValueError(f"the pattern {text[:80]!r} refers back, which is not read")
        bare = _ESCAPED.sub("x", text)
        if re.search(r"\(\?(?!:|P<)", bare):
            raise ValueError(f"the pattern {text[:80]!r} looks around, which is not read")
        if _NESTED.search(bare):
            raise ValueError(f"the pattern {text[:80]!r} repeats a group, which is not read")
        repeats = len(re.findall(r"[*+{]", bare))
        if repeats > most_repeats:
            raise ValueError(f"the pattern {text[:80]!r} repeats {repeats} times, at most {most_repeats} are read")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {text[:80]!r} is no regular expression: {error}") from error
    return text


class PatternKeys:
    """The keys of PEFT's ``rank_pattern`` and ``alpha_pattern``: ``get_pattern_key`` of PEFT, compiled once."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Raises ValueError for keys that are not read."""
        self.keys = list(keys)
        if len(self.keys) > MAX_PATTERNS or sum(not _PLAIN.fullmatch(key) for key in self.keys) > MAX_WILD:
            raise ValueError(f"{len(self.keys)} patterns are too many to be read")
        self._compiled = [re.compile(rf"(.*\.)?({checked(key, 2)})$") for key in self.keys]

    def find(self, module: str) -> str | None:
        """The first key that matches the end of a module's name, from a dot on; None without."""
        if len(module) > MAX_NAME:
            return None
        return next((key for key, one in zip(self.keys, self._compiled, strict=True) if one.match(module)), None)
