"""Made-up vectors and extractions of benchmarks.matching, and banks of many millions, which are written as an index.

The table of ten million references would take as much disk as their index. Here the index is written by what writes it
of the table, of rows that are made up as they are asked for, and extractions are matched with it.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch

from audit.progress import quiet
from audit.references.index import Bank, store
from audit.references.index.quantized import Passing
from audit.references.match import TOP, match_extractions
from audit.schemas import EXTRACTIONS

WIDTH = 512
ONE_AUDIT = 15  # extractions
TIMES = 5  # that one audit is matched; the median is told


def unit(vectors: np.ndarray) -> np.ndarray:
    """At length one."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def made_up(rng: np.random.Generator, number: int, centres: np.ndarray) -> np.ndarray:
    """Unit vectors float32 [N, 512]: half of them spread out, half near to one of ``centres``."""
    vectors = rng.standard_normal((number, WIDTH), dtype=np.float32)
    near = number // 2
    vectors[:near] = 0.7 * vectors[:near] / np.sqrt(WIDTH) + centres[rng.integers(0, len(centres), near)]
    return unit(vectors)


def hashes_of(rng: np.random.Generator, number: int) -> np.ndarray:
    """uint8 [N, 32]: random ones, and a tenth with few bits."""
    hashes = rng.integers(0, 256, (number, 32), dtype=np.uint8)
    blank = number // 10
    hashes[:blank] = np.packbits(rng.random((blank, 256)) < 0.02, axis=1)
    return hashes


def quality_of(number: int) -> np.ndarray:
    """Of hashes_of: those of blank pictures say nothing."""
    return np.where(np.arange(number) < number // 10, 0, 90).astype(np.int32)


def extractions_of(rng: np.random.Generator, number: int, known: np.ndarray, centres: np.ndarray) -> pa.Table:
    """Half of them references with noise, half others."""
    vectors = made_up(rng, number, centres)
    half = number // 2
    noise = rng.standard_normal((half, WIDTH), dtype=np.float32) * 0.02
    vectors[:half] = unit(known[rng.integers(0, len(known), half)] + noise)
    rows = {
        "audit_id": pa.array([f"{one // ONE_AUDIT:032x}" for one in range(number)]),
        "rank": pa.array(np.arange(number, dtype=np.int32) % ONE_AUDIT + 1),
        "descriptor": pa.ListArray.from_arrays(np.arange(number + 1, dtype=np.int32) * WIDTH, vectors.reshape(-1)),
        "pdq": pa.array([one.tobytes() for one in hashes_of(rng, number)], pa.binary(32)),
        "pdq_quality": pa.array(quality_of(number)),
    }
    return pa.table([rows.get(one.name, pa.nulls(number, one.type)) for one in EXTRACTIONS], schema=EXTRACTIONS)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long ``work`` takes, s, and its answer."""
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


def vectors_of(extractions: pa.Table) -> np.ndarray:
    """float32 [Q, 512]."""
    return extractions["descriptor"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)


class MadeUp:
    """``number`` made-up references, in batches as an index is written of them."""

    def __init__(self, rng: np.random.Generator, number: int) -> None:
        self.rng, self.number = rng, number
        self.centres = unit(rng.standard_normal((1000, WIDTH), dtype=np.float32))
        self.some: list[np.ndarray] = []  # vectors of about 5,000 of those that were made, to make extractions of
        self.seconds = 0.0  # that making them took

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, each once."""
        for start in range(0, self.number, store.ROWS):
            spent, batch = seconds(lambda start=start: self._batch(start, min(store.ROWS, self.number - start)))
            self.seconds += spent
            yield batch

    def _batch(self, start: int, count: int) -> pa.RecordBatch:
        vectors = made_up(self.rng, count, self.centres)
        self.some.append(vectors[:: max(self.number // 5000, 1)].copy())  # a view would keep them all
        columns = {
            "reference_id": pa.array([f"{start + one:064x}" for one in range(count)]),
            "descriptor": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * WIDTH, vectors.reshape(-1)),
            "pdq": pa.array([one.tobytes() for one in hashes_of(self.rng, count)], pa.binary(32)),
            "pdq_quality": pa.array(quality_of(count)), "side": pa.array(np.full(count, 500, np.int32)),
        }  # fmt: skip
        return pa.record_batch(columns)


def memory_mib() -> float:
    """What this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def index_alone(number: int, extractions: int, rng: np.random.Generator) -> dict[str, Any]:
    """The index of ``number`` references, made without a table, and so many ``extractions`` matched with it."""
    with tempfile.TemporaryDirectory() as folder:
        made, place = MadeUp(rng, number), Path(folder)
        write_s, _ = seconds(
            lambda: store._write(made.batches(), place, ["bank", "made-up"], number, WIDTH, quiet)
        )  # fmt: skip
        kept = sum(one.stat().st_size for one in place.iterdir())
        written_mib = memory_mib()
        open_s, bank = seconds(lambda: store._mapped(place))
        asked = extractions_of(rng, extractions, np.concatenate(made.some), made.centres)
        few = asked.take(np.linspace(0, extractions - 1, ONE_AUDIT).astype(np.int64))
        connection = duckdb.connect()
        times, computing = [], []
        for _ in range(TIMES):
            started = time.process_time()
            times.append(seconds(lambda: match_extractions(connection, few, {"bank": bank}, 0.75))[0])
            computing.append(time.process_time() - started)
        all_s, rows = seconds(lambda: match_extractions(connection, asked, {"bank": bank}, 0.75))
        held = memory_mib()
        found = bank.nearest(vectors_of(few), TOP).similarity.reshape(-1, TOP)
        return {
            "references": number, "extractions": extractions, "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "load": os.getloadavg()[0], "index_s": write_s - made.seconds, "index_mib": kept / 2**20,
            "open_s": open_s, "first_audit_s": times[0], "one_audit_s": sorted(times)[TIMES // 2],
            "one_audit_cpu_s": sorted(computing)[TIMES // 2], "threads": torch.get_num_threads(), "all_s": all_s,
            "rows": rows.num_rows, "write_memory_mib": written_mib, "memory_mib": held,
            "right": float((np.abs(found - all_nearest(bank, vectors_of(few))) < 1e-5).mean()),
        }  # fmt: skip


def all_nearest(bank: Bank, queries: np.ndarray) -> np.ndarray:
    """The TOP highest cosines of each query, by products in float32 with all references."""
    best = np.full((len(queries), TOP), -2, np.float32)
    passing = Passing(bank.vectors)
    for start in range(0, len(bank), store.ROWS):
        products = queries @ bank.vectors[start : start + store.ROWS].T
        best = -np.sort(-np.concatenate([best, products], axis=1), axis=1)[:, :TOP]
        passing.reached(start)
    return best
