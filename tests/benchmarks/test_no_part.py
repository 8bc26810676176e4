"""The benchmark of sets that had no part: what it asks, what it counts, and what it fails at."""

from __future__ import annotations

from typing import Any

from benchmarks.evidence import shipped
from benchmarks.grid import SHIPPED
from benchmarks.no_part import failing, foreign, itself, of_foreign, of_growth, questions


def row(**said: Any) -> dict[str, Any]:
    plain = {
        "checkpoint": "a", "kind": "testbed", "of": "b", "references": 100, "offered": 200, "decoys": 150,
        "uncalibrated": [], "matches": 0,
        "possible": 1, "matched_sets": 0, "fixed": 0, "drawn_by_the_base": 0, "set_p": [0.5],
    }  # fmt: skip
    return plain | said


def test_sets_that_had_no_part_are_counted_by_scan() -> None:
    said = of_foreign([row(matches=2, fixed=3), row(set_p=[0.001], matched_sets=1), row(uncalibrated=["no"], fixed=1)])
    one, two = "0.50 (0.01 to 0.99)", "0.67 (0.09 to 0.99)"
    assert f"| testbed | 3 | 2 | {one} | {one} | {one} | {two} |" in said


def test_growing_sets_are_counted_by_picture_and_by_question() -> None:
    said = of_growth([row(matches=2, fixed=3, drawn_by_the_base=1), row(), row(references=1000, uncalibrated=["no"])])
    assert "| 100 | 150 of 200 | 2 | 2 | 0.50 (0.01 to 0.99) | at most 0.05 | 2 of 200 | 2 | 3 of 200 | 1 |" in said
    assert "| 1,000 | 150 of 200 | 1 | 0 |  | at most 0.05 | 0 of 0 | 0 | 0 of 1,000 | 0 |" in said


def test_it_fails_where_more_scans_match_than_the_rate_allows() -> None:
    assert failing([row(matches=1), *[row()] * 19]) is None
    assert "5 of 20 scans of pictures" in (failing([*[row(matches=1)] * 5, *[row()] * 15]) or "")
    assert "5 of 20 scans of sets" in (failing([*[row(matched_sets=1)] * 5, *[row()] * 15]) or "")
    assert failing([row(matches=1, uncalibrated=["no"])] * 9) is None


def test_a_foreign_set_shares_no_picture_with_its_decoys() -> None:
    one = foreign(next(shipped(SHIPPED)), "stamps-birds")
    assert (len(one.trained), len(one.unseen), one.n0) == (0, 12, 10)
    assert not {part.tobytes() for part in one.unseen} & {part.tobytes() for part in one.decoys}


def test_no_checkpoint_is_asked_about_its_own_source_but_the_base_itself_is() -> None:
    subjects = list(shipped(SHIPPED))
    asked = [(one.name, name) for one, name, _ in questions([*subjects, *itself(subjects)])]
    assert not [pair for pair in asked if pair[0] == "fluent-animals-lora-kohya" and pair[1].startswith("fluent")]
    assert ("fluent-animals-lora-kohya-itself", "fluent-animals") in asked
    assert not [pair for pair in asked if "dreambooth-itself" in pair[0]]
    assert len(asked) >= 100
