"""The default clustering: the densest image first, then the densest of what is left, and so on.

The density of an image is the number of its near copies among the images not yet taken (each counts with its cosine
to the power 12). A peak takes along all images within ``reach`` of it. So the peaks come in the order of their
density, whatever N0 is; those of some confidence are the extractions, and at least N0 where it is known. It needs
O(N^2) time in matrix products and O(N) memory, and has no time limit. A mode-seeking relative of density peaks
(Rodriguez & Laio 2014) with hard suppression of neighbours.
"""

from __future__ import annotations

import numpy as np

from audit.evidence.clusters import Cluster, describe_cluster, nearness

MIN_CONFIDENCE = 0.05  # below it a peak is not offered, unless there are fewer than N0
BLOCK = 2048


def density_peaks(vectors: np.ndarray, n0: int | None, reach: float) -> list[Cluster]:
    """Cluster unit vectors [N, D]; the surest cluster first.

    ``reach`` is the cosine to a peak from which images belong to it: the cosine from which two images match. There
    are as many clusters as have some confidence, and at least ``n0`` where it is known, else one (fewer where the
    images do not suffice).
    """
    density = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), BLOCK):
        block = nearness(vectors[start : start + BLOCK] @ vectors.T)
        density[start : start + BLOCK] = block.sum(axis=1)
    free = np.ones(len(vectors), bool)
    clusters: list[Cluster] = []
    while free.any():
        # lone images are all of one density but for rounding, which differs by processor: the first of them is next
        peak = int(np.where(free, density.round(4), -np.inf).argmax())
        members = np.flatnonzero(free & (vectors @ vectors[peak] >= reach))
        members = np.union1d(members, [peak])  # rounding may put an image's cosine with itself below a reach of 1
        cluster = describe_cluster(vectors, members, peak)
        if len(clusters) >= (n0 or 1) and cluster.confidence < MIN_CONFIDENCE:
            break
        clusters.append(cluster)
        free[members] = False
        for start in range(0, len(members), BLOCK):
            density -= nearness(vectors @ vectors[members[start : start + BLOCK]].T).sum(axis=1)
    return sorted(clusters, key=lambda cluster: -cluster.confidence)
