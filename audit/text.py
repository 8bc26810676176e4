"""Strangers' text on its way to a terminal or a page: the one place that makes it printable.

File names, titles, captions, metadata and answers of servers come from people nobody knows. ESC and OSC sequences in
them would move the cursor, change the window's title or write to the clipboard; overrides of the writing direction
would show another name than the one that is there.
"""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL and C1, lone surrogates, separators of lines, marks and overrides of the writing
# direction, and what is invisible by design. The joiners that scripts and emoji need (U+200C, U+200D) stay.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: object, lines: bool = True) -> str:
    """``text`` with every character that steers a terminal or hides shown as an escape: ``\\x1b``, ``\\u202e``.

    Tabs and newlines stay; without ``lines`` they are escaped, too, so that a name cannot pass for a line of ours.
    """
    shown = _UNSEEN.sub(_escaped, str(text))
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
