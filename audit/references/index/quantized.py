"""Unit vectors in 8-bit integers, with the error that each has."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

LET_GO = 64 << 20  # bytes of a mapped file that were read, before they are let go of


@dataclass(frozen=True)
class Quantized:
    """Unit vectors as ``numbers`` int8 [N, D], ``scales`` float32 [N], and ``errors`` float32 [N], rounded up."""

    numbers: np.ndarray
    scales: np.ndarray
    errors: np.ndarray


class Passing:
    """Of an array that is read once from its beginning to its end, what is behind does not count as memory in use.

    Pages of a mapped file stay in the system's cache and are there at once when they are read again; of other arrays
    nothing is let go of.
    """

    def __init__(self, array: np.ndarray) -> None:
        mapped = getattr(array, "_mmap", None) if isinstance(array, np.memmap) and array.offset == 0 else None
        able = isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and hasattr(mapped, "madvise")
        self._mapped: Any = mapped if able else None
        self._row = array.strides[0] if array.ndim else 0
        self._behind = 0

    def reached(self, row: int) -> None:
        """Rows below ``row`` were read."""
        whole = row * self._row // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        if self._mapped is not None and whole - self._behind >= LET_GO:
            self._mapped.madvise(mmap.MADV_DONTNEED, self._behind, whole - self._behind)
            self._behind = whole


def quantized(vectors: np.ndarray) -> Quantized:
    """Unit vectors, float32 [N, D], in 8-bit integers."""
    scales = (np.abs(vectors).max(axis=1) / 127).astype(np.float32)
    numbers = np.rint(vectors / scales[:, None]).astype(np.int8)
    errors = np.linalg.norm(vectors - numbers * scales[:, None], axis=1)
    return Quantized(numbers, scales, (errors * 1.0001 + 1e-6).astype(np.float32))
