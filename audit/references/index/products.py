"""The nearest rows by cosine among many, exactly: a first pass in 8-bit integers says which rows can be among them.

A unit vector x is kept as x' = s n, n in -127 to 127 and s = max |x| / 127, and e = |x - x'| beside. For unit q and x
the error of the first pass is bounded by Cauchy and Schwarz,

    |q x - q' x'| <= |q| |x - x'| + |q - q'| |x'| <= e_x + e_q (1 + e_x),

so that what cannot be among the nearest is told from what can. The latter is computed again by the caller. 8-bit
products read a quarter of the memory, and processors have instructions for them: several times as fast as float32.
"""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numba
import numpy as np
import torch

from audit.references.index.quantized import Passing, Quantized, quantized

log = logging.getLogger(__name__)
BLOCK = 4096  # rows of a product, at least, which then stays in the cache with the queries
PRODUCTS = 1 << 18  # that fit into the cache: of few queries more rows, as threads wait for each other after each block
QUERIES = 1024  # of a product
BUFFER = 2048  # rows that a query may have in hand
FIRST = 64  # and that it takes before it lets go of some
FEWEST = 16  # queries of a product: products of fewer are no faster
STEP = 64  # queries that are looked at together
NO_WAY = 4.0  # a floor that no cosine reaches


@functools.cache
def are_exact() -> bool:
    """Whether this machine's products of 8-bit integers are: instructions of older processors saturate sums of two."""
    rng = np.random.default_rng(0)
    wide = [np.full((64, 512), 127, np.int8), np.full((64, 512), -127, np.int8), _signs(rng), _signs(rng)]
    rows = np.concatenate([*wide, rng.integers(-127, 128, (64, 512), dtype=np.int8)])
    try:
        found = torch._int_mm(torch.from_numpy(rows), torch.from_numpy(np.ascontiguousarray(rows[::5])).T).numpy()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        log.info("references are compared in float32: no products of 8-bit integers (%s)", error)
        return False
    right = bool((found == rows.astype(np.int64) @ rows[::5].astype(np.int64).T).all())
    if not right:
        log.info("references are compared in float32: products of 8-bit integers are not exact on this processor")
    return right


def _signs(rng: np.random.Generator) -> np.ndarray:
    return rng.choice(np.array([-127, 127], np.int8), (64, 512))


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
    state = _State(number, top, queries, 1 + float(rows.errors.max(initial=0)))
    filled = np.zeros((len(state.scales), rows.numbers.shape[1]), np.int8)
    filled[:number] = queries.numbers
    turned = torch.from_numpy(filled).T
    share = -(-len(state.scales) // (state.step * torch.get_num_threads())) * state.step
    shares = [(begin, min(begin + share, len(state.scales))) for begin in range(0, len(state.scales), share)]
    passing, size = Passing(rows.numbers), max(BLOCK, PRODUCTS // len(state.scales))
    with ThreadPoolExecutor(len(shares)) as threads:
        for start in range(0, len(rows.numbers), size):
            block = np.ascontiguousarray(rows.numbers[start : start + size])
            products = torch._int_mm(torch.from_numpy(block), turned).numpy()
            end = start + len(block)
            scan = partial(
                _scan, products, start, rows.scales[start:end], rows.errors[start:end], state.scales, state.margins,
                top, state.floors, state.lower, state.upper, state.rows, state.counts, state.limits, state.full,
            )  # fmt: skip
            if len(shares) == 1:  # handing it to a thread takes longer than the work
                scan(*shares[0])
            else:
                list(threads.map(lambda those, scan=scan: scan(*those), shares))
            passing.reached(end)
    return [state.those(one) for one in range(number)], state.full


class _State:
    """What each query has in hand: rows with a lower and an upper bound of their cosine, and the floor to get in."""

    def __init__(self, queries: int, top: int, quantized: Quantized, longest: float) -> None:
        self.top = top
        self.step = STEP if queries > FEWEST else FEWEST
        filled = -(-queries // self.step) * self.step
        self.scales, self.margins = np.zeros(filled, np.float32), np.zeros(filled, np.float32)
        self.scales[:queries] = quantized.scales
        self.margins[:queries] = quantized.errors * longest  # that |x'| is at most
        self.floors = np.full(filled, NO_WAY, np.float32)  # that of an upper bound less the margin
        self.floors[:queries] = -NO_WAY
        self.lower = np.empty((queries, BUFFER), np.float32)
        self.upper = np.empty((queries, BUFFER), np.float32)
        self.rows = np.empty((queries, BUFFER), np.int64)
        self.counts = np.zeros(queries, np.int64)
        self.limits = np.full(queries, min(self.top + FIRST, BUFFER))  # of counts, at which some are let go of
        self.full = np.zeros(queries, np.bool_)

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
    products,
    first,
    scales,
    errors,
    query_scales,
    margins,
    top,
    floors,
    lower,
    upper,
    rows,
    counts,
    limits,
    full,
    begin,
    stop,
):
    """Of a block, ``products`` int32 [B, Q], take the rows whose upper bound reaches the floor of a query.

    Only queries from ``begin`` to ``stop`` are looked at.
    """
    step = min(STEP, products.shape[1])
    for row in range(products.shape[0]):
        scale, error = scales[row], errors[row]
        for start in range(begin, stop, step):
            if not _any(products, row, start, step, scale, error, query_scales, floors):
                continue
            for one in range(step):
                query = start + one
                about = np.float32(products[row, query]) * (scale * query_scales[query])
                if about + error < floors[query]:
                    continue
                held = counts[query]
                if held == limits[query]:
                    held = _let_go(query, held, top, floors, margins, lower, upper, rows)
                    counts[query] = held
                    limits[query] = min(2 * held + FIRST, lower.shape[1])
                    if held == lower.shape[1]:
                        full[query] = True
                        floors[query] = np.float32(NO_WAY)
                        continue
                    if about + error < floors[query]:
                        continue
                lower[query, held] = about - error - margins[query]
                upper[query, held] = about + error + margins[query]
                rows[query, held] = first + row
                counts[query] = held + 1


@numba.njit(nogil=True, cache=True, fastmath=True)
def _any(products, row, first, number, scale, error, factors, floors):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether an upper bound reaches its floor: counted, not looked for, which is done for many at once.

    The compiler knows the length of the inner loop; slices of arrays would be counted references, a row at a time.
    """
    reach = 0
    for start in range(first, first + number, FEWEST):
        for one in range(FEWEST):
            query = np.uint64(start) + np.uint64(one)
            about = np.float32(products[row, query]) * (scale * factors[query])
            reach += about + error >= floors[query]
    return reach > 0


@numba.njit(nogil=True, cache=True)
def _let_go(query, held, top, floors, margins, lower, upper, rows):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Let go of the rows that cannot be among the ``top`` nearest any more; how many are left."""
    floor = np.partition(lower[query, :held], held - top)[held - top]
    kept = 0
    for one in range(held):
        if upper[query, one] >= floor:
            lower[query, kept] = lower[query, one]
            upper[query, kept] = upper[query, one]
            rows[query, kept] = rows[query, one]
            kept += 1
    floors[query] = floor - margins[query]
    return kept
