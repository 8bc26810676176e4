"""The manifest of a table: which merged files count, and which loose files they have taken in."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class MergedFile:
    """A file in ``merged/``: its name, rows and bytes."""

    name: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Removal:
    """Rows with ``value`` in ``column`` that were written before ``stamp`` are removed; of these only those that have
    each value of ``also``, (column, value), too.
    """

    column: str
    value: str | int
    stamp: int
    also: tuple[tuple[str, str | int], ...] = ()

    @property
    def conditions(self) -> tuple[tuple[str, str | int], ...]:
        """(column, value) of each that a row has to have."""
        return ((self.column, self.value), *self.also)


@dataclass(frozen=True)
class Taken:
    """Loose files that a merge has taken in, and the removals among them; ``at`` is when (Unix seconds)."""

    at: float
    names: tuple[str, ...]
    removals: tuple[Removal, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """``merged`` and all loose files but those of ``taken`` are the table. ``imported`` are files of version 2."""

    number: int = 0
    at: float = 0.0
    merged: tuple[MergedFile, ...] = ()
    taken: tuple[Taken, ...] = ()
    top: int = 0  # the highest stamp of what was ever taken in
    imported: tuple[str, ...] = ()

    @cached_property
    def absorbed(self) -> frozenset[str]:
        """The names of all loose files that were taken in and may still be there."""
        return frozenset(name for batch in self.taken for name in batch.names)

    @property
    def merged_names(self) -> frozenset[str]:
        """The names of the merged files that count."""
        return frozenset(file.name for file in self.merged)

    def to_bytes(self) -> bytes:
        """As JSON; two calls never give the same bytes."""
        document = {"format": FORMAT, **asdict(self), "token": secrets.token_hex(8)}
        for removal in (one for batch in document["taken"] for one in batch["removals"]):
            removal["also"] = [list(one) for one in removal["also"]]
            if not removal["also"]:  # as older versions know it
                del removal["also"]
        return json.dumps(document | {"sha256": _digest(document)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Read it back. Raises ValueError where it is damaged or of another format."""
        try:
            document = json.loads(content)
            stated = document.pop("sha256")
            if stated != _digest(document):
                raise ValueError("its content is not what its hash says")
            if document.pop("format") != FORMAT:
                raise ValueError("it has another format")
            document.pop("token")
            document["merged"] = tuple(MergedFile(**file) for file in document["merged"])
            document["taken"] = tuple(_taken(batch) for batch in document["taken"])
            document["imported"] = tuple(document["imported"])
            return cls(**document)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no manifest ({error})") from error


def _taken(batch: dict[str, Any]) -> Taken:
    removals = tuple(
        Removal(**removal | {"also": tuple((name, value) for name, value in removal.get("also", ()))})
        for removal in batch["removals"]
    )
    return Taken(batch["at"], tuple(batch["names"]), removals)


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
