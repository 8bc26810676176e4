"""A cluster of generations and what is derived from it: representative, tightness, confidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE_SIZE = 4


@dataclass(frozen=True)
class Cluster:
    """``members`` and ``representative`` are row numbers of the descriptor matrix.

    ``tightness`` is the mean cosine of all pairs (1 for a single image). ``confidence``, 0 to 1, is
    tightness * size / (size + 4): many near-identical images say more than two, and two more than a loose crowd.
    """

    members: tuple[int, ...]
    representative: int
    tightness: float
    confidence: float


def confidence_of(size: np.ndarray, tightness: np.ndarray) -> np.ndarray:
    """0 to 1, elementwise: tightness * size / (size + 4); 0 for single images."""
    return np.where(size > 1, np.clip(tightness, 0, 1) * size / (size + CONFIDENCE_SIZE), 0.0)


def describe_cluster(vectors: np.ndarray, members: Sequence[int] | np.ndarray) -> Cluster:
    """The cluster of ``members``; its representative is the image nearest to the mean descriptor (the medoid)."""
    rows = np.sort(np.asarray(members))
    size = len(rows)
    total = vectors[rows].sum(axis=0, dtype=np.float64)
    representative = int(rows[np.argmax(vectors[rows] @ total)])
    # the sum of all pairwise cosines is |sum of the unit vectors|^2 minus the diagonal: no n x n matrix is needed
    tightness = 1.0 if size == 1 else float((total @ total - size) / (size * (size - 1)))
    confidence = float(confidence_of(np.array(size), np.array(tightness)))
    return Cluster(tuple(int(row) for row in rows), representative, tightness, confidence)


def ranked(vectors: np.ndarray, groups: Iterable[Sequence[int] | np.ndarray]) -> list[Cluster]:
    """The clusters of ``groups``, the surest first; ties by size, then by the first member."""
    clusters = [describe_cluster(vectors, group) for group in groups]
    return sorted(clusters, key=lambda c: (-c.confidence, -len(c.members), c.members[0]))
