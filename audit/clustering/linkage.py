"""The default clustering: complete linkage, O(N^2), no time limit, no need to know N0."""

from __future__ import annotations

import numpy as np

from audit.clustering.clusters import Cluster, ranked


def complete_linkage(vectors: np.ndarray, n0: int | None) -> list[Cluster]:
    """Cluster unit vectors [N, D]; the surest cluster first."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(vectors) == 1:
        return ranked(vectors, [[0]])
    distance = np.clip(1 - vectors @ vectors.T, 0, 2)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="complete")
    labels = fcluster(tree, n0, "maxclust") if n0 else fcluster(tree, 0.5, "distance")
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return ranked(vectors, groups)
