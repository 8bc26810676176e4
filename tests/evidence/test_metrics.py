"""AS and A-ESR by hand."""

from __future__ import annotations

import numpy as np
import pytest

from audit.evidence import rank_score, score


def unit(*angles: float) -> np.ndarray:
    return np.array([[np.cos(a), np.sin(a)] for a in np.radians(angles)])


def test_scores_take_the_best_extraction_of_each_known_picture() -> None:
    known, extractions = unit(0, 90, 180), unit(10, 50)
    found = score(extractions, known)
    best = [np.cos(np.radians(10)), np.cos(np.radians(40)), np.cos(np.radians(130))]
    assert found.images == 3
    assert found.average_similarity == pytest.approx(np.mean(best))
    assert found.extraction_rate_07 == pytest.approx(2 / 3)
    assert found.extraction_rate_06 == pytest.approx(2 / 3)


def test_success_is_strictly_above_the_threshold() -> None:
    known = np.array([[1.0, 0.0]])
    exact = np.array([[0.7, np.sqrt(1 - 0.49)]])
    assert score(exact, known).extraction_rate_07 == 0
    assert score(exact, known).extraction_rate_06 == 1


def test_no_extractions_score_nothing_and_no_known_pictures_are_an_error() -> None:
    assert score(np.empty((0, 2)), unit(0)).average_similarity == 0
    with pytest.raises(ValueError, match="no known pictures"):
        score(unit(0), np.empty((0, 2)))


def test_the_order_counts_in_the_area_and_repeats_do_not() -> None:
    known = unit(0, 90)
    right, again, wrong, other = 5, -5, 45, 85
    best = rank_score(unit(right, other), known)
    assert best.precision_at_n0 == best.average_precision == 1
    late = rank_score(unit(160, right, again, other), known)
    assert late.precision_at_n0 == pytest.approx(0.5)
    assert late.average_precision == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert rank_score(unit(right), known).precision_at_n0 == pytest.approx(0.5)
    assert rank_score(unit(wrong + 180), known).average_precision < 0.5
    assert rank_score(np.empty((0, 2)), known).average_precision == 0
    with pytest.raises(ValueError, match="no known pictures"):
        rank_score(known, np.empty((0, 2)))
