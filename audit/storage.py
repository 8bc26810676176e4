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
    "captions": "SELECT c.* FROM captions_rows AS c SEMI JOIN checkpoints USING (item_id, seen_at)",
}
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
        """Write ``rows`` as a new file of ``table`` beside the others."""
        self.write(table, f"{time.time_ns():020d}-{secrets.token_hex(4)}", rows)

    def has(self, table: str, key: str) -> bool:
        """Whether ``table`` has a file of ``key``."""
        return self._table_file(table, key).is_file()

    def remove(self, table: str, key: str) -> None:
        """Remove the file of ``key``; nothing happens where there is none."""
        self._table_file(table, key).unlink(missing_ok=True)

    def keys(self, table: str) -> list[str]:
        """The keys of all files of ``table``."""
        return sorted(path.stem for path in self._table_folder(table).glob("*.parquet"))

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with a view a table over its Parquet files; it cannot reach other files or hosts."""
        connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        for name, schema in TABLES.items():
            files = sorted(str(path) for path in self._table_folder(name).glob("*.parquet"))
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
