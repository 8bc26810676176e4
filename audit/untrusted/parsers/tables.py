"""Parquet files of strangers: vectors with what stands beside them, and pictures; a few rows at a time.

A column is read from its beginning once, as rows are asked for in their order: the last reader is kept between items.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audit.untrusted.child import Item, RefusedError

MOST_COLUMNS, MOST_GROUPS = 500, 100_000
MOST_TEXT = 1000  # characters of a text beside; a longer one is left out
_reading: dict[str, tuple[Iterator[pa.RecordBatch], int]] = {}  # the last reader, by what it reads: its next row


def facts(item: Item) -> dict[str, Any]:
    """Rows, row groups, and (name, kind) of each column: vector, text, number, binary, picture, or other."""
    with _opened(item) as source:
        schema, metadata = source.schema_arrow, source.metadata
        if len(schema) > MOST_COLUMNS or metadata.num_row_groups > MOST_GROUPS:
            raise RefusedError(
                f"it has {len(schema)} columns and {metadata.num_row_groups} groups of rows: at most {MOST_COLUMNS} "
                f"and {MOST_GROUPS} are read"
            )
        return {"rows": metadata.num_rows, "columns": [[str(one.name), _kind(one.type)] for one in schema]}


def vectors(item: Item) -> dict[str, Any]:
    """The next rows from ``start``: ``widths`` of the vectors in ``column`` (None for none), those of ``width`` as
    float32 beside, and the values of the columns ``beside``.
    """
    said = item.said
    batch = _rows(item, [said["column"], *said["beside"]])
    column = batch.column(batch.schema.get_field_index(said["column"]))
    widths = pc.list_value_length(column)
    right = column.filter(pc.fill_null(pc.equal(widths, said["width"]), False))
    numbers = right.flatten().cast(pa.float32(), safe=False).fill_null(float("nan"))
    item.write(np.ascontiguousarray(numbers.to_numpy(zero_copy_only=False), np.float32).tobytes())
    return {"rows": batch.num_rows, "widths": widths.to_pylist(), "beside": _beside(batch, said["beside"])}


def pictures(item: Item) -> dict[str, Any]:
    """The next rows from ``start``: ``sizes`` of the files in ``column`` (None for none or more than ``each``), the
    files one behind the other beside, their ``paths``, and the values of the columns ``beside``.
    """
    said = item.said
    batch = _rows(item, [said["column"], *said["beside"]])
    column = batch.column(batch.schema.get_field_index(said["column"]))
    paths: list[str | None] = [None] * batch.num_rows
    if pa.types.is_struct(column.type):
        names = [column.type.field(number).name for number in range(column.type.num_fields)]
        if "path" in names:
            paths = [str(one)[:MOST_TEXT] if one else None for one in column.field(names.index("path")).to_pylist()]
        column = column.field(names.index("bytes"))
    sizes: list[int | None] = []
    for number in range(batch.num_rows):
        value: Any = column[number].as_buffer() if column[number].is_valid else None
        if value is None or value.size > said["each"]:
            sizes.append(None)
            continue
        sizes.append(value.size)
        item.write(memoryview(value))
    return {"rows": batch.num_rows, "sizes": sizes, "paths": paths, "beside": _beside(batch, said["beside"])}


def _opened(item: Item) -> pq.ParquetFile:
    try:
        file = os.fdopen(os.dup(item.files[0].fileno()), "rb")
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, thrift_string_size_limit=1 << 26)
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedError(f"not a readable Parquet file ({str(error)[:160]})") from error


def _rows(item: Item, columns: list[str]) -> pa.RecordBatch:
    """The batch that begins with the row ``start``, of ``count`` rows at most."""
    said = item.said
    key, start = said["key"], said["start"]
    reader, place = _reading.pop(key, (None, 0))
    _reading.clear()
    try:
        if reader is None or place != start:
            source = _opened(item)
            reader, place = source.iter_batches(said["count"], columns=columns, use_threads=False), 0
        while True:
            batch = next(reader)
            place += batch.num_rows
            if place > start:
                break
    except (MemoryError, RefusedError):
        raise
    except StopIteration:
        raise RefusedError(f"it ends at row {place}, and says that it has more") from None
    except Exception as error:
        raise RefusedError(f"not a readable Parquet file ({str(error)[:160]})") from error
    _reading[key] = reader, place
    return batch


def _beside(batch: pa.RecordBatch, names: list[str]) -> dict[str, list[Any]]:
    """Values of columns as plain values; bytes in hex, what is too long left out."""
    found = {}
    for name in names:
        values = batch.column(batch.schema.get_field_index(name)).to_pylist()
        found[name] = [
            one.hex() if isinstance(one, bytes) and len(one) <= MOST_TEXT else
            one if isinstance(one, int | float | bool) and one == one else
            one if isinstance(one, str) and len(one) <= MOST_TEXT else None
            for one in values
        ]  # fmt: skip
    return found


def _kind(one: pa.DataType) -> str:
    if pa.types.is_list(one) or pa.types.is_large_list(one) or pa.types.is_fixed_size_list(one):
        return "vector" if pa.types.is_floating(one.value_type) else "other"
    if pa.types.is_struct(one):
        names = {one.field(number).name: one.field(number).type for number in range(one.num_fields)}
        inner = names.get("bytes")
        return "picture" if inner is not None and _is_bytes(inner) else "other"
    if _is_bytes(one):
        return "binary"
    if pa.types.is_string(one) or pa.types.is_large_string(one):
        return "text"
    return "number" if pa.types.is_integer(one) or pa.types.is_floating(one) or pa.types.is_boolean(one) else "other"


def _is_bytes(one: pa.DataType) -> bool:
    return pa.types.is_binary(one) or pa.types.is_large_binary(one) or pa.types.is_fixed_size_binary(one)


PARSERS = {"parquet": facts, "parquet-vectors": vectors, "parquet-pictures": pictures}
