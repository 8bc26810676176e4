"""The workspace: Parquet tables, the spool of unfinished audits, and reports, on a disk or on object storage.

Files are immutable and appear whole (audit/files.py). A file's name is the key of what is in it (an audit, a reference
set), so writing the same thing again replaces it with itself.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import Files
from audit.schemas import KEY_COLUMNS, TABLES

VERSION = 2
MARKER = "workspace.json"
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
SPOOLED_BATCH = "raw-"  # how the names of batches in the spool begin; those of older versions are sampled again
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _new_key(kind: str) -> str:
    return f"{kind}{time.time_ns():020d}-{secrets.token_hex(4)}"


def _sorted(tables: list[pa.Table]) -> pa.Table:
    """One table in the order of its first column, so that a reader who wants few of its values skips most groups."""
    whole = pa.concat_tables(tables).combine_chunks()
    return whole.sort_by(whole.column_names[0])


def _in_schema(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """``rows`` with the columns of ``schema``; those that an older lora-audit did not write are null."""
    for name in set(schema.names) - set(rows.column_names):
        rows = rows.append_column(name, pa.nulls(len(rows), schema.field(name).type))
    return rows.select(schema.names).cast(schema)


def _without(rows: pa.Table, columns: tuple[str, ...], key: str | None) -> pa.Table:
    """``rows`` but those whose ``columns``, joined with ".", are ``key``."""
    if key is None:
        return rows
    joined = pc.binary_join_element_wise(*(rows[name] for name in columns), ".")
    return rows.filter(pc.not_equal(joined, key))


class Workspace:
    """Where everything is kept: a folder, or s3://bucket/prefix. Opening creates it, unless ``create`` is False.

    Raises WorkspaceError for one of another version, a folder of other things, or one that is not there to be read.
    """

    def __init__(self, location: str | Path, create: bool = True) -> None:
        self.files = Files(location)
        marker = self.files.read(MARKER)
        if marker is None:
            # another process may be creating it at this moment
            if self.files.list("") and self.files.read(MARKER) is None:
                raise WorkspaceError(f"{self.files} is not a workspace and not empty: choose another --workspace")
            if not create:
                raise WorkspaceError(
                    f"there is no workspace at {self.files}: check --workspace, or LORA_AUDIT_WORKSPACE"
                )
            self.files.write(MARKER, json.dumps({"version": VERSION}).encode())
            marker = self.files.read(MARKER)
        try:
            found = int(json.loads(marker or b"")["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(
                f"{self.files}/{MARKER} is damaged: restore it, or choose another --workspace"
            ) from error
        if found < VERSION:
            raise WorkspaceError(
                f"{self.files} was written by an older lora-audit (workspace version {found}, this one knows "
                f"{VERSION}): choose another --workspace and run the audits again"
            )
        if found > VERSION:
            raise WorkspaceError(
                f"{self.files} was written by a newer lora-audit (workspace version {found}, this one knows "
                f"{VERSION}): upgrade lora-audit, or choose another --workspace"
            )

    @property
    def root(self) -> Path:
        """Its folder. Raises WorkspaceError where it is on object storage."""
        if self.files.local is None:
            raise WorkspaceError(f"{self.files} is not a folder of this machine")
        return self.files.local

    def _key_of(self, table: str, key: str, suffix: str = "parquet") -> str:
        if table not in TABLES or not KEY.fullmatch(key):
            raise WorkspaceError(
                f"{key!r} cannot name a file of table {table!r}: use letters, digits, '.', '_' and '-'"
            )
        return f"tables/{table}/{key}.{suffix}"

    def write(self, table: str, key: str, rows: list[dict[str, Any]] | pa.Table) -> None:
        """Write ``rows`` as the one file of ``key`` in ``table``; with no rows, only remove what was there."""
        place = self._key_of(table, key)
        if table in KEY_COLUMNS:
            for name, replaced in self._active(table).items():
                if key in replaced:  # its rows are in a merged file: they leave it first
                    self._merge(table, [name], without=key)
        data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=TABLES[table])
        if data.num_rows == 0:
            self.files.remove(place)
            return
        with self.files.writing(place) as file:
            pq.write_table(data.cast(TABLES[table]), file, compression="zstd")

    def append(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Write ``rows`` as a new file of ``table`` beside the others; many small ones become one."""
        self.write(table, _new_key(LOOSE), rows)
        if len([key for key in self.keys(table) if key.startswith(LOOSE)]) >= MOST_LOOSE:
            self.compact(table)

    def compact(self, table: str) -> int:
        """Make one file of the small ones of ``table``, and of merged ones when they are many; how many went into one.

        A reader sees either the old files or the new one: a merged file counts from the moment its list of the files
        that it replaces is there. Those are removed at a later call, so that a reader who has just listed them can
        read on. One process at a time compacts a table.
        """
        keys = self.keys(table)
        listings = self._listings(table)
        written = {entry.key.rpartition("/")[2]: entry.modified for entry in self.files.list(f"tables/{table}")}
        for name in sorted(listings):  # the oldest first: what a file replaces goes before it does
            if time.time() - written.get(f"{name}.json", time.time()) > KEEP_REPLACED:
                for key in set(listings[name]) - set(keys):
                    self.files.remove(self._key_of(table, key))
                    self.files.remove(self._key_of(table, key, "json"))
        small = [key for key in keys if not key.startswith(MERGED)]
        merged = [key for key in keys if key.startswith(MERGED)]
        if table == "references" or (len(small) < 2 and len(merged) < MOST_MERGED):
            return 0
        self._merge(table, small + (merged if len(merged) >= MOST_MERGED else []))
        return len(small)

    def _merge(self, table: str, keys: list[str], without: str | None = None) -> None:
        """Write the rows of ``keys``, but those of the key ``without``, as one merged file that replaces them."""
        listings = self._listings(table)
        replaced = {*keys, *(key for name in keys for key in listings.get(name, []))} - {without}
        name, schema = _new_key(MERGED), TABLES[table]
        with (
            self.files.writing(self._key_of(table, name)) as file,
            pq.ParquetWriter(file, schema, compression="zstd") as target,
        ):
            pending: list[pa.Table] = []
            for old in keys:  # at most some groups of rows in memory, which does not grow with the table
                source = pq.ParquetFile(self.files.path(self._key_of(table, old)), filesystem=self.files.system)
                for group in range(source.num_row_groups):
                    rows = _in_schema(source.read_row_group(group), schema)
                    pending.append(_without(rows, KEY_COLUMNS.get(table, ()), without))
                    if sum(map(len, pending)) >= ROWS_A_GROUP:
                        target.write_table(_sorted(pending))
                        pending = []
                source.close()
            if pending:
                target.write_table(_sorted(pending))
        self.files.write(self._key_of(table, name, "json"), json.dumps(sorted(replaced)).encode())

    def _listings(self, table: str) -> dict[str, list[str]]:
        """The keys that each merged file replaces, of those whose file is there."""
        names = {entry.key.rpartition("/")[2] for entry in self.files.list(f"tables/{table}")}
        found = {}
        for name in names:
            stem = name.removesuffix(".json")
            if name != stem and f"{stem}.parquet" in names:
                content = self.files.read(self._key_of(table, stem, "json"))  # None: another process has removed it
                found[stem] = [key for key in json.loads(content or b"[]") if KEY.fullmatch(key)]
        return found

    def newest(self, table: str, column: str, values: list[str]) -> dict[str, dict[str, Any]]:
        """The newest row (by ``seen_at``) of each of ``values`` in ``column``, without reading the whole table."""
        if not values:
            return {}
        field = ds.field(column)
        wanted = (field >= min(values)) & (field <= max(values)) & field.isin(values)  # the bounds skip whole files
        data = self._dataset(table)
        found = data.to_table(filter=wanted, batch_readahead=1, fragment_readahead=1)
        rows = sorted(found.to_pylist(), key=lambda row: row["seen_at"])
        return {row[column]: row for row in rows}

    def has(self, table: str, key: str) -> bool:
        """Whether ``table`` has a file of ``key``."""
        if self.files.exists(self._key_of(table, key)):
            return True
        return any(key in replaced for replaced in self._active(table).values())

    def remove(self, table: str, key: str) -> None:
        """Remove the file of ``key``; nothing happens where there is none."""
        self.files.remove(self._key_of(table, key))

    def keys(self, table: str) -> list[str]:
        """The keys of all files of ``table``."""
        names = [entry.key.rpartition("/")[2] for entry in self.files.list(f"tables/{table}")]
        found = {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}
        active = self._active(table) if any(name.endswith(".json") for name in names) else {}
        replaced = {key for keys in active.values() for key in keys}
        return sorted(key for key in found - replaced if key in active or not key.startswith(MERGED))

    def _active(self, table: str) -> dict[str, list[str]]:
        """The merged files that count, with the keys they replace."""
        listings = self._listings(table)
        replaced = {key for keys in listings.values() for key in keys}
        return {name: keys for name, keys in listings.items() if name not in replaced}

    def _dataset(self, table: str) -> ds.Dataset:
        paths = [self.files.path(self._key_of(table, key)) for key in self.keys(table)]
        if not paths:
            return ds.dataset(TABLES[table].empty_table())
        return ds.dataset(paths, schema=TABLES[table], format="parquet", filesystem=self.files.system)

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with a view a table over its Parquet files; it cannot reach other files or hosts."""
        connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        for name in TABLES:
            connection.register(f"{name}_rows" if name in NEWEST else name, self._dataset(name))
        for name, sql in NEWEST.items():
            connection.execute(f"CREATE TEMP VIEW {name} AS {sql}")
        connection.execute("SET enable_progress_bar = false")  # DuckDB draws it on stdout, which is for --json
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
        return Spool(self.files, f"spool/{audit_id}")

    def report_key(self, audit_id: str) -> str:
        """The key of an audit's report page."""
        if not KEY.fullmatch(audit_id):
            raise WorkspaceError(f"{audit_id!r} is not an audit id")
        return f"reports/{audit_id}.html"


