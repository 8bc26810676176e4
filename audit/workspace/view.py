"""What a table holds at one moment: a manifest, and the loose files that it has not taken in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from audit.schemas import TABLES
from audit.workspace.manifest import Manifest, Removal
from audit.workspace.names import DATA, GONE, ROWS, WHERE, LooseName, read_name

# Columns of merged files besides the table's: the key that the row was written under, and its stamp.
KEY_COLUMN, STAMP_COLUMN = "_key", "_stamp"
# A page whose bits have changed is an error, not another value.
PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)
OWN = (pa.field(KEY_COLUMN, pa.string()), pa.field(STAMP_COLUMN, pa.int64()))


def merged_schema(table: str) -> pa.Schema:
    """The schema of a table's merged files."""
    return pa.schema([*TABLES[table], *OWN])


def kept_by(removal: Removal, schema: pa.Schema) -> pc.Expression:
    """Which rows ``removal`` leaves, but for their stamps."""
    kept = pc.scalar(False)
    for name, value in removal.conditions:
        column = ds.field(name)
        kept |= (column != pa.scalar(value, schema.field(name).type)) | column.is_null()
    return kept


@dataclass(frozen=True)
class Part:
    """Files that are read in the same way: ``kept`` says which of their rows count, None for all."""

    paths: tuple[str, ...]
    schema: pa.Schema
    system: fs.FileSystem
    kept: pc.Expression | None = None

    def dataset(self) -> ds.Dataset:
        """The rows that count; columns that a file does not have are null."""
        found = ds.FileSystemDataset.from_paths(
            list(self.paths), schema=self.schema, format=PARQUET, filesystem=self.system
        )
        return found if self.kept is None else found.filter(self.kept)


@dataclass(frozen=True)
class View:
    """A table at one moment. ``latest`` is the highest number of a manifest, also of one that cannot be read.

    ``fresh`` are the loose files that no merge has taken in, ``removals`` the content of the removals among them, and
    ``damaged`` the names of files that cannot be read and are passed over.
    """

    table: str
    manifest: Manifest
    latest: int
    fresh: tuple[LooseName, ...]
    removals: Mapping[str, Removal] = field(default_factory=dict)
    damaged: Collection[str] = ()

    @cached_property
    def _best(self) -> dict[str, tuple[int, str]]:
        """The order of the newest file of every fresh file's key, be it fresh or taken in."""
        best: dict[str, tuple[int, str]] = {}
        for one in self.fresh:
            if one.kind != WHERE:
                best[one.key] = max(one.order, best.get(one.key, one.order))
        for name in self.manifest.absorbed if best else ():
            if name.partition("~")[0] in best and (known := read_name(name)) and known.kind != WHERE:
                best[known.key] = max(known.order, best[known.key])
        return best

    @cached_property
    def holding(self) -> tuple[LooseName, ...]:
        """The fresh files that hold for their keys: data, and signs that a key is gone."""
        return tuple(one for one in self.fresh if one.kind != WHERE and self._best[one.key] == one.order)

    @property
    def loose(self) -> tuple[LooseName, ...]:
        """The loose data files that count."""
        return tuple(one for one in self.holding if one.kind == DATA)

    @property
    def merged(self) -> tuple[str, ...]:
        """The merged files that count and can be read."""
        return tuple(file.name for file in self.manifest.merged if file.name not in self.damaged)

    @cached_property
    def covered(self) -> tuple[str, ...]:
        """The keys whose rows in merged files do not count any more."""
        return tuple(one.key for one in self.holding if one.kind == GONE or not one.key.startswith(ROWS))

    @property
    def for_merged(self) -> tuple[Removal, ...]:
        """The removals that merged files do not know yet."""
        return tuple(self.removals.values())

    @property
    def for_loose(self) -> tuple[Removal, ...]:
        """All removals that are remembered: a loose file may have appeared behind the merge that took one in."""
        return (*self.removals.values(), *(one for batch in self.manifest.taken for one in batch.removals))

    @property
    def top(self) -> int:
        """The highest stamp in sight."""
        return max([self.manifest.top, *(one.stamp for one in self.fresh)])

    @cached_property
    def kept_of_merged(self) -> pc.Expression | None:
        """Which rows of merged files count, None for all."""
        schema, kept = merged_schema(self.table), None
        conditions = [(ds.field(STAMP_COLUMN) >= one.stamp) | kept_by(one, schema) for one in self.for_merged]
        if self.covered:
            conditions.append(~ds.field(KEY_COLUMN).isin(pa.array(self.covered, pa.string())))
        for condition in conditions:
            kept = condition if kept is None else kept & condition
        return kept

    def kept_of_loose(self, one: LooseName) -> pc.Expression | None:
        """Which rows of a loose data file count, None for all."""
        kept = None
        for removal in self.for_loose:
            if one.stamp < removal.stamp:
                condition = kept_by(removal, TABLES[self.table])
                kept = condition if kept is None else kept & condition
        return kept

    def parts(self, folder: str, system: fs.FileSystem) -> list[Part]:
        """The files that count, grouped by how they are read; ``folder`` is the table's path in ``system``."""
        found = []
        if self.merged:
            paths = tuple(f"{folder}/merged/{name}" for name in self.merged)
            found.append(Part(paths, merged_schema(self.table), system, self.kept_of_merged))
        groups: dict[tuple[Removal, ...], list[LooseName]] = {}
        for one in self.loose:
            groups.setdefault(tuple(r for r in self.for_loose if one.stamp < r.stamp), []).append(one)
        for group in groups.values():
            paths = tuple(f"{folder}/loose/{one.name}" for one in group)
            found.append(Part(paths, TABLES[self.table], system, self.kept_of_loose(group[0])))
        return found


def fresh_names(names: Sequence[str], manifest: Manifest, damaged: Collection[str]) -> tuple[LooseName, ...]:
    """Those of ``names`` that are loose files, not taken in, and not damaged."""
    absorbed = manifest.absorbed
    found = (read_name(name) for name in names if name not in absorbed and name not in damaged)
    return tuple(one for one in found if one is not None)
