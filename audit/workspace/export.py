"""Tables for other programs: Parquet or CSV files, or Delta tables, of what SQL over the workspace sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import PART, make_folder, whole_file
from audit.schemas import TABLES
from audit.workspace.workspace import Workspace

BATCH = 4096  # rows


class ExportFormat(StrEnum):
    """What ``export`` writes."""

    parquet = "parquet"
    csv = "csv"
    delta = "delta"


def export(workspace: Workspace, table: str, kind: ExportFormat, folder: Path) -> tuple[Path, int]:
    """Write ``table`` below ``folder``; where it is, and its rows.

    CSV has lists and structures as JSON, bytes as hex and times in UTC. Raises WorkspaceError where it is there
    already, and for Delta without its package.
    """
    if table not in TABLES:
        raise WorkspaceError(f"there is no table {table!r}: there are {', '.join(TABLES)}")
    place = folder / (table if kind is ExportFormat.delta else f"{table}.{kind.value}")
    if place.exists():
        raise WorkspaceError(f"{place} is there already: choose another folder, or remove it")
    writers = {ExportFormat.parquet: _parquet, ExportFormat.csv: _csv, ExportFormat.delta: _delta}
    if kind is ExportFormat.delta:
        _require_delta()

    def ask(connection: duckdb.DuckDBPyConnection) -> int:
        reader = connection.sql(f'SELECT * FROM "{table}"').to_arrow_reader(BATCH)
        return writers[kind](reader, place)

    return place, workspace.asked(ask, f"SELECT * FROM {table}")


def _parquet(reader: pa.RecordBatchReader, place: Path) -> int:
    rows = 0
    with whole_file(place) as file, pq.ParquetWriter(file, reader.schema, compression="zstd") as target:
        for batch in reader:
            target.write_batch(batch)
            rows += batch.num_rows
    return rows


def _csv(reader: pa.RecordBatchReader, place: Path) -> int:
    rows = 0
    with whole_file(place) as file:
        first = True
        for batch in _texts(reader):
            pyarrow.csv.write_csv(batch, file, pyarrow.csv.WriteOptions(include_header=first))
            first = False
            rows += batch.num_rows
    return rows


def _texts(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The batches with what CSV can hold; an empty one where there are none, for the header."""
    empty = True
    for batch in reader:
        empty = False
        yield _text_table(pa.Table.from_batches([batch]))
    if empty:
        yield _text_table(reader.schema.empty_table())


def _text_table(table: pa.Table) -> pa.Table:
    plain = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    columns = [
        column
        if any(test(column.type) for test in plain)
        else pa.array([_text(value) for value in column.to_pylist()], pa.string())
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)


def _require_delta() -> None:
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise WorkspaceError(
            "Delta tables need the package deltalake: pip install 'lora-audit[delta]', or choose parquet or csv"
        ) from error


def _delta(reader: pa.RecordBatchReader, place: Path) -> int:
    from deltalake import write_deltalake

    rows = 0
    failed: list[Exception] = []

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        try:
            for batch in reader:
                rows += batch.num_rows
                yield batch
        except (OSError, pa.ArrowException) as error:
            failed.append(error)
            raise

    unfinished = place.with_name(f".{place.name}{PART}")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished)
    try:
        write_deltalake(str(unfinished), pa.RecordBatchReader.from_batches(reader.schema, counted()))
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        if failed:  # it wraps the error of reading, which tells whether to read again
            raise failed[0] from None
        raise
    unfinished.rename(place)
    return rows
