"""P-values: what they say of pictures that nothing was trained on is true, whatever scores are distributed as."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from audit.evidence.chance import (
    BEYOND,
    FEWEST,
    agreed_p,
    either_p,
    expected_by_chance,
    false_discovery_rates,
    rank_p,
    set_p,
    standing_out,
    tail_p,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),  # a tail that ends
    "cosines": lambda rng, n: rng.beta(4, 6, size=n),
    "heavy": lambda rng, n: rng.standard_t(3, size=n),
    "skewed": lambda rng, n: rng.lognormal(size=n),
}


def nulls(draw: Draw, decoys: int, rounds: int, each: int = 10) -> np.ndarray:
    """p-values of references that are decoys themselves, each round against decoys of its own."""
    rng = np.random.default_rng(7)
    return np.concatenate([tail_p(draw(rng, each), draw(rng, decoys)) for _ in range(rounds)])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("decoys", [FEWEST, 200])
def test_small_p_are_as_rare_as_they_say(name: str, decoys: int) -> None:
    found = nulls(KINDS[name], decoys, 400)
    for level in (0.05, 0.01, 0.001):
        most = stats.binom.ppf(0.999, len(found), level)  # 400 rounds share their decoys with 10 references each
        assert (found <= level).sum() <= 1.25 * most + 1, level
    assert (found <= 0.05).mean() > 0.03  # and not much rarer


def test_the_rank_is_exact() -> None:
    decoys = np.arange(19.0)
    assert rank_p(np.array([18.5, 18.0, 17.5, -1.0]), decoys) == pytest.approx([1 / 20, 2 / 20, 2 / 20, 1.0])
    assert rank_p(np.array([np.nan, np.inf, -np.inf]), decoys).tolist() == [1.0, 1.0, 1.0]
    assert rank_p(np.array([5.0]), np.array([np.nan] * 19)).tolist() == [1.0]
    with pytest.raises(ValueError, match="no decoys"):
        rank_p(np.array([1.0]), np.empty(0))


def test_the_tail_tells_far_from_farther_and_stays_bounded() -> None:
    decoys = np.random.default_rng(1).normal(size=300)
    near, far, farthest = tail_p(np.array([3.5, 4.5, 400.0]), decoys)
    assert 1 / 301 > near > far >= farthest == pytest.approx(1 / 301 / BEYOND)
    assert (rank_p(np.array([3.0, 4.0]), decoys) >= 1 / 301).all()
    some = np.linspace(decoys.min(), decoys.max() + 2, 500)
    assert (np.diff(tail_p(some, decoys)) <= 1e-12).all()  # more never makes less likely to be trained on


@pytest.mark.parametrize("decoys", [np.zeros(300), np.r_[np.zeros(299), 1.0], np.r_[np.linspace(0, 1, 299), np.nan]])
def test_where_no_tail_fits_the_rank_is_all(decoys: np.ndarray) -> None:
    scores = np.array([2.0, 0.5, np.nan])
    assert tail_p(scores, decoys).tolist() == rank_p(scores, decoys).tolist()


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.99, -0.9])
@pytest.mark.parametrize("combined", [agreed_p, either_p])
def test_combined_evidence_holds_under_dependence(combined: Callable[..., float], correlation: float) -> None:
    rng = np.random.default_rng(3)
    both = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 20_000)
    found = np.array([combined(pair) for pair in stats.norm.sf(both)])
    for level in (0.05, 0.01, 0.001):
        assert (found <= level).mean() <= level + 3 * (level / len(found)) ** 0.5


def test_all_kinds_of_evidence_have_to_speak_for_a_match_and_one_for_a_second_look() -> None:
    assert agreed_p([0.001, 0.3]) == 0.3
    assert either_p([0.001, 0.3]) == 0.002
    assert agreed_p([0.02]) == 0.02
    assert either_p([0.02]) == 0.04  # which of the two there is may depend on what was found
    assert either_p([0.7, 0.9]) == 1


def test_of_what_is_called_found_at_most_the_rate_is_wrong() -> None:
    rng = np.random.default_rng(5)
    wrong = []
    for _ in range(300):
        null, true = rng.uniform(size=80), rng.beta(0.1, 20, size=20)
        called = false_discovery_rates(np.r_[null, true]) <= 0.05
        wrong.append(called[:80].sum() / max(1, called.sum()))
    assert 0.01 < np.mean(wrong) <= 0.05
    assert false_discovery_rates(np.empty(0)).shape == (0,)
    assert false_discovery_rates(np.array([0.04, 0.3, 0.3])).tolist() == [pytest.approx(0.12), 1.0, 1.0]
    assert false_discovery_rates(np.array([0.01]), 3).tolist() == [pytest.approx(0.04)]
    assert expected_by_chance(np.array([0.01, 0.5])).tolist() == [0.02, 1.0]
    assert expected_by_chance(np.array([0.01]), 3).tolist() == [0.04]


def test_a_set_that_had_a_part_is_told_from_one_that_had_none() -> None:
    rng = np.random.default_rng(2)
    nothing = np.array([set_p(rng.normal(size=10), rng.normal(size=40)) for _ in range(2000)])
    assert 0.03 < (nothing <= 0.05).mean() <= 0.065
    assert np.mean([set_p(rng.normal(1.5, 1, 10), rng.normal(size=40)) <= 0.01 for _ in range(300)]) > 0.9
    assert set_p(np.array([np.nan, 3.0, 4.0]), np.arange(2.0)) == set_p(np.array([3.0, 4.0]), np.arange(2.0))
    with pytest.raises(ValueError, match="finite"):
        set_p(np.array([np.nan]), np.arange(3.0))


def test_decoys_that_were_trained_on_stand_out_and_others_seldom_do() -> None:
    rng = np.random.default_rng(6)
    clean = [standing_out(rng.normal(0, 0.1, 40)).any() for _ in range(400)]
    assert np.mean(clean) <= 0.06
    found = standing_out(np.r_[rng.normal(0, 0.1, 40), 0.9, 0.8, np.nan])
    assert np.flatnonzero(found).tolist() == [40, 41]
    many = standing_out(np.r_[rng.normal(0, 0.1, 40), np.full(8, 0.9)])
    assert many[40:].all()  # they do not hide each other
    assert not standing_out(np.r_[np.zeros(10), 9.0]).any()
    assert not standing_out(np.zeros(40)).any()
