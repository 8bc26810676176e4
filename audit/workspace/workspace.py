"""A workspace: its version, its tables by name, SQL over them, spools and reports, on a disk or on object storage."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from audit.conditional import require_conditional_puts
from audit.errors import WorkspaceError
from audit.files import Files
from audit.schemas import TABLES
from audit.storable import storable_values
from audit.workspace import compaction
from audit.workspace.names import KEY, check_key, new_rows_key
from audit.workspace.spool import BATCH, Spool
from audit.workspace.table import TRIES, Condition, Table
from audit.workspace.view import View

T = TypeVar("T")
VERSION, OLDEST = 3, 2
MARKER = "workspace.json"
# Rows of the catalog are never changed: a newer row of the same item takes the place of an older one in these views.
# A checkpoints row is written after the captions of its item, with the same time, and so makes them count.
NEWEST = {
    "checkpoints": """SELECT * FROM checkpoints_rows
        QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY seen_at DESC) = 1""",
    "captions": "SELECT DISTINCT c.* FROM captions_rows AS c SEMI JOIN checkpoints USING (item_id, seen_at)",
}
WORD = re.compile(r"[a-z_]+")
# Words of statements that can see tables which they do not name.
LISTING = {"show", "describe", "summarize", "pragma", "query", "query_table", "information_schema"}
READ_ERRORS = (duckdb.InvalidInputException, duckdb.IOException, duckdb.InternalException, OSError, pa.ArrowException)
OF_FILES = re.compile("stream|arrow|parquet|IOError", re.IGNORECASE)  # what errors of reading speak of
log = logging.getLogger("audit.workspace")


class Workspace:
    """Where everything is kept: a folder, or s3://bucket/prefix. Opening creates it, unless ``create`` is False.

    One of version 2 is rewritten in place; with ``reading`` it is refused instead, as are others and folders of other
    things. Raises WorkspaceError.
    """

    def __init__(self, location: str | Path, reading: bool = False, create: bool = True) -> None:
        self.files = Files(location)
        self._tables = {name: Table(self.files, name) for name in TABLES}
        self._loose: dict[str, int] = {}  # about how many loose files the tables have that were appended to
        marker = self.files.read(MARKER)
        if marker is None:
            # another process may be creating it at this moment
            if self.files.list("") and self.files.read(MARKER) is None:
                raise WorkspaceError(f"{self.files} is not a workspace and not empty: choose another --workspace")
            if not create:
                raise WorkspaceError(f"there is no workspace at {self.files}: check --workspace")
            if self.files.local is None:
                require_conditional_puts(self.files.create, self.files.remove, str(self.files))
            self.files.write(MARKER, json.dumps({"version": VERSION}).encode())
            marker = self.files.read(MARKER)
        found = self._version(marker)
        if found < OLDEST:
            raise WorkspaceError(
                f"{self.files} was written by an older lora-audit (workspace version {found}, this one knows "
                f"{OLDEST} and {VERSION}): choose another --workspace and run the audits again"
            )
        if found > VERSION:
            raise WorkspaceError(
                f"{self.files} was written by a newer lora-audit (workspace version {found}, this one knows "
                f"{VERSION}): upgrade lora-audit, or choose another --workspace"
            )
        if found < VERSION and reading:
            raise WorkspaceError(
                f"{self.files} was written by an older lora-audit (workspace version {found}): run 'lora-audit "
                f"migrate --workspace {self.files}' once; it rewrites the tables in place and can be killed at any time"
            )
        if found < VERSION:
            from audit.workspace.migration import migrate

            migrate(self.files, self._tables)
            self.files.write(MARKER, json.dumps({"version": VERSION}).encode())
            log.warning("%s is of version %d now", self.files, VERSION)
        if not reading:
            self.files.tidy()

    def _version(self, marker: bytes | None) -> int:
        try:
            return int(json.loads(marker or b"")["version"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise WorkspaceError(
                f"{self.files}/{MARKER} is damaged: restore it, or choose another --workspace"
            ) from error

    @property
    def root(self) -> Path:
        """Its folder. Raises WorkspaceError where it is on object storage."""
        if self.files.local is None:
            raise WorkspaceError(f"{self.files} is not a folder of this machine")
        return self.files.local

    def table(self, name: str) -> Table:
        """The table ``name``. Raises WorkspaceError where there is none."""
        if name not in self._tables:
            raise WorkspaceError(f"there is no table {name!r}: there are {', '.join(TABLES)}")
        return self._tables[name]

    # Writing

    def write(self, table: str, key: str, rows: list[dict[str, Any]] | pa.Table) -> None:
        """Make ``rows`` the rows of ``key`` in ``table``, in place of those it had; with no rows it has none.

        Control characters and lone surrogates of texts are written as escapes.
        """
        check_key(table, key)
        data = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(storable_values(rows), schema=TABLES[table])
        if data.num_rows == 0:
            self.table(table).take_away(key)
        else:
            self.table(table).put(key, data.cast(TABLES[table]))

    def write_parts(
        self, table: str, key: str, parts: Iterable[pa.Table], instead_of: Sequence[Condition] = ()
    ) -> None:
        """As ``write``, of rows that come in ``parts``; see ``Table.put_parts``. Texts have to be storable."""
        check_key(table, key)
        self.table(table).put_parts(key, parts, instead_of)

    def append(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Add ``rows`` to ``table``; from time to time the many small files become one."""
        if not rows:
            return
        self.write(table, new_rows_key(), rows)
        if table in self._loose:
            self._loose[table] += 1
        else:
            self._loose[table] = len(self.table(table).view().fresh)
        if self._loose[table] >= compaction.MOST_LOOSE:
            self._loose[table] = 0
            self.compact(table)

    def remove(self, table: str, key: str) -> None:
        """Remove the rows of ``key``, wherever they are; nothing happens where there are none."""
        check_key(table, key)
        self.table(table).take_away(key)

    def remove_where(self, table: str, column: str, value: str | int) -> None:
        """Remove the rows of ``table`` with ``value`` in ``column`` that were written so far.

        They leave the files at the next merges; ``erase`` does it now.
        """
        self._check_value(table, column, value)
        self.table(table).take_away_where((column, value))

    def erase(self, column: str, value: str | int, *tables: str) -> None:
        """Remove for good the rows with ``value`` in ``column`` from ``tables``, else from all that have the column.

        No Parquet file of the storage holds them afterwards. Raises WorkspaceError where a damaged file could.
        """
        chosen = tables or tuple(name for name, schema in TABLES.items() if column in schema.names)
        for name in chosen or ("",):
            self._check_value(name, column, value)
        for name in chosen:
            compaction.erase(self.table(name), (column, value))

    def erase_rows(self, table: str, several: Sequence[Sequence[Condition]]) -> None:
        """As ``erase``, of the rows of ``table`` that meet all conditions, (column, value), of one of ``several``."""
        for column, value in (one for conditions in several for one in conditions):
            self._check_value(table, column, value)
        if several:
            compaction.erase_each(self.table(table), several)

    def _check_value(self, table: str, column: str, value: str | int) -> None:
        try:
            pa.scalar(value, self.table(table).schema.field(column).type)
        except (KeyError, pa.ArrowException, TypeError) as error:
            raise WorkspaceError(f"table {table!r} has no rows with {value!r} in {column!r}: {error}") from error

    def compact(self, table: str, drop_damaged: bool = False, every: bool = False) -> int:
        """Merge the small files of ``table``, and tidy up; how many loose files went into a merge.

        ``every`` merges also a single loose file, so that none is left; ``drop_damaged`` gives up the rows of files
        that cannot be read.
        """
        one = self.table(table)
        merged = compaction.compact(one, every, drop_damaged)
        compaction.settle(one)
        compaction.vacuum(one)
        return merged

    def vacuum(self, table: str, grace: float | None = None) -> int:
        """Remove the files of ``table`` that merges replaced more than ``grace`` seconds ago (300); how many."""
        compaction.settle(self.table(table), grace)
        return compaction.vacuum(self.table(table), grace)

    # Reading

    def has(self, table: str, key: str) -> bool:
        """Whether ``table`` has rows of ``key``."""
        check_key(table, key)
        return self.table(table).has(key)

    def keys(self, table: str) -> list[str]:
        """The keys of the loose files of ``table``, and the names of its merged ones."""
        return self.table(table).keys()

    def newest(self, table: str, column: str, values: list[str]) -> dict[str, dict[str, Any]]:
        """The newest row (by ``seen_at``) of each of ``values`` in ``column``, without reading the whole table."""
        if not values:
            return {}
        field = ds.field(column)
        wanted = (field >= min(values)) & (field <= max(values)) & field.isin(values)  # the bounds skip whole files
        names = TABLES[table].names

        def look(view: View) -> list[dict[str, Any]]:
            return [
                row
                for data in self.table(table).datasets(view)
                for row in data.to_table(names, filter=wanted, batch_readahead=1, fragment_readahead=1).to_pylist()
            ]

        rows = sorted(self.table(table).read(look), key=lambda row: row["seen_at"])
        return {row[column]: row for row in rows}

    def connect(self, sql: str | None = None) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with a view a table, those that ``sql`` names or else all; it reaches no files or hosts.

        Times are UTC. What it reads can go while others merge: ``rows`` and ``select`` then read again.
        """
        return self._connect(named_tables(sql))[0]

    def _connect(self, names: list[str]) -> tuple[duckdb.DuckDBPyConnection, dict[str, View]]:
        connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        connection.execute("SET TimeZone = 'UTC'")
        # In this order: who sees a row of checkpoints or audits is to see what was written before it.
        views = {name: self.table(name).view() for name in names}
        for name, view in views.items():
            self._register(connection, f"{name}_rows" if name in NEWEST else name, view)
        for name, sql in NEWEST.items():
            if name in views:
                connection.execute(f"CREATE TEMP VIEW {name} AS {sql}")
        # DuckDB draws it on stdout, which is for --json; in a notebook without ipywidgets it cannot, and refuses
        with suppress(duckdb.InvalidInputException):
            connection.execute("SET enable_progress_bar = false")
        for name in ("http_proxy", "http_proxy_username", "http_proxy_password"):
            connection.execute(f"SET {name} = ''")  # DuckDB reads the environment's, password and all, and SQL shows it
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        return connection, views

    def _register(self, connection: duckdb.DuckDBPyConnection, name: str, view: View) -> None:
        datasets = self.table(view.table).datasets(view)
        columns = ", ".join(f'"{column}"' for column in TABLES[view.table].names)
        if not datasets:
            datasets = [ds.dataset(TABLES[view.table].empty_table())]
        for number, data in enumerate(datasets):
            connection.register(f"_{name}_{number}", data)
        parts = " UNION ALL ".join(f"SELECT {columns} FROM _{name}_{number}" for number in range(len(datasets)))
        connection.execute(f'CREATE TEMP VIEW "{name}" AS {parts}')

    def rows(self, sql: str, parameters: list[Any] | None = None) -> list[dict[str, Any]]:
        """The rows that ``sql`` answers, as dictionaries. Raises duckdb.Error for SQL that fails."""
        return self.select(sql, parameters).to_pylist()

    def sql(self, statement: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
        """What a statement of DuckDB's SQL answers over the tables (docs/tables.md); it sees no file and no host.

        Raises duckdb.Error for SQL that fails.
        """
        return self.select(statement, parameters)

    def select(self, sql: str, parameters: list[Any] | dict[str, Any] | None = None, **tables: pa.Table) -> pa.Table:
        """What ``sql`` answers over the workspace's tables and the named ``tables``; no rows for other statements."""

        def ask(connection: duckdb.DuckDBPyConnection) -> pa.Table:
            for name, table in tables.items():
                connection.register(name, table)
            relation = connection.sql(sql, params=parameters)
            return relation.to_arrow_table() if relation is not None else pa.table({})

        return self.asked(ask, sql)

    def asked(self, ask: Callable[[duckdb.DuckDBPyConnection], T], sql: str | None = None) -> T:
        """What ``ask`` gets from a connection with the tables that ``sql`` names.

        Where files have gone meanwhile or turn out to be damaged, it is asked again.
        """
        names = named_tables(sql)
        for attempt in range(TRIES):
            connection, views = self._connect(names)
            try:
                return stoppable(ask, connection)
            except duckdb.CatalogException:
                if len(names) == len(TABLES):
                    raise
                names = list(TABLES)  # it says the name of a table in a way of its own
            except READ_ERRORS as error:
                deep = not isinstance(error, duckdb.Error) or bool(OF_FILES.search(str(error)))
                if attempt + 1 == TRIES or not any(self.table(name).changed(views[name], deep) for name in views):
                    raise
            finally:
                with suppress(duckdb.Error):
                    connection.close()
        raise AssertionError("unreachable")

    # Beside the tables

    def spool(self, audit_id: str, batch: str = BATCH) -> Spool:
        """The unfinished part of an audit: its images, or what else is kept under the name ``batch``."""
        if not KEY.fullmatch(audit_id):
            raise WorkspaceError(f"{audit_id!r} is not an audit id")
        return Spool(self.files, f"spool/{audit_id}", batch)


