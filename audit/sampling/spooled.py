"""Rows of the spool, and what becomes of them. No model is needed for it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from audit.descriptors.base import to_png
from audit.schemas import GENERATIONS

SPOOL_COLUMNS = (
    ("seconds", pa.float64(), "wall time of its batch / its images, s"),
    ("height", pa.int32(), "pixels"),
    ("width", pa.int32(), "pixels"),
    ("contrast", pa.float32(), "see audit/sampling/pictures.py"),
    ("roughness", pa.float32(), "see audit/sampling/pictures.py"),
)
# As generations, but "image" is raw: uint8 [height, width, 3], or null.
SPOOLED = pa.schema(
    [*GENERATIONS, *(pa.field(name, kind, metadata={"doc": text}) for name, kind, text in SPOOL_COLUMNS)]
)
MOST_THREADS = 8


def as_generations(spooled: pa.Table, wanted: set[int]) -> pa.Table:
    """Rows of the spool (schema SPOOLED) as rows of generations; the ``wanted`` ones have their picture as PNG.

    PNGs are made by threads: compressing them lets others run.
    """
    if not wanted:
        pictures: list[bytes | None] = [None] * spooled.num_rows
    else:
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
            pictures = list(threads.map(lambda row: _png(row, wanted), spooled.to_batches(max_chunksize=1)))
    table = spooled.select(GENERATIONS.names)
    at = GENERATIONS.get_field_index("image")
    return table.set_column(at, GENERATIONS.field(at), pa.array(pictures, pa.binary()))


def _png(row: pa.RecordBatch, wanted: set[int]) -> bytes | None:
    pixels = row["image"][0]
    if row["index"][0].as_py() not in wanted or not pixels.is_valid:
        return None
    shape = row["height"][0].as_py(), row["width"][0].as_py(), 3
    return to_png(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape))


def vectors_of(table: pa.Table) -> np.ndarray:
    """The ``descriptor`` column as float32 [N, D]."""
    column = table["descriptor"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
