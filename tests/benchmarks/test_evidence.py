"""The benchmark of verdicts: what it counts, and what it fails at."""

from __future__ import annotations

from typing import Any

from benchmarks.evidence import RULES, failing, markdown, share


def row(**said: Any) -> dict[str, Any]:
    plain = {
        "checkpoint": "a", "kind": "testbed", "holdout": False, "trained": 10, "unseen": 5, "decoys": 25,
        "uncalibrated": [], "set_p": 0.001, "unseen_set_p": 0.5, "null_p": [0.03, 0.5, 0.7, 0.9],
    }  # fmt: skip
    counts = {f"{rule}_{part}": 0 for rule in RULES for part in ("right", "wrong")}
    return plain | counts | said


def test_tables_tell_what_each_rule_found_and_what_was_wrong() -> None:
    rows = [row(fixed_right=6, fixed_wrong=2, combined_right=4), row(holdout=True, set_p=0.2), row(set_p=None)]
    said = markdown(rows)
    assert "| tuning | testbed | 2 | fixed | 0.30 (0.12 to 0.54) | 2 | 0.25 (0.03 to 0.65) |" in said
    assert "| tuning | testbed | 2 | combined | 0.20 (0.06 to 0.44) | 0 | 0.00 (0.00 to 0.60) |" in said
    assert "| tuning | testbed | 1 | 1.00 (0.03 to 1.00) | 0.00 (0.00 to 0.84) |" in said
    assert "| holdout | testbed | 0 | 0.00 (0.00 to 0.97) | 0.00 (0.00 to 0.97) |" in said
    assert "Of 12 unseen pictures: 0.25 (0.05 to 0.57) below 0.05" in said
    assert share(0, 0) == ""


def test_a_checkpoint_without_enough_decoys_counts_for_the_fixed_threshold_alone() -> None:
    said = markdown([row(fixed_right=6, uncalibrated=["18 decoys are too few"])])
    assert "| tuning | testbed | 1 | fixed | 0.60" in said
    assert "| tuning | testbed | 0 | combined |  | 0 |  |" in said


def test_it_fails_where_more_is_wrong_than_the_rate_allows() -> None:
    assert failing([row(combined_right=19, combined_wrong=1)]) is None
    assert "3 of 10 matches are wrong" in (failing([row(combined_right=7, combined_wrong=3)]) or "")
    assert "unseen sets are called a part: a" in (failing([row(unseen_set_p=0.001)]) or "")
    assert failing([row(unseen_set_p=0.009), *[row()] * 20]) is None
