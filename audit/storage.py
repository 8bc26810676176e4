"""The workspace: one folder with Parquet tables, the spool of unfinished audits, and reports.

Files are immutable and appear whole: they are written under a temporary name and renamed. The file name is the
key of what is in it (an audit, a reference set), so writing the same thing again replaces it with itself.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.schemas import TABLES

VERSION = 2
# Rows of the catalog are never changed: a newer row of the same item takes the place of an older one in these views.
# A checkpoints row is written after the captions of its item, with the same time, and so makes them count.
NEWEST = {
    "checkpoints": """SELECT * FROM checkpoints_rows
        QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY seen_at DESC) = 1""",
    "captions": "SELECT DISTINCT c.* FROM captions_rows AS c SEMI JOIN checkpoints USING (item_id, seen_at)",
}
LOOSE, MERGED = "rows-", "merged-"  # how the names of appended and of merged files begin
MOST_LOOSE, MOST_MERGED = 64, 16
ROWS_A_GROUP = 4096
KEEP_REPLACED = 300.0  # s
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _new_key(kind: str) -> str:
    return f"{kind}{time.time_ns():020d}-{secrets.token_hex(4)}"


def _sorted(tables: list[pa.Table]) -> pa.Table:
    """One table in the order of its first column, so that a reader who wants few of its values skips most groups."""
    whole = pa.concat_tables(tables).combine_chunks()
    return whole.sort_by(whole.column_names[0])


def _replaced_by(listing: Path) -> list[str]:
    """The keys in a merged file's list; none where another process has just removed it."""
    try:
        return [key for key in json.loads(listing.read_bytes()) if KEY.fullmatch(key)]
    except FileNotFoundError:
        return []


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at ``path`` only once it is complete and on disk.

    Raises WorkspaceError where the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise WorkspaceError(
                f"no disk space to write {path}: free some, then run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise WorkspaceError(f"{path} cannot be written ({error.strerror}): choose another --workspace") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class Workspace:
    """A folder of results. Opening creates it; raises WorkspaceError for one of a newer version."""

    def __init__(self, root: Path) -> None:
        self.root = root
        marker = root / "workspace.json"
        if not marker.is_file():
            # another process may be creating it at this moment: its unfinished marker is no content, and it may be done
            content = root.is_dir() and any(not path.name.endswith(".part") for path in root.iterdir())
            if content and not marker.is_file():
                raise WorkspaceError(f"{root} is not a workspace and not empty: choose another --workspace")
            with whole_file(marker) as file:
                file.write(json.dumps({"version": VERSION}).encode())
        try:
            found = int(json.loads(marker.read_bytes())["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(f"{marker} is damaged: restore it, or choose another --workspace") from error
        if found < VERSION:
            raise WorkspaceError(
                f"{root} was written by an older lora-audit (workspace version {found}, this one knows {VERSION}): "
                "choose another --workspace and run the audits again"
            )
        if found > VERSION:
            raise WorkspaceError(
                f"{root} was written by a newer lora-audit (workspace version {found}, this one knows {VERSION}): "
                "upgrade lora-audit, or choose another --workspace"
            )

    def _table_folder(self, table: str) -> Path:
        return self.root / "tables" / table

    def _table_file(self, table: str, key: str) -> Path:
        if table not in TABLES or not KEY.fullmatch(key):
            raise WorkspaceError(
                f"{key!r} cannot name a file of table {table!r}: use letters, digits, '.', '_' and '-'"
            )
        return self._table_folder(table) / f"{key}.parquet"

    def write(self, table: str, key: str, rows: list[dict[str, Any]] | pa.Table) -> None:
        """Write ``rows`` as the one file of ``key`` in ``table``; with no rows, only remove what was there."""
        path = self._table_file(table, key)
        data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=TABLES[table])
        if data.num_rows == 0:
            path.unlink(missing_ok=True)
            return
        with whole_file(path) as file:
            pq.write_table(data.cast(TABLES[table]), file, compression="zstd")

    def append(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Write ``rows`` as a new file of ``table`` beside the others; many small ones become one."""
        self.write(table, _new_key(LOOSE), rows)
        for kind, most in ((LOOSE, MOST_LOOSE), (MERGED, MOST_MERGED)):
            keys = [key for key in self.keys(table) if key.startswith(kind)]
            if len(keys) >= most:
                self._merge(table, keys)

    def _merge(self, table: str, keys: list[str]) -> None:
        """Make one file of those of ``keys``.

        A reader sees either the old files or the new one: the new one counts from the moment its list of the files that
        it replaces is there. Those are removed at a later merge, so that a reader who has just listed them can read on.
        """
        folder = self._table_folder(table)
        for listing in sorted(folder.glob("*.json")):  # the oldest first: what a file replaces goes before it does
            if listing.is_file() and time.time() - listing.stat().st_mtime > KEEP_REPLACED:
                for key in _replaced_by(listing):
                    (folder / f"{key}.parquet").unlink(missing_ok=True)
                    (folder / f"{key}.json").unlink(missing_ok=True)
        key = _new_key(MERGED)
        schema = TABLES[table]
        with (
            whole_file(folder / f"{key}.parquet") as file,
            pq.ParquetWriter(file, schema, compression="zstd") as merged,
        ):
            pending: list[pa.Table] = []
            for old in keys:  # at most some groups of rows in memory, which does not grow with the table
                with pq.ParquetFile(folder / f"{old}.parquet") as source:
                    for group in range(source.num_row_groups):
                        pending.append(source.read_row_group(group).select(schema.names).cast(schema))
                        if sum(map(len, pending)) >= ROWS_A_GROUP:
                            merged.write_table(_sorted(pending))
                            pending = []
            if pending:
                merged.write_table(_sorted(pending))
        with whole_file(folder / f"{key}.json") as file:
            file.write(json.dumps(keys).encode())

    def newest(self, table: str, column: str, values: list[str]) -> dict[str, dict[str, Any]]:
        """The newest row (by ``seen_at``) of each of ``values`` in ``column``, without reading the whole table."""
        files = self._files(table)
        if not files or not values:
            return {}
        field = ds.field(column)
        wanted = (field >= min(values)) & (field <= max(values)) & field.isin(values)  # the bounds skip whole files
        found = ds.dataset(files, schema=TABLES[table], format="parquet").to_table(
            filter=wanted, batch_readahead=1, fragment_readahead=1
        )
        rows = sorted(found.to_pylist(), key=lambda row: row["seen_at"])
        return {row[column]: row for row in rows}

    def has(self, table: str, key: str) -> bool:
        """Whether ``table`` has a file of ``key``."""
        return self._table_file(table, key).is_file()

    def remove(self, table: str, key: str) -> None:
        """Remove the file of ``key``; nothing happens where there is none."""
        self._table_file(table, key).unlink(missing_ok=True)

    def keys(self, table: str) -> list[str]:
        """The keys of all files of ``table``."""
        folder = self._table_folder(table)
        found = {path.stem for path in folder.glob("*.parquet")}
        listings = [path for path in folder.glob("*.json") if path.stem in found]
        replaced = {key for listing in listings for key in _replaced_by(listing)}
        unlisted = {key for key in found if key.startswith(MERGED)} - {listing.stem for listing in listings}
        return sorted(found - replaced - unlisted)

    def _files(self, table: str) -> list[str]:
        return [str(self._table_folder(table) / f"{key}.parquet") for key in self.keys(table)]

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with a view a table over its Parquet files; it cannot reach other files or hosts."""
        connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        for name, schema in TABLES.items():
            files = self._files(name)
            data = ds.dataset(files, schema=schema, format="parquet") if files else schema.empty_table()
            connection.register(f"{name}_rows" if name in NEWEST else name, data)
        for name, sql in NEWEST.items():
            connection.execute(f"CREATE TEMP VIEW {name} AS {sql}")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        return connection

    def rows(self, sql: str, parameters: list[Any] | None = None) -> list[dict[str, Any]]:
        """The rows that ``sql`` answers, as dictionaries. Raises duckdb.Error for SQL that fails."""
        return self.select(sql, parameters).to_pylist()

    def select(self, sql: str, parameters: list[Any] | dict[str, Any] | None = None, **tables: pa.Table) -> pa.Table:
        """What ``sql`` answers over the workspace's tables and the named ``tables``; no rows for other statements."""
        with self.connect() as connection:
            for name, table in tables.items():
                connection.register(name, table)
            relation = connection.sql(sql, params=parameters)
            return relation.to_arrow_table() if relation is not None else pa.table({})

    def spool(self, audit_id: str) -> Spool:
        """The unfinished part of an audit."""
        if not KEY.fullmatch(audit_id):
            raise WorkspaceError(f"{audit_id!r} is not an audit id")
        return Spool(self.root / "spool" / audit_id)

    def report_path(self, audit_id: str) -> Path:
        """Where the report page of an audit goes."""
        if not KEY.fullmatch(audit_id):
            raise WorkspaceError(f"{audit_id!r} is not an audit id")
        return self.root / "reports" / f"{audit_id}.html"


class Spool:
    """Sampled images of an unfinished audit, a whole Parquet file a batch, so that a run can go on where it stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, first: int, rows: pa.Table) -> None:
        """Keep one batch; ``first`` is the number of its first image."""
        with whole_file(self.folder / f"{first:08d}.parquet") as file:
            pq.write_table(rows, file, compression="zstd")

    def read(self) -> pa.Table | None:
        """Everything kept so far, or None."""
        files = sorted(str(path) for path in self.folder.glob("*.parquet"))
        return pa.concat_tables([pq.read_table(file) for file in files]) if files else None

    def discard(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