class Spool:
    """Sampled images of an unfinished audit, a whole Parquet file a batch, so that a run can go on where it stopped.

    Pixels are kept as they are: most are thrown away before long, and compressing them would take longer than writing.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.folder = files, folder

    def add(self, first: int, rows: pa.Table) -> None:
        """Keep one batch; ``first`` is the number of its first image."""
        plain = [name for name in rows.schema.names if name != "image"]
        packed = {name: "none" if name == "image" else "zstd" for name in rows.schema.names}
        with self.files.writing(f"{self.folder}/{SPOOLED_BATCH}{first:08d}.parquet") as file:
            pq.write_table(rows, file, compression=packed, use_dictionary=plain, write_statistics=plain)

    def read(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """What is kept so far, a batch at a time, of all columns or of some."""
        for key in self._batches():
            yield pq.ParquetFile(self.files.path(key), filesystem=self.files.system).read(columns)

    def indices(self) -> set[int]:
        """The numbers of the images that are kept."""
        return {index for rows in self.read(["index"]) for index in rows["index"].to_pylist()}

    def _batches(self) -> list[str]:
        keys = [entry.key for entry in self.files.list(self.folder)]
        return sorted(key for key in keys if key.rpartition("/")[2].startswith(SPOOLED_BATCH))

    def begin(self) -> None:
        """Say that a worker begins; it is remembered until ``take_begun``."""
        self.files.write(f"{self.folder}/begun.json", b"{}")

    def take_begun(self) -> bool:
        """Whether a worker has begun since the last call."""
        begun = self.files.exists(f"{self.folder}/begun.json")
        self.files.remove(f"{self.folder}/begun.json")
        return begun

    def batches(self) -> int:
        """How many batches are kept."""
        return len(self._batches())

    def keep_precision(self, precision: str) -> None:
        """Remember what is sampled in, so that all images of an audit are of one precision."""
        self.files.write(f"{self.folder}/precision.json", json.dumps(precision).encode())

    def precision(self) -> str | None:
        """What was sampled in so far, where it was kept."""
        content = self.files.read(f"{self.folder}/precision.json")
        return json.loads(content) if content else None

    def finish(self, facts: dict[str, Any]) -> None:
        """Say that everything is there, with ``facts`` about it."""
        self.files.write(f"{self.folder}/extracted.json", json.dumps(facts).encode())

    def finished(self) -> dict[str, Any] | None:
        """The facts that ``finish`` was given, None where it was not called."""
        content = self.files.read(f"{self.folder}/extracted.json")
        return json.loads(content) if content else None

    def discard(self) -> None:
        """Remove it."""
        self.files.remove_folder(self.folder)