def stoppable(ask: Callable[[duckdb.DuckDBPyConnection], T], connection: duckdb.DuckDBPyConnection) -> T:
    """What ``ask`` gets from ``connection``; Ctrl-C ends the query and is raised.

    DuckDB looks for signals only where the thread that asks does nothing of the query itself. The main thread, which
    gets them, therefore waits for another one that asks.
    """
    if threading.current_thread() is not threading.main_thread():
        return ask(connection)
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask, connection)
        try:
            return asking.result()
        except KeyboardInterrupt:
            while not asking.done():  # what comes before the query has begun interrupts nothing
                connection.interrupt()
                wait([asking], timeout=0.1)
            raise


def condition(sql: str) -> str:
    """``sql`` in parentheses, if it is one expression. Raises duckdb.Error for anything that could end them early."""
    duckdb.SQLExpression(sql)
    return f"({sql}\n)"  # the line's end ends a comment


def named_tables(sql: str | None) -> list[str]:
    """The tables that ``sql`` may read, in the order of their views."""
    if sql is None:
        return list(TABLES)
    words = set(WORD.findall(sql.lower()))
    if words & LISTING or any(word.startswith("duckdb_") for word in words):
        return list(TABLES)
    found = {name for name in TABLES if name in words or f"{name}_rows" in words}
    if "captions" in found:
        found.add("checkpoints")
    return [name for name in TABLES if name in found]
