"""Chances of a finished audit's references: decoys of their kind, no copies of them, nothing of another audit."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from audit.config import Rule, VerdictSettings
from audit.evidence.chance import FEWEST
from audit.evidence.kind import FEATURES
from audit.references import weigh
from audit.references.audits import match_audit
from audit.references.decoys import questions_of
from audit.report.chance import chances_of, pairings_of, set_chances_of
from audit.schemas import AUDITS
from audit.states import Verdict
from audit.workspace import Workspace

NOW = datetime(2026, 5, 1, tzinfo=UTC)
CALIBRATED, EITHER = VerdictSettings(), VerdictSettings(Rule.either)
AUDIT, OTHER = "a" * 32, "b" * 32
WIDTH = 16


def unit(*parts: np.ndarray) -> np.ndarray:
    found = np.sum(parts, axis=0)
    return (found / np.linalg.norm(found)).astype(np.float32)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def reference(set_name: str, name: str, vector: np.ndarray, kind: str | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(int(digest(name)[:8], 16))
    return {
        "reference_set": set_name, "reference_id": digest(name), "name": name, "width": 512, "height": 512,
        "descriptor_name": "d", "descriptor": vector, "pdq_quality": 90, "kind": kind, "added_at": NOW,
        "look": rng.normal(size=FEATURES),
    }  # fmt: skip


def audited(audit_id: str) -> dict[str, Any]:
    said = {"audit_id": audit_id, "descriptor": "d", "threshold": 0.9, "descriptor_size": 64, "finished_at": NOW}
    return dict.fromkeys(AUDITS.names) | said


def member(set_name: str, name: str, score: float | None, audit: str = AUDIT) -> dict[str, Any]:
    return {"audit_id": audit, "reference_set": set_name, "reference_id": digest(name), "score": score}


@pytest.fixture
def weighed(workspace: Workspace) -> Workspace:
    """Six references, of which three came out of the model and were learnt, and sixty decoys."""
    rng = np.random.default_rng(4)
    drawn = [unit(rng.normal(size=WIDTH)) for _ in range(3)]
    workspace.append("audits", [audited(AUDIT)])
    ranked = enumerate(drawn, start=1)
    workspace.append(
        "extractions", [{"audit_id": AUDIT, "rank": rank, "index": rank, "descriptor": one} for rank, one in ranked]
    )
    references = [
        reference("mine", f"learnt{number}", unit(one, 0.2 * rng.normal(size=WIDTH) / 4))
        for number, one in enumerate(drawn)
    ]
    references += [reference("mine", f"unseen{number}", unit(rng.normal(size=WIDTH))) for number in range(3)]
    decoys = [reference("others", f"decoy{number}", unit(rng.normal(size=WIDTH)), "background") for number in range(60)]
    workspace.append("references", references + decoys)
    scores = [member("mine", f"learnt{number}", 0.5 + number / 10) for number in range(3)]
    scores += [member("mine", f"unseen{number}", float(rng.normal(0, 0.1))) for number in range(3)]
    scores += [member("others", f"decoy{number}", float(rng.normal(0, 0.1))) for number in range(60)]
    workspace.append("memberships", scores)
    return workspace


def told(workspace: Workspace, audit: str = AUDIT, asked: VerdictSettings = CALIBRATED) -> dict[str, Any]:
    match_audit(workspace, audit, ["mine"])

    def ask(sql: str, values: list[Any]) -> list[dict[str, Any]]:
        return workspace.rows(sql, values)

    whole = set_chances_of(ask, audit, questions_of(ask, "d", ["mine"]), asked)
    return {one.name: one for one in chances_of(ask, audit, "d", whole, asked)} | {"mine": whole}


def test_what_was_learnt_is_a_match_and_what_was_not_is_none(weighed: Workspace) -> None:
    found = told(weighed)
    for number in range(3):
        learnt, unseen = found[f"learnt{number}"], found[f"unseen{number}"]
        assert learnt.verdict is Verdict.match
        assert (learnt.rank, learnt.extraction_decoys, learnt.membership_decoys) == (number + 1, 60, 60)
        assert learnt.p <= learnt.fdr <= 0.05
        assert learnt.expected == pytest.approx(6 * learnt.p)
        assert unseen.verdict is not Verdict.match
        assert unseen.p > 0.01
    [whole] = found["mine"]
    assert (whole.pictures, whole.decoys) == (6, 60)
    assert whole.membership_p < 0.1  # half of it was learnt
    assert whole.p == max(whole.membership_p, whole.extraction_p)


def test_of_a_large_set_the_nearest_are_named_and_all_are_counted(
    weighed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(11)
    more = [reference("mine", f"more{number}", unit(rng.normal(size=WIDTH))) for number in range(30)]
    weighed.append("references", [*more, reference("mine", "blank", unit(rng.normal(size=WIDTH))) | {"pdq_quality": 3}])
    weighed.append("memberships", [member("mine", f"more{number}", float(rng.normal(0, 0.1))) for number in range(30)])
    whole = told(weighed)
    monkeypatch.setattr(weigh, "NOTED", 8)
    few = told(weighed)
    assert len(weighed.rows("SELECT * FROM chances")) <= 8
    [mine], [before] = few.pop("mine"), whole.pop("mine")
    assert (mine.compared, mine.pictures) == (36, 36)
    assert (mine.p, mine.extraction_p, mine.membership_p) == (before.p, before.extraction_p, before.membership_p)
    assert {f"learnt{number}" for number in range(3)} <= set(few)
    for name, one in few.items():
        known = whole[name]
        assert (one.p, one.verdict, one.expected) == (known.p, known.verdict, known.expected)
        assert one.fdr >= known.fdr
    assert [few[f"learnt{number}"].fdr for number in range(3)] == [whole[f"learnt{number}"].fdr for number in range(3)]


def test_what_is_known_and_does_not_come_out_is_possible_and_no_match(weighed: Workspace) -> None:
    twin = unit(np.random.default_rng(9).normal(size=WIDTH))
    weighed.append("references", [reference("mine", "twin", twin)])  # of a training picture: another version of it
    weighed.append("memberships", [member("mine", "twin", 0.6)])
    found = told(weighed)["twin"]
    assert found.membership_p == pytest.approx(1 / 61)
    assert (found.p, found.verdict) == (found.extraction_p, Verdict.possible)
    assert found.alone_fdr < found.fdr


def test_what_the_base_alone_draws_as_near_is_no_match_by_what_came_out(weighed: Workspace) -> None:
    before = told(weighed)
    vectors = {row["name"]: row["descriptor"] for row in weighed.rows('SELECT name, descriptor FROM "references"')}
    known, other = vectors["learnt0"], vectors["unseen0"]
    rows = [{"audit_id": AUDIT, "index": number, "descriptor": one} for number, one in ((3, known), (5, other))]
    weighed.write("control_generations", AUDIT, rows)
    weighed.write("control_generations", OTHER, [{**rows[0], "audit_id": OTHER}])
    found = told(weighed)
    gone, kept = found["learnt0"], found["learnt1"]
    assert (gone.extraction_p, gone.p, gone.control_index) == (1.0, 1.0, 3)
    assert gone.control_similarity == pytest.approx(1)
    assert gone.is_drawn_alone(0.9)
    assert gone.verdict is Verdict.possible  # what the model knows still speaks for it
    assert (kept.extraction_p, kept.verdict) == (before["learnt1"].extraction_p, Verdict.match)
    assert not kept.is_drawn_alone(0.9)
    assert found["unseen0"].extraction_p == 1.0  # it is further from what came out than from what the base draws
    assert found["mine"][0].extraction_p > before["mine"][0].extraction_p


def test_membership_alone_makes_no_match(weighed: Workspace) -> None:
    weighed.erase("audit_id", AUDIT, "extractions")
    found = told(weighed)
    assert found["learnt0"].p == found["learnt0"].membership_p < 0.02
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.possible}
    assert found["mine"][0].verdict in (Verdict.possible, Verdict.none)
    assert found["mine"][0].extraction_p is None


# The rule "either"


def declare(workspace: Workspace, *hashes: str, names: str = "others") -> None:
    """Declare that a background is a random split with sets of these pictures."""
    rows = workspace.rows('SELECT * FROM "references" WHERE reference_set = ?', [names])
    workspace.erase("reference_set", names, "references")
    workspace.append("references", [row | {"drawn_with": list(hashes)} for row in rows])


def hash_of(workspace: Workspace, name: str) -> str:
    rows = workspace.rows('SELECT reference_id FROM "references" WHERE reference_set = ?', [name])
    return hashlib.sha256(",".join(sorted(row["reference_id"] for row in rows)).encode()).hexdigest()


def more_decoys(workspace: Workspace) -> None:
    """Ninety more, so that the least p is below what one of seven has to reach at twice its p."""
    rng = np.random.default_rng(8)
    rows = [reference("others", f"more{number}", unit(rng.normal(size=WIDTH)), "background") for number in range(90)]
    workspace.append("references", rows)
    workspace.append("memberships", [member("others", row["name"], float(rng.normal(0, 0.1))) for row in rows])


def test_one_kind_of_evidence_is_enough_where_decoys_are_declared_a_random_split(weighed: Workspace) -> None:
    weighed.append("references", [reference("mine", "twin", unit(np.random.default_rng(9).normal(size=WIDTH)))])
    weighed.append("memberships", [member("mine", "twin", 0.6)])
    more_decoys(weighed)
    declare(weighed, hash_of(weighed, "mine"))
    calibrated, either = told(weighed), told(weighed, asked=EITHER)
    assert (calibrated["twin"].verdict, either["twin"].verdict) == (Verdict.possible, Verdict.match)
    for name in ("learnt0", "unseen1", "twin"):
        one = either[name]
        assert one.p == min(1, 2 * min(one.extraction_p, one.membership_p))
        assert calibrated[name].p == max(one.extraction_p, one.membership_p)
    [whole] = either["mine"]
    assert whole.p == min(1, 2 * min(whole.extraction_p, whole.membership_p))
    assert [one.drawn for one in pairings_of([whole], questions_of(weighed.rows, "d", ["mine"]))] == [True]


def test_membership_alone_matches_by_either_at_twice_its_p(weighed: Workspace) -> None:
    weighed.erase("audit_id", AUDIT, "extractions")
    declare(weighed, hash_of(weighed, "mine"))
    found = told(weighed, asked=EITHER)
    assert found["learnt0"].p == 2 * found["learnt0"].membership_p
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.possible}  # twice 1 / 61, of six
    more_decoys(weighed)
    declare(weighed, hash_of(weighed, "mine"))
    found = told(weighed, asked=EITHER)
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.match}
    assert told(weighed)["learnt0"].verdict is Verdict.possible


@pytest.mark.parametrize("declared", [[], ["0" * 64]])
def test_decoys_that_nobody_declared_a_random_split_accuse_nobody_by_either(
    weighed: Workspace, declared: list[str]
) -> None:
    declare(weighed, *declared)
    found = told(weighed, asked=EITHER)
    assert {one.verdict for name, one in found.items() if name != "mine"} == {Verdict.uncalibrated}
    assert found["learnt0"].p is None
    assert found["mine"][0].verdict is Verdict.uncalibrated
    for words in ("others is not", "random split", "--drawn", "--rule calibrated"):
        assert words in found["learnt0"].uncalibrated
    assert told(weighed)["learnt0"].verdict is Verdict.match


def test_what_was_declared_of_other_pictures_holds_no_more(weighed: Workspace) -> None:
    more_decoys(weighed)
    declare(weighed, hash_of(weighed, "mine"))
    before = questions_of(weighed.rows, "d", ["mine"])
    assert before.drawn == {"mine": frozenset({"others"})}
    assert told(weighed, asked=EITHER)["learnt0"].verdict is Verdict.match
    weighed.append("references", [reference("mine", "later", unit(np.ones(WIDTH)))])
    assert questions_of(weighed.rows, "d", ["mine"]).drawn == {"mine": frozenset()}
    assert told(weighed, asked=EITHER)["learnt0"].verdict is Verdict.uncalibrated


def test_one_undeclared_background_among_the_decoys_is_enough_to_say_nothing(weighed: Workspace) -> None:
    more_decoys(weighed)
    declare(weighed, hash_of(weighed, "mine"))
    weighed.append("references", background("more", 20))
    assert told(weighed, asked=EITHER)["learnt0"].verdict is Verdict.uncalibrated
    weighed.append("references", background("photos", 40, shift=3.0))
    declare(weighed, hash_of(weighed, "mine"), names="more")
    assert told(weighed, asked=EITHER)["learnt0"].verdict is Verdict.match  # what is not used need not be declared


def test_a_declaration_is_weighed_again(weighed: Workspace) -> None:
    told(weighed)
    before = questions_of(weighed.rows, "d", ["mine"])
    declare(weighed, hash_of(weighed, "mine"))
    assert questions_of(weighed.rows, "d", ["mine"]).of != before.of


def test_weighing_again_adds_nothing(weighed: Workspace) -> None:
    told(weighed)
    before = weighed.rows("SELECT * FROM chances ORDER BY reference_id")
    told(weighed)
    assert weighed.rows("SELECT * FROM chances ORDER BY reference_id") == before
    assert len(before) == 6


def test_scores_of_another_audit_are_not_taken(weighed: Workspace) -> None:
    weighed.append("audits", [audited(OTHER)])
    found = told(weighed, OTHER)
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.uncalibrated}
    assert found["learnt0"].similarity is found["learnt0"].membership_p is None
    assert found["mine"][0].p is None
    assert "neither what was drawn nor membership" in found["mine"][0].uncalibrated
    assert told(weighed)["learnt0"].verdict is Verdict.match


@pytest.mark.parametrize(
    ("mine", "decoys", "compare"),
    [("a1", "a1", True), ("a1", "b2", False), ("whole-a1", "whole-b2", True), ("whole-a1", "b2", False),
     ("a1", "whole-b2", False)],
)  # fmt: skip
def test_scores_compare_where_both_were_measured_alike(
    weighed: Workspace, mine: str, decoys: str, compare: bool
) -> None:
    """A decoy that was measured for another question, with fewer noises, has another score."""
    rows = weighed.rows("SELECT * FROM memberships")
    for name in ("mine", "others"):
        weighed.erase("reference_set", name, "memberships")
    asked = {"mine": mine, "others": decoys}
    weighed.append("memberships", [row | {"question": asked[row["reference_set"]]} for row in rows])
    one = told(weighed)["learnt0"]
    assert one.membership_decoys == (60 if compare else 0)
    assert (one.membership_p is not None) is compare


def test_a_copy_of_a_reference_among_the_decoys_is_none(weighed: Workspace) -> None:
    alone = told(weighed)["learnt1"]
    [row] = weighed.rows('SELECT descriptor FROM "references" WHERE name = ?', ["learnt1"])
    copy = unit(np.array(row["descriptor"]), 0.02 * np.random.default_rng(0).normal(size=WIDTH))
    weighed.append("references", [reference("others2", "copy", copy, "background")])
    weighed.append("memberships", [member("others2", "copy", 0.9)])
    assert told(weighed)["learnt1"] == alone
    same = weighed.rows('SELECT * FROM "references" WHERE name = ?', ["learnt2"])[0]
    weighed.append("references", [same | {"reference_set": "others3", "kind": "background"}])
    assert told(weighed)["learnt2"].extraction_decoys == 60


def test_decoys_of_another_kind_accuse_nobody(weighed: Workspace) -> None:
    rows = weighed.rows('SELECT * FROM "references" WHERE kind = ?', ["background"])
    weighed.erase("reference_set", "others", "references")
    weighed.append("references", [row | {"look": [value + 3 for value in row["look"]]} for row in rows])
    found = told(weighed)
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.uncalibrated}
    assert "not of their kind" in found["learnt0"].uncalibrated
    assert found["mine"][0].p is None


def test_too_few_decoys_accuse_nobody(weighed: Workspace) -> None:
    names = [f"decoy{number}" for number in range(FEWEST - 1, 60)]
    rows = [row for row in weighed.rows('SELECT * FROM "references"') if row["name"] not in names]
    for name in ("mine", "others"):
        weighed.erase("reference_set", name, "references")
    weighed.append("references", rows)
    found = told(weighed)
    assert {one.verdict for name, one in found.items() if name != "mine"} == {Verdict.uncalibrated}
    assert f"{FEWEST - 1} decoys of their kind are too few" in found["learnt0"].uncalibrated


@pytest.mark.parametrize(("changed", "why"), [({"pdq_quality": 20}, "too little in it"), ({"width": 40}, "40 x 512")])
def test_a_trivial_picture_counts_for_nothing(weighed: Workspace, changed: dict[str, Any], why: str) -> None:
    rows = weighed.rows('SELECT * FROM "references" WHERE reference_set = ?', ["mine"])
    weighed.erase("reference_set", "mine", "references")
    weighed.append("references", [row | (changed if row["name"] == "learnt0" else {}) for row in rows])
    one = told(weighed)["learnt0"]
    assert (one.verdict, one.p) == (Verdict.none, None)
    assert why in one.caveat


def test_a_score_that_is_no_number_is_no_evidence(weighed: Workspace) -> None:
    weighed.erase("reference_set", "mine", "memberships")
    weighed.append("memberships", [member("mine", "learnt0", float("nan")), member("mine", "learnt1", None)])
    found = told(weighed)
    for number in range(2):
        assert found[f"learnt{number}"].membership_p is None
        assert found[f"learnt{number}"].p == found[f"learnt{number}"].extraction_p


# Which decoys


def background(name: str, count: int, shift: float = 0.0, **more: Any) -> list[dict[str, Any]]:
    """Pictures of a background whose look is ``shift`` away from the references'."""
    rng = np.random.default_rng(len(name))
    rows = [reference(name, f"{name}{number}", unit(rng.normal(size=WIDTH)), "background") for number in range(count)]
    return [row | {"look": row["look"] + shift} | more for row in rows]


