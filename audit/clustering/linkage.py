"""The default clustering: complete linkage, O(N^2), no time limit, no need to know N0.

A cluster cut at similarity s has no pair below s: it is a clique of the paper's graph at threshold s. With N0 known,
the tree is cut into N0 clusters, as many as there are images to find. Without, the cut is read off the images: the one
with the largest sum of size^1.5 * tightness over clusters. Merging two tight clusters that differ halves the tightness
and lowers the sum; splitting a tight one loses size and lowers it too.
"""

from __future__ import annotations

import numpy as np

from audit.clustering.clusters import Cluster, ranked

CUTS = np.arange(0.20, 0.96, 0.025)
MIN_CONFIDENCE = 0.25  # below it a cluster is not offered when N0 is not known


def complete_linkage(vectors: np.ndarray, n0: int | None) -> list[Cluster]:
    """Cluster unit vectors [N, D]; the surest cluster first.

    With ``n0`` known, that many (fewer where there are fewer images); else every cluster of some confidence, at least
    one.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    if len(vectors) == 1:
        return ranked(vectors, [[0]])
    tree = linkage(pdist(vectors.astype(np.float64), "cosine").clip(0, 2), method="complete")
    if n0 is not None:
        return ranked(vectors, _groups(fcluster(tree, n0, "maxclust")))
    cuts = (fcluster(tree, 1 - cut, "distance") for cut in CUTS)
    clusters = ranked(vectors, _groups(max(cuts, key=lambda labels: _worth(vectors, labels))))
    return [cluster for cluster in clusters if cluster.confidence >= MIN_CONFIDENCE] or clusters[:1]


def _worth(vectors: np.ndarray, labels: np.ndarray) -> float:
    """The sum of size^1.5 * tightness over clusters of several images, from the sums of their vectors."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sizes = np.diff(starts, append=len(labels))
    sums = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
    tightness = ((sums**2).sum(axis=1) - sizes) / np.maximum(sizes * (sizes - 1), 1)
    return float((tightness.clip(0, 1) * sizes**1.5)[sizes > 1].sum())


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
