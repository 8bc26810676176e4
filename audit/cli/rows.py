"""What a query answers as text or bytes: nothing is cut, and two columns of one name both come out."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def plain(value: Any) -> Any:
    """``value`` as JSON has it: bytes as hex, NaN and infinity as null, whole decimals as integers, times as text."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def distinct(names: list[str]) -> list[str]:
    """``names``, a repeated one with a number behind it: JSON and Parquet hold one column of a name."""
    found: list[str] = []
    for name in names:
        number, new = 0, name
        while new in found or (number and new in names):
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found


def rows_of(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """The rows of ``table`` in plain values, by position."""
    for batch in table.to_batches(max_chunksize=4096):
        columns = [[plain(value) for value in column.to_pylist()] for column in batch.columns]
        yield from zip(*columns, strict=True)


def as_json_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of ``table`` as objects."""
    names = distinct(table.column_names)
    return [dict(zip(names, row, strict=True)) for row in rows_of(table)]


def as_json_lines(table: pa.Table) -> Iterator[str]:
    """An object a line."""
    names = distinct(table.column_names)
    for row in rows_of(table):
        yield json.dumps(dict(zip(names, row, strict=True)), allow_nan=False)


def as_csv(table: pa.Table) -> Iterator[str]:
    """Lines of CSV (RFC 4180, but for the ends of lines): the names, then the rows; null is empty, lists are JSON."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="")
    for row in [table.column_names, *rows_of(table)] if table.column_names else []:
        writer.writerow([cell(value) if value is not None else "" for value in row])
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def cell(value: object) -> str:
    """A plain value in a cell of a table."""
    if isinstance(value, dict | list | bool):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def as_parquet(table: pa.Table) -> bytes:
    """A Parquet file of ``table``."""
    sink = io.BytesIO()
    pq.write_table(table.rename_columns(distinct(table.column_names)), sink, compression="zstd")
    return sink.getvalue()
