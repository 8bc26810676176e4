"""The nearest rows by cosine among many, exactly: a first pass in 8-bit integers says which rows can be among them.

A unit vector x is kept as x' = s n, n in -127 to 127 and s = max |x| / 127, and e = |x - x'| beside. For unit q and x
the error of the first pass is bounded by Cauchy and Schwarz,

    |q x - q' x'| <= |q| |x - x'| + |q - q'| |x'| <= e_x + e_q (1 + e_x),

so that what cannot be among the nearest is told from what can. The latter is computed again by the caller. 8-bit
products read a quarter of the memory, and processors have instructions for them: several times as fast as float32.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from audit.references.index.quantized import Quantized, quantized

BLOCK = 4096  # rows of a product, which then stays in the cache with the queries
QUERIES = 1024  # of a product
BUFFER = 1024  # rows that a query may have in hand
LEAST_QUERIES = 16  # fewer are filled up: products of fewer are no faster


def can_be_nearest(rows: Quantized, queries: np.ndarray, top: int) -> tuple[list[np.ndarray], np.ndarray]:
    """For each of ``queries``, unit float32 [Q, D], the rows that can be among its ``top`` nearest.

    Those that more than BUFFER rows can be nearest to are told by the second answer, bool [Q]; their rows say nothing.
    """
    found: list[np.ndarray] = []
    full = np.zeros(len(queries), bool)
    for start in range(0, len(queries), QUERIES):
        chunk = quantized(queries[start : start + QUERIES])
        mine, overrun = _first_pass(rows, chunk, top)
        found += mine
        full[start : start + QUERIES] = overrun
    return found, full


def _first_pass(rows: Quantized, queries: Quantized, top: int) -> tuple[list[np.ndarray], np.ndarray]:
    number = len(queries.numbers)
    padded = np.zeros((max(number, LEAST_QUERIES), rows.numbers.shape[1]), np.int8)
    padded[:number] = queries.numbers
    turned = torch.from_numpy(padded).T
    state = _State(number, top, queries)
    for start in range(0, len(rows.numbers), BLOCK):
        block = np.ascontiguousarray(rows.numbers[start : start + BLOCK])
        products = torch._int_mm(torch.from_numpy(block), turned).numpy()
        end = start + len(block)
        _scan(
            products, start, rows.scales[start:end], rows.errors[start:end], queries.scales, state.margins, top,
            state.floors, state.lower, state.upper, state.rows, state.counts, state.full,
        )  # fmt: skip
    return [state.those(one) for one in range(number)], state.full


class _State:
    """What each query has in hand: rows with a lower and an upper bound of their cosine, and the floor to get in."""

    def __init__(self, queries: int, top: int, quantized: Quantized) -> None:
        self.top = top
        self.margins = (quantized.errors * 1.1).astype(np.float32)  # |x'| is at most 1 + e_x, and e_x below 0.09
        self.floors = np.full(queries, -np.inf, np.float32)
        self.lower = np.empty((queries, BUFFER), np.float32)
        self.upper = np.empty((queries, BUFFER), np.float32)
        self.rows = np.empty((queries, BUFFER), np.int64)
        self.counts = np.zeros(queries, np.int64)
        self.full = np.zeros(queries, bool)

    def those(self, query: int) -> np.ndarray:
        """The rows that can be among the nearest of ``query``."""
        held = self.counts[query]
        lower, upper = self.lower[query, :held], self.upper[query, :held]
        if held > self.top:
            floor = np.partition(lower, held - self.top)[held - self.top]
            return self.rows[query, :held][upper >= floor]
        return self.rows[query, :held].copy()


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "ninf", "nsz", "reassoc", "contract"})
def _scan(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    products, first, scales, errors, query_scales, margins, top, floors, lower, upper, rows, counts, full
):
    """Take the rows of a block, ``products`` int32 [B, Q], whose upper bound reaches a query's floor."""
    step = 64
    number = len(query_scales)
    for row in range(products.shape[0]):
        scale, error = scales[row], errors[row]
        for start in range(0, number, step):
            end = min(start + step, number)
            above = np.float32(-2.0)
            for query in range(start, end):
                over = products[row, query] * scale * query_scales[query] + error + margins[query] - floors[query]
                above = max(above, over)
            if above < 0:
                continue
            for query in range(start, end):
                about = products[row, query] * scale * query_scales[query]
                most = about + error + margins[query]
                if most < floors[query] or full[query]:
                    continue
                held = counts[query]
                if held == lower.shape[1]:
                    held = _let_go(query, top, floors, lower, upper, rows)
                    if held > lower.shape[1] // 2:
                        full[query] = True
                        floors[query] = np.float32(3.0)
                        continue
                    if most < floors[query]:
                        counts[query] = held
                        continue
                lower[query, held] = about - error - margins[query]
                upper[query, held] = most
                rows[query, held] = first + row
                counts[query] = held + 1


@numba.njit(nogil=True, cache=True)
def _let_go(query, top, floors, lower, upper, rows):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Let go of the rows that cannot be among the ``top`` nearest any more; how many are left."""
    size = lower.shape[1]
    floor = np.partition(lower[query], size - top)[size - top]
    kept = 0
    for one in range(size):
        if upper[query, one] >= floor:
            lower[query, kept] = lower[query, one]
            upper[query, kept] = upper[query, one]
            rows[query, kept] = rows[query, one]
            kept += 1
    floors[query] = floor
    return kept