def pairings(workspace: Workspace) -> dict[str, dict[str, Any]]:
    told(workspace)
    [row] = workspace.rows("SELECT backgrounds FROM set_chances")
    return {one["background"]: one for one in row["backgrounds"]}


def test_a_background_of_another_look_is_not_used_and_spoils_nothing(weighed: Workspace) -> None:
    before = told(weighed)
    weighed.append("references", background("photos", 40, shift=3.0))
    found = pairings(weighed)
    assert (found["photos"]["decoys"], found["others"]["decoys"]) == (0, 60)
    assert "another look" in found["photos"]["problem"]
    assert found["others"]["problem"] is None
    assert told(weighed)["learnt0"] == before["learnt0"]


def test_backgrounds_that_pass_and_are_unlike_each_other_are_all_refused(weighed: Workspace) -> None:
    """Which of them are the references' cannot be seen: one --of says it."""
    weighed.erase("reference_set", "others", "references")
    rows = [background(name, 40, shift=shift) for name, shift in (("low", -0.45), ("higher", 0.45))]
    weighed.append("references", rows[0] + rows[1])
    found = told(weighed)
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.uncalibrated}
    assert "of different looks themselves" in found["learnt0"].uncalibrated
    weighed.erase("reference_set", "higher", "references")
    weighed.append("references", [row | {"decoys_of": ["another"]} for row in rows[1]])
    assert set(pairings(weighed)) == {"low"}
    assert told(weighed)["learnt0"].uncalibrated is None


