"""Text from outside that a table, a terminal and a log can hold, and names of files that are no text."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Any

_ESCAPE = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")
AS_BYTES = "//"  # how the escaped form of a path begins; no path has two slashes in a row


def _is_odd(character: str) -> bool:
    """Whether it is a control character or half of a surrogate pair, which UTF-8 has no bytes for."""
    return unicodedata.category(character) in ("Cc", "Cs")


def _escaped(character: str) -> str:
    """``\\xff`` for a byte that is no UTF-8 and for ASCII's control characters, ``\\u0085`` for others."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def storable(text: str) -> str:
    """``text`` with control characters other than tabs and ends of lines, and surrogates, written as escapes."""
    if text.isprintable():
        return text
    return "".join(_escaped(one) if one not in "\t\n\r" and _is_odd(one) else one for one in text)


def storable_values(value: Any) -> Any:
    """``value`` with every text in it, also within lists and objects, made storable."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list | tuple):
        return [storable_values(one) for one in value]
    if isinstance(value, dict):
        return {name: storable_values(one) for name, one in value.items()}
    return value


def path_as_text(path: str) -> str:
    """A path as it is; with bytes that are no UTF-8, or control characters, escaped so that it can be undone."""
    if path.isprintable() or not any(map(_is_odd, path)):
        return path
    return AS_BYTES + "".join("\\\\" if one == "\\" else _escaped(one) if _is_odd(one) else one for one in path)


def path_of_text(text: str) -> str:
    """The path that ``path_as_text`` made ``text`` of."""
    if not text.startswith(AS_BYTES):
        return text

    def plain(found: re.Match[str]) -> str:
        if found[1]:
            code = int(found[1], 16)
            return chr(code) if code < 0x80 else os.fsdecode(bytes([code]))
        return chr(int(found[2], 16)) if found[2] else "\\"

    return _ESCAPE.sub(plain, text.removeprefix(AS_BYTES))
