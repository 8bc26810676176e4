"""Chances of a finished audit's references: decoys of their kind, no copies of them, nothing of another audit."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from audit.evidence.chance import FEWEST
from audit.evidence.kind import FEATURES
from audit.references.audits import match_audit
from audit.references.decoys import questions_of
from audit.report.chance import chances_of, set_chances_of
from audit.schemas import AUDITS
from audit.states import Verdict
from audit.workspace import Workspace

NOW = datetime(2026, 5, 1, tzinfo=UTC)
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


def told(workspace: Workspace, audit: str = AUDIT) -> dict[str, Any]:
    match_audit(workspace, audit, ["mine"])

    def ask(sql: str, values: list[Any]) -> list[dict[str, Any]]:
        return workspace.rows(sql, values)

    found = {one.name: one for one in chances_of(ask, audit, "d", ["mine"], 0.05)}
    return found | {"mine": set_chances_of(ask, audit, questions_of(ask, "d", ["mine"]), 0.05)}


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


def test_what_is_known_and_does_not_come_out_is_possible_and_no_match(weighed: Workspace) -> None:
    twin = unit(np.random.default_rng(9).normal(size=WIDTH))
    weighed.append("references", [reference("mine", "twin", twin)])  # of a training picture: another version of it
    weighed.append("memberships", [member("mine", "twin", 0.6)])
    found = told(weighed)["twin"]
    assert found.membership_p == pytest.approx(1 / 61)
    assert (found.p, found.verdict) == (found.extraction_p, Verdict.possible)


def test_membership_alone_makes_no_match(weighed: Workspace) -> None:
    weighed.erase("audit_id", AUDIT, "extractions")
    found = told(weighed)
    assert found["learnt0"].p == found["learnt0"].membership_p < 0.02
    assert {found[f"learnt{number}"].verdict for number in range(3)} == {Verdict.possible}
    assert found["mine"][0].verdict in (Verdict.possible, Verdict.none)
    assert found["mine"][0].extraction_p is None


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
