"""Unit vectors in 8-bit integers, with the error that each has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quantized:
    """Unit vectors as ``numbers`` int8 [N, D], ``scales`` float32 [N], and ``errors`` float32 [N], rounded up."""

    numbers: np.ndarray
    scales: np.ndarray
    errors: np.ndarray


def quantized(vectors: np.ndarray) -> Quantized:
    """Unit vectors, float32 [N, D], in 8-bit integers."""
    scales = (np.abs(vectors).max(axis=1) / 127).astype(np.float32)
    numbers = np.rint(vectors / scales[:, None]).astype(np.int8)
    errors = np.linalg.norm(vectors - numbers * scales[:, None], axis=1)
    return Quantized(numbers, scales, (errors * 1.0001 + 1e-6).astype(np.float32))
