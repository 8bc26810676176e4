"""A cluster of generations and what is derived from it: representative, tightness, confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POWER = 12  # a cosine of 0.9 counts 0.28, 0.7 counts 0.014: near copies say much, resemblance nothing
CONFIDENCE_COPIES = 4


@dataclass(frozen=True)
class Cluster:
    """``members`` and ``representative`` are row numbers of the descriptor matrix.

    ``tightness`` is the mean cosine of all pairs (1 for a single image). ``confidence``, 0 to 1, is d / (d + 4) with
    d the number of near copies of the representative among the members: the sum of their cosines to the power 12.
    Many near-identical images say more than two, and two more than a loose crowd; a single image says nothing.
    """

    members: tuple[int, ...]
    representative: int
    tightness: float
    confidence: float


def describe_cluster(
    vectors: np.ndarray, members: Sequence[int] | np.ndarray, representative: int | None = None
) -> Cluster:
    """The cluster of ``members``; its representative, unless given, is the image nearest to the mean descriptor."""
    rows = np.sort(np.asarray(members))
    size = len(rows)
    total = vectors[rows].sum(axis=0, dtype=np.float64)
    if representative is None:
        representative = int(rows[np.argmax(vectors[rows] @ total)])
    # the sum of all pairwise cosines is |sum of the unit vectors|^2 minus the diagonal: no n x n matrix is needed
    tightness = 1.0 if size == 1 else float((total @ total - size) / (size * (size - 1)))
    others = rows[rows != representative]
    copies = float(nearness(vectors[others] @ vectors[representative]).sum())
    return Cluster(tuple(int(row) for row in rows), representative, tightness, copies / (copies + CONFIDENCE_COPIES))


def nearness(cosines: np.ndarray) -> np.ndarray:
    """How much of a near copy an image is, 0 to 1, elementwise: its cosine to the power 12, nothing where negative."""
    fourth = np.square(np.square(np.clip(cosines, 0, 1)))
    return fourth * np.square(fourth)
