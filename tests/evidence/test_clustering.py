"""Both clusterings on planted groups, their ranking, and what cannot stop them."""

from __future__ import annotations

import numpy as np
import pytest

from audit.evidence import density_peaks, greedy_cliques
from audit.evidence.clusters import describe_cluster, nearness
from audit.evidence.peaks import MIN_CONFIDENCE

REACH = 0.6


def planted(
    sizes: list[int], spread: list[float], noise: int = 0, seed: int = 0, dims: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random centres, then ``noise`` lone ones; and each one's group (-1 for noise)."""
    rng = np.random.default_rng(seed)
    rows = []
    for size, width in zip(sizes, spread, strict=True):
        centre = rng.normal(size=dims)
        centre /= np.linalg.norm(centre)
        rows.append(centre + width * rng.normal(size=(size, dims)) / np.sqrt(dims))
    rows.append(rng.normal(size=(noise, dims)))
    vectors = np.concatenate(rows)
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(noise, -1)])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize(("n0", "noise"), [(4, 0), (None, 0), (None, 30)])
def test_planted_groups_come_first_and_whole(n0: int | None, noise: int) -> None:
    vectors, labels = planted([20, 15, 10, 8], [0.3, 0.3, 0.3, 0.3], noise=noise)
    clusters = density_peaks(vectors, n0, REACH)[:4]
    assert [set(labels[list(c.members)]) for c in clusters] == [{0}, {1}, {2}, {3}]
    assert [len(c.members) for c in clusters] == [20, 15, 10, 8]


def test_the_papers_cliques_part_all_images_and_hold_their_threshold() -> None:
    vectors, _ = planted([12, 10, 8], [0.2, 0.2, 0.2], noise=4)
    cliques, threshold, timed_out = greedy_cliques(vectors, 5)
    assert not timed_out
    assert len(cliques) >= 5
    assert sorted(row for clique in cliques for row in clique.members) == list(range(34))
    similarity = vectors @ vectors.T
    for clique in cliques:
        assert similarity[np.ix_(clique.members, clique.members)].min() >= threshold - 1e-6
    sizes = [len(clique.members) for clique in cliques]
    assert sizes == sorted(sizes, reverse=True)


def test_the_papers_threshold_rises_when_the_search_takes_too_long() -> None:
    vectors, _ = planted([60] * 4, [1.2] * 4, seed=2)
    cliques, threshold, timed_out = greedy_cliques(vectors, 4, limit=0.05)
    assert timed_out
    assert len(cliques) >= 4
    assert threshold > 0.1


def test_the_representative_is_the_image_nearest_to_the_mean() -> None:
    vectors, _ = planted([9], [0.5])
    cluster = describe_cluster(vectors, range(9))
    mean = vectors.mean(0)
    assert cluster.representative == int(np.argmin(np.linalg.norm(vectors - mean, axis=1)))


def test_tightness_is_the_mean_of_all_pairs() -> None:
    vectors, _ = planted([7], [0.5])
    pairs = (vectors @ vectors.T)[np.triu_indices(7, 1)]
    assert describe_cluster(vectors, range(7)).tightness == pytest.approx(pairs.mean(), abs=1e-5)


def test_larger_and_tighter_clusters_are_surer() -> None:
    vectors, labels = planted([20, 20, 5], [0.2, 1.0, 0.2], noise=1)
    whole, loose, small, lone = (describe_cluster(vectors, np.flatnonzero(labels == g)) for g in (0, 1, 2, -1))
    assert 1 > whole.confidence > small.confidence > loose.confidence > lone.confidence == 0


def test_confidence_counts_near_copies_of_the_representative() -> None:
    vectors, _ = planted([6], [0.4])
    cluster = describe_cluster(vectors, range(6), representative=2)
    copies = sum(float(vectors[row] @ vectors[2]) ** 12 for row in range(6) if row != 2)
    assert cluster.confidence == pytest.approx(copies / (copies + 4), rel=1e-4)
    assert nearness(np.array([-0.5, 0.7, 1.0])) == pytest.approx([0, 0.7**12, 1])


def test_peaks_come_by_falling_density_and_no_two_are_within_reach() -> None:
    vectors, _ = planted([40, 30, 20, 10], [1.0, 0.8, 0.6, 0.4], noise=60, seed=5)
    clusters = density_peaks(vectors, 12, REACH)
    assert len(clusters) == 12
    assert all(c.confidence < MIN_CONFIDENCE for c in clusters[4:])
    assert len(density_peaks(vectors, None, REACH)) <= 4
    assert [c.confidence for c in clusters] == sorted((c.confidence for c in clusters), reverse=True)
    peaks = vectors[[c.representative for c in clusters]]
    assert (peaks @ peaks.T - np.eye(12)).max() < REACH
    taken = [row for c in clusters for row in c.members]
    assert len(taken) == len(set(taken))
    for cluster in clusters:
        assert (vectors[list(cluster.members)] @ vectors[cluster.representative]).min() >= REACH - 1e-6


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = planted([30, 20], [0.5, 0.5], noise=20)
    whole = density_peaks(vectors, 5, REACH)
    monkeypatch.setattr("audit.evidence.peaks.BLOCK", 7)
    assert [c.members for c in density_peaks(vectors, 5, REACH)] == [c.members for c in whole]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_images_can_be_clustered(count: int) -> None:
    vectors, _ = planted([count], [0.3])
    for n0 in (None, 10):
        assert density_peaks(vectors, n0, REACH)
    assert greedy_cliques(vectors, 10)[0]


def test_identical_images_are_one_cluster() -> None:
    vectors = np.repeat(planted([1], [0.0])[0], 6, axis=0)
    first = density_peaks(vectors, None, REACH)[0]
    assert len(first.members) == 6
    assert first.tightness == pytest.approx(1, abs=1e-5)
