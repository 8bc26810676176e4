"""The benchmark of verdicts: what it counts, and what it fails at."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.evidence import GROUPS, P_VALUES, RULES, failing, markdown, share, tpr_at


def row(**said: Any) -> dict[str, Any]:
    plain = {
        "checkpoint": "a", "kind": "testbed", "holdout": False, "trained": 10, "unseen": 5, "near": 2, "decoys": 25,
        "uncalibrated": [], "set_p": {"trained": 0.001, "unseen": 0.5},
    }  # fmt: skip
    nothing = {"trained": [0.01] * 10, "unseen": [0.03, 0.5, 0.7, 0.8, 0.9], "near": [0.4, 0.6]}
    counts = {f"{rule}_{part}": 0 for rule in RULES for part in GROUPS}
    return plain | counts | dict.fromkeys(P_VALUES, nothing) | said


def test_tables_tell_what_each_rule_found_and_what_was_wrong() -> None:
    rows = [row(fixed_trained=6, fixed_unseen=1, fixed_near=1, combined_trained=4), row(holdout=True)]
    said = markdown(rows)
    assert "| tuning | testbed | 1 | fixed | 0.60 (0.26 to 0.88) | 1 of 5 | 1 of 2 | 0.25 (0.03 to 0.65) |  |" in said
    assert "| tuning | testbed | 1 | combined | 0.40 (0.12 to 0.74) | 0 of 5 | 0 of 2 | 0.00 (0.00 to 0.60) |" in said
    assert "| holdout | testbed | 0 | 1.00 (0.03 to 1.00) | 0.00 (0.00 to 0.97) |  |" in said
    assert share(0, 0) == ""


def test_references_without_a_p_count_for_the_thresholds_alone() -> None:
    nothing: dict[str, Any] = {key: {part: [] for part in GROUPS} for key in P_VALUES}
    said = markdown([row(fixed_trained=6, uncalibrated=["18 decoys are too few"], set_p={}, **nothing)])
    assert "| tuning | testbed | 1 | fixed | 0.60" in said
    assert "| tuning | testbed | 0 | combined |  | 0 of 0 | 0 of 0 |  |  |" in said
    assert "| tuning | testbed | 1 |  |  |  |" in said


def test_only_a_random_split_says_how_nulls_are_distributed() -> None:
    assert "p by combined" not in markdown([row()])
    assert "p by combined: of 5 unseen pictures 0.20 (0.01 to 0.72) below 0.05" in markdown([row(kind="80 exposures")])


def test_a_share_of_the_trained_is_below_nearly_all_others() -> None:
    others = np.linspace(0.005, 1, 200)
    assert tpr_at(np.array([0.001, 0.012, 0.02]), others, 0.01) == 2 / 3  # the third smallest is 0.015
    assert np.isnan(tpr_at(np.array([]), others, 0.01))


def test_it_fails_where_more_is_wrong_than_the_rate_allows() -> None:
    assert failing([row(combined_trained=19, combined_unseen=1)]) is None
    assert "3 of 10 matches are wrong" in (failing([row(combined_trained=7, combined_near=3)]) or "")
    accused = row(set_p={"trained": 0.001, "unseen": 0.001})
    assert "unseen sets are called a part: a" in (failing([accused]) or "")
    assert failing([row(set_p={"unseen": 0.009}), *[row()] * 20]) is None
    assert "1 of 1 sets that strong fine-tunes" in (failing([row(set_p={"trained": 0.2})]) or "")
