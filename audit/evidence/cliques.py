"""The paper's clustering, as the reference to compare with (FineXtract, arXiv 2410.03039, section 4.3).

Its cost is that of enumerating maximal cliques again after every removal, exponential in the worst case: hence the
time limit and the rising threshold.
"""

from __future__ import annotations

import time

import numpy as np

from audit.evidence.clusters import Cluster, describe_cluster


class _OutOfTime(Exception):
    pass


def greedy_cliques(
    vectors: np.ndarray, n0: int, limit: float = 30.0, give_up: float = float("inf")
) -> tuple[list[Cluster], float, bool]:
    """Cluster unit vectors [N, D] as the paper does: (clusters in the order found, threshold, timed out at least once).

    An edge joins two images whose cosine reaches the threshold; the largest clique is taken out again and again. The
    threshold starts at the 25th percentile of the similarities and rises by 0.01 until the search ends within
    ``limit`` seconds and gives at least ``n0`` cliques. After ``give_up`` seconds in all there are no clusters.
    """
    started = time.monotonic()
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, 0.0)
    threshold = np.floor(np.quantile(similarity, 0.25) * 100) / 100
    timed_out = False
    groups: list[list[int]] = []
    while threshold <= 1.0:
        if time.monotonic() - started > give_up:
            return [], float(threshold), True
        try:
            groups = _cliques_at(similarity, float(threshold), time.monotonic() + limit)
            if len(groups) >= n0:
                break
        except _OutOfTime:
            timed_out = True
        threshold += 0.01
    else:
        groups = [[row] for row in range(len(vectors))]
    return [describe_cluster(vectors, group) for group in groups], float(threshold), timed_out


def _cliques_at(similarity: np.ndarray, threshold: float, deadline: float) -> list[list[int]]:
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(similarity)))
    for row, partners in enumerate(similarity >= threshold):
        graph.add_edges_from((row, int(other)) for other in np.flatnonzero(partners[row + 1 :]) + row + 1)
        if time.monotonic() > deadline:
            raise _OutOfTime
    found: list[list[int]] = []
    while graph.number_of_nodes():
        largest: list[int] = []
        for clique in networkx.find_cliques(graph):
            if len(clique) > len(largest):
                largest = clique
            if time.monotonic() > deadline:
                raise _OutOfTime
        found.append(largest)
        graph.remove_nodes_from(largest)
    return found
