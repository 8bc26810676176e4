"""N0 by capture and recapture, against worlds whose N0 is known."""

from __future__ import annotations

import numpy as np
import pytest

from audit.recovery.counts import estimate_count


def drawn(n0: int, images: int, seed: int, weights: np.ndarray | None = None) -> list[list[int]]:
    """The members of each training image's group, where every sampled image is a copy of one."""
    which = np.random.default_rng(seed).choice(n0, size=images, p=weights)
    return [np.flatnonzero(which == number).tolist() for number in range(n0)]


def test_chapman_s_estimate_is_that_of_its_formula() -> None:
    again = [[20 + n, 22 + n, 21 + n, 23 + n] for n in (0, 10)]  # seen in both
    groups = [[0, 2, 1, 3], [4, 6], [5, 7], [12], *again]  # both, first, second, neither
    found = estimate_count(groups)
    assert found is not None
    assert (found.first, found.second, found.both) == (4, 4, 3)
    assert found.count == pytest.approx(5 * 5 / 4 - 1)
    assert found.low <= found.count <= found.high


def test_the_interval_holds_n0_where_all_images_come_out_alike() -> None:
    held = 0
    for seed in range(40):
        found = estimate_count(drawn(20, 120, seed))
        assert found is not None
        held += found.low <= 20 <= found.high
    assert held >= 32


def test_a_complete_set_has_no_more_than_was_seen() -> None:
    found = estimate_count(drawn(5, 200, 0))
    assert found is not None
    assert (found.count, found.low, found.high) == (5, 5, 5)


@pytest.mark.parametrize("groups", [[], [[0], [1]], [[0, 2], [1, 3]], [[0, 1, 2, 3], [4, 5, 6, 7]]])
def test_nothing_is_said_where_hardly_a_group_is_in_both_halves(groups: list[list[int]]) -> None:
    assert estimate_count(groups) is None
