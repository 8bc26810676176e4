"""Many audits together: a match is one at the rate over all of them, and the index page says so."""

from __future__ import annotations

import hashlib
from typing import Any

from audit.config import Rule, VerdictSettings
from audit.report.index import Answer, in_words, together, write_index
from audit.schemas import AUDITS
from audit.states import Verdict
from audit.workspace import Workspace

REFERENCES = 10


def answer(number: int, verdict: Verdict | None, matches: int = 0) -> Answer:
    return Answer(f"{number:032x}", f"lora-{number}", "folder:a:b", verdict, matches, 0, "reports/x.html", False)


def weighed(workspace: Workspace, audits: int, least: float, whole: float | None = None) -> list[Answer]:
    """``audits`` of which the first has a reference with p ``least``, and perhaps a set with p ``whole``."""
    for number in range(audits):
        about = {"audit_id": f"{number:032x}", "reference_set": "mine"}
        p = [least if number == 0 and one == 0 else 0.3 + one / 20 for one in range(REFERENCES)]
        told = [{"p": value, "extraction_p": value} for value in p]
        rows = [{**about, **values, "reference_id": f"{one:064d}"} for one, values in enumerate(told)]
        workspace.append("chances", [*rows, {**about, "reference_id": "f" * 64, "p": None}])
        of_set = whole if number == 0 else 0.5
        workspace.append("set_chances", [{**about, "p": of_set, "extraction_p": of_set}])
    return [answer(0, Verdict.match, 1), *(answer(number, Verdict.none) for number in range(1, audits))]


def test_what_matches_alone_is_possible_among_many(workspace: Workspace) -> None:
    answers = weighed(workspace, 20, 0.004)
    alone = together(workspace, answers[:1], ["mine"], VerdictSettings())
    assert [(one.verdict, one.matches) for one in alone.answers] == [(Verdict.match, 1)]
    assert (alone.compared, alone.expected) == (REFERENCES, 0.004 * REFERENCES)
    many = together(workspace, answers, ["mine"], VerdictSettings())
    assert many.compared == 20 * REFERENCES
    assert many.those(Verdict.match) == []
    assert many.answers[0].name == "lora-0"
    assert (many.answers[0].verdict, many.answers[0].matches, many.expected) == (Verdict.possible, 0, 0.0)
    higher = together(workspace, answers, ["mine"], VerdictSettings(fdr=0.5))
    assert higher.those(Verdict.match) == []  # a p of 0.5 is no match at any rate
    assert together(workspace, answers, ["other"], VerdictSettings()).compared == 0


def test_a_set_as_a_whole_counts_over_all_sets(workspace: Workspace) -> None:
    answers = weighed(workspace, 20, 0.5, whole=0.001)
    found = together(workspace, answers, ["mine"], VerdictSettings())
    assert [(one.name, one.matched_sets) for one in found.those(Verdict.match)] == [("lora-0", 1)]
    assert found.answers[0].matches == 0


def test_by_either_one_kind_counts_over_all_where_decoys_are_declared(workspace: Workspace) -> None:
    def background(**more: Any) -> dict[str, Any]:
        return {"reference_set": "decoys", "reference_id": "d" * 64, "name": "d", "descriptor_name": "nano@1",
                "kind": "background", **more}  # fmt: skip

    answers = weighed(workspace, 2, 0.5)
    known = {"audit_id": f"{1:032x}", "reference_set": "mine", "reference_id": "e" * 64, "p": 0.9}
    workspace.append("chances", [{**known, "extraction_p": 0.9, "membership_p": 0.001}])
    workspace.erase("reference_set", "mine", "set_chances")
    used = {"background": "decoys", "decoys": 1, "pictures": 1, "copies": 0, "trivial": 0, "suspects": []}
    for one in answers:
        workspace.append("audits", [dict.fromkeys(AUDITS.names) | {"audit_id": one.audit_id, "descriptor": "nano@1"}])
        about = {"audit_id": one.audit_id, "reference_set": "mine", "backgrounds": [used]}
        workspace.append("set_chances", [{**about, "p": 0.9, "extraction_p": 0.9, "membership_p": 0.5}])
    mine = background(reference_set="mine", reference_id="m" * 64, kind="reference")
    workspace.append("references", [mine, background()])
    either = VerdictSettings(Rule.either)
    assert together(workspace, answers, ["mine"], VerdictSettings()).those(Verdict.match) == []
    assert together(workspace, answers, ["mine"], either).compared == 0
    workspace.erase("reference_set", "decoys", "references")
    workspace.append("references", [background(drawn_with=[hashlib.sha256(b"m" * 64).hexdigest()])])
    found = together(workspace, answers, ["mine"], either)
    assert [(one.name, one.matches) for one in found.those(Verdict.match)] == [("lora-1", 1)]
    assert (found.compared, found.expected) == (2 * REFERENCES + 1, 0.002 * (2 * REFERENCES + 1))
    write_index(workspace, "r2", ["mine"], found)
    assert b"One kind of evidence is enough (--rule either)" in (workspace.files.read("reports/runs/r2.html") or b"")


def test_the_fixed_rule_leaves_the_answers_as_they_are(workspace: Workspace) -> None:
    answers = weighed(workspace, 3, 0.9)
    found = together(workspace, answers, ["mine"], VerdictSettings(Rule.fixed))
    assert found.answers == answers
    assert "by a fixed threshold whose error rate is not known" in in_words(found)


def test_the_page_counts_matches_and_what_has_no_verdict(workspace: Workspace) -> None:
    answers = [*weighed(workspace, 3, 1e-5)[:2], answer(2, Verdict.uncalibrated)]
    found = together(workspace, answers, ["mine"], VerdictSettings())
    write_index(workspace, "r1", ["mine"], found)
    html = " ".join((workspace.files.read("reports/runs/r1.html") or b"").decode().split())
    assert "1 of 3 audits with matches" in html
    assert "1 picture matches" in html
    assert "at most 5 are wrong on average" in html
    assert "Of the 1 pictures that match, 0.0003 would by chance" in html
    assert "Of 1 no verdict can be given, for lack of decoys" in html
    assert "no verdict</span>" in html
    assert "1 without a verdict" in in_words(found)