def test_what_is_left_out_of_a_background_is_counted(weighed: Workspace) -> None:
    [row] = weighed.rows('SELECT descriptor FROM "references" WHERE name = ?', ["learnt1"])
    copy = unit(np.array(row["descriptor"]), 0.02 * np.random.default_rng(0).normal(size=WIDTH))
    rows = [reference("others", "copy", copy, "background"), *background("others", 3, pdq_quality=10),
            *background("others", 2, width=20)]  # fmt: skip
    rows[-1]["reference_id"], rows[-2]["reference_id"] = digest("tiny1"), digest("tiny2")
    weighed.append("references", rows)
    found = pairings(weighed)["others"]
    assert (found["pictures"], found["copies"], found["trivial"], found["decoys"]) == (66, 1, 5, 60)


def test_a_picture_in_two_backgrounds_is_one_decoy(weighed: Workspace) -> None:
    rows = weighed.rows('SELECT * FROM "references" WHERE kind = ?', ["background"])
    weighed.append("references", [row | {"reference_set": "again"} for row in rows])
    assert told(weighed)["learnt0"].extraction_decoys == 60


def test_decoys_that_were_trained_on_are_named_kept_and_hide_matches(weighed: Workspace) -> None:
    before = told(weighed)["learnt0"]
    weighed.erase("reference_set", "others", "memberships")
    scores = np.random.default_rng(1).normal(0, 0.1, 60)
    scores[:2] = 0.9
    weighed.append("memberships", [member("others", f"decoy{number}", float(one)) for number, one in enumerate(scores)])
    found = told(weighed)
    assert pairings(weighed)["others"]["suspects"] == ["decoy0", "decoy1"]
    assert found["learnt0"].membership_decoys == 60
    assert found["learnt0"].membership_p > before.membership_p


