"""What was worked out of the rows of large reference sets, kept beside their indexes: digests that pages rest on.

Working one out reads the whole set. It counts for a stamp of what the table holds of the set, and is a cache: who has
to be sure of a digest, as ``lora-audit verify`` does, works it out again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from audit.errors import WorkspaceError
from audit.files import whole_file
from audit.references.index import store
from audit.references.index.store import key_of, set_key

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Known:
    """Digests of large sets, below ``scratch``; those of small ones are worked out each time."""

    def __init__(self, scratch: Path) -> None:
        self.folder = scratch / store.FOLDER

    def get(self, what: str, about: tuple[str, str], pictures: int, held: Sequence[Any]) -> str | None:
        """The SHA256 called ``what`` that is kept of a set and descriptor, ``about``, of so many ``pictures``.

        None where there is none for what the tables hold of it, ``held``, or what is there is none.
        """
        if pictures < store.LARGE:
            return None
        try:
            found = json.loads(self._path(what, about, held).read_text())["sha256"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return found if isinstance(found, str) and _DIGEST.fullmatch(found) else None

    def put(self, what: str, about: tuple[str, str], pictures: int, held: Sequence[Any], digest: str) -> None:
        """Keep a digest in place of that of another stamp. Where nothing can be written, nothing is kept."""
        if pictures < store.LARGE:
            return
        path = self._path(what, about, held)
        with suppress(OSError, WorkspaceError):
            for old in self.folder.glob(f"{path.name.rpartition('-')[0]}-*"):
                old.unlink(missing_ok=True)
            with whole_file(path) as file:
                file.write(json.dumps({"sha256": digest}).encode())

    def _path(self, what: str, about: tuple[str, str], held: Sequence[Any]) -> Path:
        name, descriptor_name = about
        return self.folder / f"{set_key(name)}-{key_of(descriptor_name)}-{what}-{key_of(str(list(held)))}"
