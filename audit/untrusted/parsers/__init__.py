"""What runs in the child: each parser takes an item and answers in plain values. Nothing heavy is imported here.

Pillow is imported by the first picture: most children only ever see headers and documents.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from audit.untrusted.child import Item, Parser
from audit.untrusted.parsers import documents, headers, tokenizers


def _when_asked(module: str, name: str) -> Parser:
    def parser(item: Item) -> Any:
        return import_module(f"audit.untrusted.parsers.{module}").PARSERS[name](item)

    return parser


PARSERS: dict[str, Parser] = {
    **documents.PARSERS, **headers.PARSERS, **tokenizers.PARSERS, "picture": _when_asked("pictures", "picture"),
    "members": _when_asked("archives", "members"), "member": _when_asked("archives", "member"),
    "parquet": _when_asked("tables", "parquet"), "parquet-vectors": _when_asked("tables", "parquet-vectors"),
    "parquet-pictures": _when_asked("tables", "parquet-pictures"), "video": _when_asked("videos", "video"),
}  # fmt: skip
