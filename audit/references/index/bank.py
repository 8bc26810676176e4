"""The references of one set and descriptor as arrays, and the searches over them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from audit.descriptors.pdq import MIN_QUALITY
from audit.errors import ReferenceSetError
from audit.references.index.hashes import Parts, packed, within
from audit.references.index.quantized import Passing, Quantized

UNKNOWN = -1  # the side of a picture, or the quality of a hash, that nothing is known of
PAIRS = 1 << 22  # products in hand at once
ROUNDING = 1e-5  # more than a product of unit vectors in float32 is wrong by
COMPILED = importlib.util.find_spec("numba") is not None


@dataclass(frozen=True)
class Near:
    """Pairs of a query and a row, int64 [P] each, and their cosines ``similarity``, float64 [P]."""

    query: np.ndarray
    row: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class Bank:
    """N references: ``ids``; unit ``vectors`` float32 [N, D]; ``hashes`` uint64 [N, 4] and their ``quality`` int16 [N],
    -1 where there is none; ``side``, the smaller one of each picture, int32 [N], -1 where it is not known.

    ``quantized`` and ``parts``, which is of the hashes that say something, are what makes searches fast.
    """

    ids: pa.Array
    vectors: np.ndarray
    hashes: np.ndarray
    quality: np.ndarray
    side: np.ndarray
    quantized: Quantized | None = None
    parts: Parts | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def hashed(self) -> np.ndarray:
        """The rows whose hash says something, int64."""
        return np.flatnonzero(self.quality >= MIN_QUALITY)

    @cached_property
    def _telling(self) -> np.ndarray:
        return self.hashes if len(self.hashed) == len(self) else self.hashes[self.hashed]

    def nearest(self, queries: np.ndarray, top: int) -> Near:
        """The ``top`` rows of the highest cosine to each of ``queries``, float32 [Q, D]; of equal ones the first ids.

        Raises ReferenceSetError where the queries are of another width, or one of them is no direction.
        """
        if len(self) and queries.shape[1] != self.vectors.shape[1]:
            raise ReferenceSetError(
                f"vectors of {queries.shape[1]} numbers cannot be compared with references of {self.vectors.shape[1]}"
            )
        unit = unit_vectors(queries, [f"query {number}" for number in range(len(queries))])
        found = [self._judged(number, rows, unit[number], top) for number, rows in self._candidates(unit, top)]
        if not found:
            return Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        return Near(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def within(self, hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query, row, distance), int64 [P] each, of every row whose hash is within ``distance`` of one of ``hashes``,
        uint8 [Q, 32]. Hashes of pictures with too little in them are no rows.
        """
        query, place, bits = within(self._telling, self.parts, packed(hashes), distance)
        return query, self.hashed[place], bits

    def best(self, queries: np.ndarray) -> np.ndarray:
        """Of every row the highest cosine to one of ``queries``, unit float32 [Q, D]: float32 [N]; NaN without any."""
        found = np.full(len(self), np.nan, np.float32)
        block = max(PAIRS // max(len(queries), 1), 1)
        passing = Passing(self.vectors)
        for start in range(0, len(self) if len(queries) else 0, block):
            found[start : start + block] = (self.vectors[start : start + block] @ queries.T).max(axis=1)
            passing.reached(start)
        return found

    def has_near(self, queries: np.ndarray, threshold: float) -> np.ndarray:
        """Which of ``queries``, float32 [Q, D], have a row at ``threshold`` or nearer: booleans [Q]."""
        found = np.zeros(len(queries), bool)
        if len(queries) and len(self):
            near = self.nearest(queries, 1)
            found[near.query[near.similarity >= threshold]] = True
        return found

    def cosines(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of unit ``query`` float32 [D] to ``rows``, float64."""
        return np.clip(self.vectors[rows].astype(np.float64) @ query.astype(np.float64), -1, 1)

    def _candidates(self, unit: np.ndarray, top: int) -> Iterator[tuple[int, np.ndarray]]:
        """Of each query the rows that can be among its nearest."""
        left = np.arange(len(unit))
        if self.quantized is not None and COMPILED:
            from audit.references.index import products

            if products.are_exact():
                rows_of, full = products.can_be_nearest(self.quantized, unit, top)
                yield from ((number, rows_of[number]) for number in np.flatnonzero(~full).tolist())
                left = np.flatnonzero(full)
        for start in range(0, len(left), 256):
            mine = left[start : start + 256]
            yield from zip(mine.tolist(), self._by_products(unit[mine], top), strict=True)

    def _by_products(self, unit: np.ndarray, top: int) -> list[np.ndarray]:
        """The same in float32: rows whose product is not below the ``top``-th highest."""
        held = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in unit]
        floors = np.full(len(unit), -np.inf, np.float32)
        block, passing = max(PAIRS // max(len(unit), 1), 1), Passing(self.vectors)
        for start in range(0, len(self), block):
            passing.reached(start)
            products = unit @ self.vectors[start : start + block].T
            for number in np.flatnonzero(products.max(axis=1) >= floors):
                fresh = np.flatnonzero(products[number] >= floors[number])
                rows = np.concatenate([held[number][0], fresh + start])
                values = np.concatenate([held[number][1], products[number, fresh]])
                if len(rows) > top:
                    floors[number] = np.partition(values, len(values) - top)[len(values) - top] - ROUNDING
                    kept = values >= floors[number]
                    rows, values = rows[kept], values[kept]
                held[number] = rows, values
        return [rows for rows, _ in held]

    def _judged(
        self, number: int, rows: np.ndarray, query: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        similarity = self.cosines(query, rows)
        if len(rows) > top:
            floor = np.partition(similarity, len(rows) - top)[len(rows) - top]
            rows, similarity = rows[similarity >= floor], similarity[similarity >= floor]
        ids = np.array(self.ids.take(pa.array(rows)).to_pylist(), object)
        order = np.lexsort((ids, -similarity))[:top]
        return np.full(len(order), number), rows[order], similarity[order]


def unit_vectors(vectors: np.ndarray, labels: list[str]) -> np.ndarray:
    """``vectors`` [N, D] at length one, float32. Raises ReferenceSetError for one that is no direction, by
    its label.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 1e-6)))
    if len(wrong):
        what = "not finite" if not np.isfinite(lengths[wrong[0]]) else "zero"
        raise ReferenceSetError(f"the vector of {labels[wrong[0]]} is {what}: it is near to nothing; leave it out")
    return (vectors / lengths[:, None]).astype(np.float32)