def test_a_score_that_something_speaks_against_is_not_compared(weighed: Workspace) -> None:
    """As of a picture that is smaller than the model's input, reference or decoy."""
    weighed.erase("reference_set", "mine", "memberships")
    enlarged = member("mine", "learnt0", 0.9) | {"caveat": "40 x 40 pixels are less than the model's 64"}
    weighed.append("memberships", [enlarged, member("others", "decoy0", 5.0) | {"caveat": "the same"}])
    found = told(weighed)
    assert (found["learnt0"].membership_p, found["learnt0"].score) == (None, 0.9)
    assert "less than the model's 64" in found["learnt0"].caveat
    assert found["mine"][0].membership_p is None


def test_a_set_whose_pictures_all_do_not_count_has_no_verdict(weighed: Workspace) -> None:
    rows = weighed.rows('SELECT * FROM "references" WHERE reference_set = ?', ["mine"])
    weighed.erase("reference_set", "mine", "references")
    weighed.append("references", [row | {"width": 20} for row in rows])
    found = told(weighed)
    assert "fewer than 5 references that count" in found["mine"][0].uncalibrated
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.uncalibrated}


def test_what_was_weighed_with_other_decoys_says_nothing(weighed: Workspace) -> None:
    def ask(sql: str, values: list[Any]) -> list[dict[str, Any]]:
        return weighed.rows(sql, values)

    told(weighed)
    before = questions_of(ask, "d", ["mine"])
    assert before.has_decoys
    [whole] = set_chances_of(ask, AUDIT, before, CALIBRATED)
    assert whole.verdict is not Verdict.uncalibrated
    weighed.append("references", background("more", 1))
    assert set_chances_of(ask, AUDIT, questions_of(ask, "d", ["mine"]), CALIBRATED) == []
    weighed.erase("reference_set", "more", "references")
    assert questions_of(ask, "d", ["mine"]) == before
    weighed.append("references", background("more", 1, decoys_of=["another"]))
    assert questions_of(ask, "d", ["mine"]) == before  # it is not for this set
    weighed.erase("reference_set", "others", "references")
    assert not questions_of(ask, "d", ["mine"]).has_decoys


def test_sets_are_corrected_together(weighed: Workspace) -> None:
    def ask(sql: str, values: list[Any]) -> list[dict[str, Any]]:
        return weighed.rows(sql, values)

    told(weighed)
    for number in range(4):
        weighed.append("references", [reference(f"set{number}", f"one{number}", np.ones(WIDTH, np.float32) / 4)])
    names = ["mine", *(f"set{number}" for number in range(4))]
    questions = questions_of(ask, "d", names)
    weighed.erase("reference_set", "mine", "set_chances")
    p = {name: 0.03 if name == "mine" else 0.8 for name in names}
    weighed.append(
        "set_chances",
        [{"audit_id": AUDIT, "reference_set": name, "question": questions.of[name], "pictures": 9, "decoys": 40,
          "p": p[name], "extraction_p": p[name]} for name in names],
    )  # fmt: skip
    found = {one.reference_set: one for one in set_chances_of(ask, AUDIT, questions, CALIBRATED)}
    assert found["mine"].fdr == pytest.approx(0.15)
    assert (found["mine"].verdict, found["set0"].verdict) == (Verdict.possible, Verdict.none)
