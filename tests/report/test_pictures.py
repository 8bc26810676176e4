"""What a page shows of membership and chance: pictures, where each lies among decoys, and words that follow from it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from html import unescape
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from audit.evidence.chance import FEWEST
from audit.evidence.kind import FEATURES
from audit.references.audits import match_audit
from audit.references.denoised import PARTS, webp
from audit.report import collect
from audit.report.advice import next_steps, would_change
from audit.report.facts import AuditFacts
from audit.report.histogram import Place, Places, histogram
from audit.report.membership import Unmeasured
from audit.report.page import render
from audit.workspace import Workspace
from tests.report.test_report import HOSTILE, ID, RED, fill, tags_of

PICTURE = webp(np.zeros((8, 8, 3), np.uint8))
MINE = "f" * 64


def add(workspace: Workspace, name: str, count: int, kind: str | None = None) -> None:
    """``count`` references of a set, those of a set of decoys with vectors that are no copies; all with scores."""
    rng, now = np.random.default_rng(len(name)), datetime.now(UTC)
    rows = [
        {"reference_set": name, "reference_id": f"{name}-{number}-".ljust(64, "0"), "name": f"{HOSTILE}{name}{number}",
         "descriptor_name": "nano@1", "descriptor": [0.0, 1.0 if kind else -1.0], "kind": kind, "width": 64,
         "height": 64, "pdq_quality": 90, "look": rng.normal(size=FEATURES), "thumbnail": RED, "added_at": now}
        for number in range(count)
    ]  # fmt: skip
    workspace.append("references", rows)
    workspace.append("memberships", [member(name, row["reference_id"], rng.normal(0, 0.1)) for row in rows])


def member(name: str, reference_id: str, score: float) -> dict[str, Any]:
    return {"audit_id": ID, "reference_set": name, "reference_id": reference_id, "score": score, "view": "whole",
            "base_loss": 1.0, "tuned_loss": 1.0, "evaluations": 72}  # fmt: skip


def shown(workspace: Workspace, decoys: int, others: int = 8) -> AuditFacts:
    """The facts about a reference with a hostile name that matches, ``others`` of its set, and ``decoys``."""
    fill(workspace, True)
    [reference] = workspace.rows('SELECT * FROM "references"')
    look = np.random.default_rng(9).normal(size=FEATURES)
    workspace.write("references", "k", [reference | {"look": look, "width": 64, "height": 64, "pdq_quality": 90}])
    workspace.append("memberships", [member("mine", MINE, 0.7)])
    add(workspace, "mine", others)
    if decoys:
        add(workspace, "decoys", decoys, "background")
    how = {"view": "mirrored", "timestep": 500, "steps": 8, "w": 2.0, "evaluations": 25}
    made = dict.fromkeys(PARTS, PICTURE) | how
    workspace.append("denoised", [made | {"audit_id": ID, "reference_set": "mine", "reference_id": MINE}])
    match_audit(workspace, ID, ["mine"])
    return collect(workspace, ID, ["mine"])


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_a_reference_is_shown_with_what_both_models_make_of_it(workspace: Workspace) -> None:
    html = render(shown(workspace, 30))
    section = html.partition("How well the model knows each reference")[2].partition("<table")[0]
    pictures = [found["src"] or "" for tag, found in tags_of(section) if tag == "img"]
    assert [one.partition(";")[0] for one in pictures] == ["data:image/png", *["data:image/webp"] * 5]
    said = words(section)
    assert "Neither is a recovered training picture" in said
    assert "measured and shown mirrored" in said
    assert "score +0.70" in said
    assert "membership score +0.70: higher than 30 of 30 decoys, p = 0.032" in said
    assert "25 for the pictures" in words(html)


def test_without_decoys_others_are_said_to_be_none(workspace: Workspace) -> None:
    html = render(shown(workspace, 0))
    said = words(html)
    assert "higher than 8 of 8 others of its set, not decoys" in said
    assert "nothing is said of chance" in said
    assert "p = " not in words(html.partition("How well the model knows")[2].partition("<table")[0])
    assert html.count('class="histogram"') == 2  # of what was drawn, and of what it knows


def test_nothing_hostile_gets_through_a_histogram(workspace: Workspace) -> None:
    html = render(shown(workspace, 30))
    drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawn) == 2
    for one in drawn:
        root = ElementTree.fromstring(one)  # well-formed, with what it is said to be
        assert {tag.tag for tag in root.iter()} <= {"svg", "title", "desc", "rect", "line", "path", "text"}
        assert HOSTILE in (root.findtext("title") or "")
        assert not any(name.startswith("on") for tag in root.iter() for name in tag.attrib)
    hidden = histogram(Place(0.5, np.array([0.1]), (0.1, 0.5), True, None, None), "a\u202eb\x1b", "c")
    assert "\u202e" not in hidden
    assert "\x1b" not in hidden


def test_where_too_few_decoys_were_measured_the_page_says_what_a_match_rests_on(workspace: Workspace) -> None:
    """As after a short budget: what was drawn is all then, and nobody may take it for both kinds of evidence."""
    both = shown(workspace, 200)
    assert [one.reference_id for one in both.verdict.matched] == [MINE]
    assert "rests on what was drawn" not in words(render(both))
    scores = workspace.rows("SELECT * FROM memberships WHERE reference_set = 'decoys' ORDER BY reference_id")
    workspace.erase("reference_set", "decoys", "memberships")
    workspace.append("memberships", scores[: FEWEST - 1])
    match_audit(workspace, ID, ["mine"])
    facts = collect(workspace, ID, ["mine"])
    [mine] = [one for one in facts.chances if one.reference_id == MINE]
    assert (mine.membership_p, mine.membership_decoys, mine.p) == (None, FEWEST - 1, mine.extraction_p)
    assert [one.reference_id for one in facts.verdict.matched] == [MINE]
    html = words(render(facts))
    assert "1 of these matches rests on what was drawn from the model alone: 18 decoys have a membership score" in html
    assert any("--membership-evaluations, and scan again" in one for one in next_steps(facts))
    assert "rests on what was drawn from the model alone" in " ".join(facts.as_json()["verdict"]["explanation"])
    workspace.append("memberships", scores[FEWEST - 1 : FEWEST])
    match_audit(workspace, ID, ["mine"])
    again = collect(workspace, ID, ["mine"])
    assert "rests on what was drawn" not in words(render(again))
    assert not any("and scan again" in one and "--membership" in one for one in next_steps(again))


def test_what_decoys_have_is_read_as_it_was_weighed(workspace: Workspace) -> None:
    facts = shown(workspace, 30)
    [row] = workspace.rows("SELECT decoy_similarities, decoy_scores FROM set_chances")
    assert facts.decoys == {"mine": (row["decoy_similarities"], row["decoy_scores"])}
    assert (len(row["decoy_similarities"]), len(row["decoy_scores"])) == (30, 30)
    assert "decoy_scores" not in facts.as_json()["set_chances"][0]
    workspace.erase("reference_set", "decoys", "memberships")  # a page shows what its p-values were taken among
    assert collect(workspace, ID, ["mine"]).decoys == facts.decoys
    match_audit(workspace, ID, ["mine"])
    assert collect(workspace, ID, ["mine"]).decoys["mine"][1] == []


def test_a_histogram_counts_all_and_its_mark_is_where_the_value_is() -> None:
    values = np.array([-30.0, -0.5, -0.5, 0.0, 0.2])
    drawn = ElementTree.fromstring(histogram(Place(0.4, values, (-30.0, 0.4), True, None, None), "t", "d"))
    bars = list(drawn.iter("rect"))
    heights = [float(one.attrib["height"]) for one in bars]
    assert sorted(heights / np.min(heights)) == pytest.approx([1, 1, 1, 2], abs=0.02)
    mark = float(drawn.find("line[@class='mark']").attrib["x1"])  # type: ignore[union-attr]
    assert mark > max(float(one.attrib["x"]) for one in bars)
    assert [one.text for one in drawn.iter("text")] == ["+0.40", "≤ -1.00", "+0.40"]


def test_copies_of_a_reference_are_among_no_decoys(workspace: Workspace) -> None:
    facts = shown(workspace, 30)
    copy = {"reference_set": "decoys", "reference_id": "9" * 64, "name": "copy", "descriptor_name": "nano@1",
            "descriptor": [1.0, 0.0], "kind": "background", "added_at": datetime.now(UTC)}  # fmt: skip
    workspace.append("references", [copy])
    workspace.append("memberships", [member("decoys", "9" * 64, 0.99)])
    match_audit(workspace, ID, ["mine"])
    again = collect(workspace, ID, ["mine"])
    assert again.decoys == facts.decoys
    assert max(again.decoys["mine"][1]) < 0.9
    place = Places(again).of(MINE, "score")
    assert place is not None
    assert (place.above, len(place.others), place.are_decoys) == (30, 30, True)


def test_a_picture_that_does_not_count_has_no_p(workspace: Workspace) -> None:
    facts = shown(workspace, 30)
    small = [replace(one, caveat="it is too small") for one in facts.chances]
    assert "p\u00a0=\u00a0" in unescape(render(facts))
    html = unescape(render(replace(facts, chances=small)))
    assert "p\u00a0=\u00a0" not in html
    assert "of 30 decoys. No p: <bdi>it is too small</bdi>" in html


def test_decoys_are_shown_by_their_scores_alone(workspace: Workspace) -> None:
    html = render(shown(workspace, 30))
    assert "decoys0" not in html
    assert html.count("data:image") == 2 + 6  # the match, and the reference that is known


def test_matches_can_be_laid_over_each_other_and_others_not(workspace: Workspace) -> None:
    fill(workspace, True)
    html = render(collect(workspace, ID))
    radios = [found for tag, found in tags_of(html) if tag == "input"]
    assert [one["type"] for one in radios] == ["radio"] * 3
    assert {one["name"] for one in radios} == {"view-1"}
    assert "script" not in {tag for tag, _ in tags_of(html)}
    style = html.partition("@media print")[2].partition("</style>")[0]
    assert ".views, .hint { display: none !important; }" in style
    fill(workspace, False)
    assert "input" not in {tag for tag, _ in tags_of(render(collect(workspace, ID)))}


def test_what_is_not_kept_is_said(workspace: Workspace) -> None:
    facts = replace(shown(workspace, 0), denoised=[])
    assert "they are made together with the scores" in render(facts)
    hashes = facts.row | {"settings": facts.row["settings"].replace('"extractions"', '"hashes-only"')}
    assert "Pictures of it are not kept (hashes only)" in render(replace(facts, row=hashes))


# What would change it, and what to do next


def test_how_many_decoys_a_match_takes_is_said(workspace: Workspace) -> None:
    facts = shown(workspace, 30, others=3)
    said = [replace(one, p=0.04, verdict="possible", uncalibrated=None) for one in facts.chances]
    [first, *_] = would_change(replace(facts, chances=said))
    assert first == (
        "More decoys. Among 30 no p is below 0.032, and one picture of 4 is a match by itself from p = 0.013 on: that "
        "takes 79 decoys or more. Or ask about 1 picture at most."
    )
    assert not any("More decoys" in one for one in would_change(replace(facts, chances=said[:1])))  # 30 do for one


def test_advice_follows_from_the_facts(workspace: Workspace) -> None:
    fill(workspace, False)
    facts = collect(workspace, ID)
    plain = replace(facts, captions=[], row=facts.row | {"warnings": []})
    assert not any("caption" in one for one in next_steps(plain))
    asked = replace(
        facts,
        captions=[{"caption": "", "source": "default", "truncated": False, "images": 1}],
        row=facts.row | {
            "training_images_source": "default", "prediction_change": 0.01,
            "settings": facts.row["settings"].replace('"steps": 15', '"steps": 3'),
            "warnings": ["its shapes are those of family sdxl, the base is of family sd1"],
        },
    )  # fmt: skip
    text = " ".join(next_steps(asked))
    for part in ("(--caption)", "(--n0): 10 are assumed", "3 solver steps are few, 15 are usual (--steps)",
                 "different families", "by 1.0% only", "Gather decoys"):  # fmt: skip
        assert part in text
    noise = replace(facts.verdict, said=None, tells_nothing="noise")
    nothing = replace(facts, verdict=noise)
    [only] = next_steps(nothing)
    assert "base model" in only
    assert not any("would speak for a match" in one for one in would_change(nothing))
    assert would_change(replace(facts, reference_sets=[])) == []


def test_advice_never_calls_a_model_clean(workspace: Workspace) -> None:
    fill(workspace, False)
    facts = replace(collect(workspace, ID), captions=[], decoys={"mine": ([], [0.1])})
    facts = replace(facts, row=facts.row | {"warnings": []}, unmeasured=[])
    [only] = next_steps(facts)
    assert "no proof that nothing is there" in only


def test_strangers_names_in_advice_are_escaped(workspace: Workspace) -> None:
    facts = shown(workspace, 0)
    html = render(replace(facts, unmeasured=[Unmeasured(HOSTILE, "there are no latents")]))
    assert "<script>" not in html
    assert "Measure what the model knows of &lt;script&gt;" in html
