"""Workspaces of version 2, whose tables were files side by side with lists of what merges had replaced.

A table is migrated at one moment, when its first manifest is created. Killed before, its new file is an orphan that a
vacuum removes; killed after, the old files are removed later. So it can be killed at any point and begun again, also by
two processes at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import Files
from audit.schemas import KEY_COLUMNS, TABLES
from audit.workspace.compaction import conform, write_merged
from audit.workspace.leases import alive_runs
from audit.workspace.manifest import Manifest
from audit.workspace.names import KEY
from audit.workspace.table import MISSING, Table, check_file
from audit.workspace.view import OWN

MERGED = "merged-"  # how the names of the merged files of version 2 began
log = logging.getLogger("audit.workspace")


def migrate(files: Files, tables: dict[str, Table]) -> None:
    """Rewrite the tables of a workspace of version 2. Raises WorkspaceError while a run of it is alive."""
    alive = alive_runs(files)
    if alive:
        raise WorkspaceError(
            f"{files} was written by an older lora-audit, and run {alive[0].run_id} on {alive[0].host} works on it: "
            "wait for it or stop it, then run the same command again"
        )
    if files.local is None:
        from audit.conditional import require_conditional_puts

        require_conditional_puts(files.create, files.remove, str(files))
    log.warning(
        "%s was written by an older lora-audit: its tables are rewritten in place, once. This can be stopped at any "
        "time; the same command goes on from there", files,
    )  # fmt: skip
    for table in tables.values():
        if not table.chain.newest():
            _migrate(table)
    for table in tables.values():
        manifest = table.view().manifest
        if table.chain.newest() == 1:  # once more, before the old files go: damage to one of them loses nothing
            table.chain.add(2, replace(manifest, number=2).to_bytes())
        for name in table.files.names(table.folder):
            if name in manifest.imported:
                files.remove(f"{table.folder}/{name}")


def _migrate(table: Table) -> None:
    old = sorted(name for name in table.files.names(table.folder) if name.endswith((".parquet", ".json")))
    keys = _counting(table, old)
    damaged: list[str] = []
    try:
        written = write_merged(table, _rows(table, keys, damaged), 1)
    except FileNotFoundError:
        if not table.chain.newest():
            raise WorkspaceError(
                f"a file of {table.files}/{table.folder} could not be read: run the same command again"
            ) from None
        return  # another process has migrated this table and removed the old files
    imported = tuple(name for name in old if name not in damaged)
    manifest = Manifest(1, time.time(), tuple(written), imported=imported)
    if not table.chain.add(1, manifest.to_bytes()):
        for file in written:
            table.files.remove(table.merged_key(file.name))


def _counting(table: Table, names: list[str]) -> list[str]:
    """The keys of the files that count by the rules of version 2."""
    found = {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}
    listings: dict[str, list[str]] = {}
    for name in names:
        stem = name.removesuffix(".json")
        if name != stem and stem in found:
            content = table.files.read(f"{table.folder}/{name}")
            try:
                listings[stem] = [key for key in json.loads(content or b"") if KEY.fullmatch(key)]
            except (ValueError, TypeError) as error:
                raise WorkspaceError(
                    f"{table.files}/{table.folder}/{name} is damaged, and without it rows would count twice: restore "
                    "it from a backup"
                ) from error
    replaced = {key for keys in listings.values() for key in keys}
    return sorted(key for key in found - replaced if key in listings or not key.startswith(MERGED))


def _rows(table: Table, keys: list[str], damaged: list[str]) -> Iterator[pa.Table]:
    """The rows of the files of ``keys``, with the columns of merged files; ``damaged`` collects those left out."""
    for key in keys:
        path = f"{table.folder}/{key}.parquet"
        try:
            with pq.ParquetFile(table.files.path(path), filesystem=table.files.system) as source:
                groups = [source.read_row_group(number) for number in range(source.num_row_groups)]
        except (OSError, pa.ArrowException) as error:
            problem = check_file(table.files, path, deep=True)
            if problem is None or problem == MISSING:
                raise FileNotFoundError(path) from error
            log.warning("%s/%s is damaged (%s): its rows are left out, and it stays", table.files, path, problem)
            damaged.append(f"{key}.parquet")
            continue
        for rows in groups:
            yield _own_columns(table, key, conform(rows, TABLES[table.name]))


def _own_columns(table: Table, key: str, rows: pa.Table) -> pa.Table:
    """``rows`` with the key that each was written under: the file's, or in a merged file that of its columns."""
    keys: pa.Array | pa.ChunkedArray = pa.repeat(pa.scalar(key, pa.string()), rows.num_rows)
    if key.startswith(MERGED):
        columns = KEY_COLUMNS.get(table.name)
        keys = (
            pc.binary_join_element_wise(*(rows[name] for name in columns), ".")
            if columns
            else pa.nulls(rows.num_rows, pa.string())
        )
    rows = rows.append_column(OWN[0], keys)
    return rows.append_column(OWN[1], pa.repeat(pa.scalar(0, pa.int64()), rows.num_rows))
