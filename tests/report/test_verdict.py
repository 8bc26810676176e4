"""The verdict of a question: what it follows from, what it says, and that it never accuses without an error rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from audit.config import Rule, VerdictSettings
from audit.report.chance import Chance, Pairing, SetChance
from audit.report.verdict import Alike, Evidenced, Found, QuestionVerdict, verdict_of
from audit.sampling.pictures import NOT_SAMPLED
from audit.states import Verdict

CALIBRATED, FIXED = VerdictSettings(), VerdictSettings(Rule.fixed)
NEAR = Found("mine", "a" * 64, "a.png", 0.9, 8, "both", 2)
SMALL = replace(NEAR, reference_id="b" * 64, name="b.png")
WHOLE = SetChance("mine", 10, 10, 40, 0.4, 0.3, 0.4, None, 0.4, Verdict.none)
LACKING = replace(WHOLE, p=None, uncalibrated="3 decoys are too few", fdr=None, verdict=Verdict.uncalibrated)


def chance(p: float | None, verdict: Verdict, number: int = 0, **more: Any) -> Chance:
    about = f"{number:064d}" if number else "a" * 64
    expected = None if p is None else 10 * p
    plain = Chance("mine", about, f"{number}.png", 0.9, 2, p, 40, 0.3, p, 40, p, None, None, p, p, expected, verdict)
    return replace(plain, **more)


def evidenced(**more: Any) -> Evidenced:
    none = [chance(0.5, Verdict.none, number) for number in range(1, 10)]
    plain = Evidenced(["mine"], 10, 0.7, Alike([], []), none, [WHOLE], [], None)
    return replace(plain, **more)


def said(found: QuestionVerdict) -> str:
    return " ".join([found.headline, *found.explanation])


def test_a_picture_at_the_rate_is_a_match_and_says_how_often_that_is_wrong() -> None:
    found = verdict_of(evidenced(chances=[chance(0.001, Verdict.match), chance(0.5, Verdict.none, 1)]), CALIBRATED)
    assert found.said is Verdict.match
    assert [one.name for one in found.matched] == ["0.png"]
    assert (found.compared, found.expected) == (2, pytest.approx(0.01))
    assert "1 of your 10 reference pictures matches" in found.headline
    assert "Of 100 such matches, at most 5 are wrong on average" in said(found)
    assert "of the 2 references compared, 0.01 would come out so by chance" in said(found)
    assert found.label("a" * 64, 2, similar=False) == "match"
    assert found.label("a" * 64, 1, similar=False) == "no match"  # another extraction than the nearest


def test_a_match_by_what_was_drawn_alone_says_so_in_words() -> None:
    both = chance(0.001, Verdict.match)
    assert "drawn from the model alone" not in said(verdict_of(evidenced(chances=[both]), CALIBRATED))
    few = replace(both, membership_p=None, membership_decoys=18)
    found = verdict_of(evidenced(chances=[few, replace(few, reference_id="c" * 64), both]), CALIBRATED)
    assert found.said is Verdict.match
    assert "2 of these matches rest on what was drawn from the model alone: 18 decoys have a membership score" in said(
        found
    )
    assert "19 is the least (--membership-evaluations takes more)" in said(found)
    assert "otherwise a match takes both kinds of evidence" in said(found)
    unmeasured = replace(few, score=None, membership_decoys=0)
    found = verdict_of(evidenced(chances=[unmeasured]), CALIBRATED)
    assert "1 of these matches rests on what was drawn from the model alone: what the model knows of them" in said(
        found
    )
    caveat = replace(few, membership_decoys=40, caveat="it was enlarged")
    assert "their membership scores do not count" in said(verdict_of(evidenced(chances=[caveat]), CALIBRATED))
    whole = replace(WHOLE, p=3e-6, membership_p=None, fdr=3e-6, verdict=Verdict.match)
    assert "It rests on what was drawn alone" in said(verdict_of(evidenced(set_chances=[whole]), CALIBRATED))
    assert "rests on what was drawn" not in said(
        verdict_of(evidenced(set_chances=[replace(whole, membership_p=0.1)]), CALIBRATED)
    )


def test_without_decoys_nobody_is_accused_and_nobody_acquitted() -> None:
    blank = chance(None, Verdict.uncalibrated, uncalibrated="3 decoys are too few")
    found = verdict_of(evidenced(chances=[blank], set_chances=[LACKING], alike=Alike([NEAR], [])), CALIBRATED)
    assert (found.said, found.matched, found.matched_sets) == (Verdict.uncalibrated, [], [])
    assert "No verdict with an error rate can be given on mine" in found.headline
    assert "neither for nor against: 3 decoys are too few" in said(found)
    assert "1 of 10 looks alike" in said(found)
    assert "That is no verdict" in said(found)
    assert found.label(NEAR.reference_id, 2, similar=True) == "looks alike"
    assert "None of your" not in said(found)


def test_a_set_as_a_whole_leads_where_no_picture_reaches_the_rate() -> None:
    whole = replace(WHOLE, p=3e-6, fdr=3e-6, verdict=Verdict.match)
    found = verdict_of(evidenced(chances=[chance(0.04, Verdict.possible)], set_chances=[whole]), CALIBRATED)
    assert (found.said, found.matched) == (Verdict.match, [])
    assert found.headline == "The set mine as a whole had a part in the training of this model (p = 3e-06)."
    assert "Of 100 such verdicts on sets, at most 5 are wrong" in said(found)
    assert "It says of no single picture that it was trained on" in said(found)
    assert found.label("a" * 64, 2, similar=True) == "possible"


def test_none_is_not_clean_and_possible_is_no_match() -> None:
    found = verdict_of(evidenced(), CALIBRATED)
    assert found.said is Verdict.none
    assert "None of your 10 reference pictures is a match" in found.headline
    assert "9 of 10 were compared with decoys. That does not show that they were not used" in said(found)
    found = verdict_of(evidenced(chances=[chance(0.04, Verdict.possible)]), CALIBRATED)
    assert found.said is Verdict.possible
    assert "1 of your 10 reference pictures possible, none a match" in found.headline


def test_a_set_without_a_verdict_is_not_covered_by_that_of_another() -> None:
    sets = evidenced(sets=["mine", "yours", "late"], set_chances=[WHOLE, replace(LACKING, reference_set="yours")])
    found = verdict_of(sets, CALIBRATED)
    assert found.said is Verdict.uncalibrated
    assert [one.reference_set for one in found.unanswered] == ["yours", "late"]
    assert "not compared with its decoys as they are now" in said(found)
    found = verdict_of(replace(sets, chances=[chance(0.001, Verdict.match)]), CALIBRATED)
    assert found.said is Verdict.match
    assert "Of yours nothing is said" in said(found)


def test_an_audit_that_tells_nothing_has_no_verdict_but_membership_alone_has() -> None:
    found = verdict_of(evidenced(tells_nothing="what was sampled is noise"), CALIBRATED)
    assert (found.said, found.tells_nothing) == (None, "what was sampled is noise")
    assert "Nothing follows" in said(found)
    found = verdict_of(evidenced(tells_nothing=NOT_SAMPLED), CALIBRATED)
    assert (found.said, found.tells_nothing) == (Verdict.none, None)
    found = verdict_of(evidenced(tells_nothing=NOT_SAMPLED), FIXED)
    assert (found.said, found.tells_nothing) == (None, NOT_SAMPLED)


def test_the_fixed_rule_says_that_its_rate_is_not_known() -> None:
    found = verdict_of(evidenced(alike=Alike([NEAR], [SMALL])), FIXED)
    assert (found.said, found.matched, found.possible, found.rate) == (Verdict.match, [NEAR], [SMALL], None)
    assert "How often this rule is wrong is not known" in said(found)
    assert verdict_of(evidenced(alike=Alike([], [SMALL])), FIXED).said is Verdict.possible
    found = verdict_of(evidenced(chances=[chance(0.001, Verdict.match)]), FIXED)
    assert found.said is Verdict.none
    assert "That does not show that they were not used" in said(found)
    assert verdict_of(evidenced(sets=[], references=0, set_chances=[]), CALIBRATED).said is None


def test_by_either_the_page_says_what_the_rate_rests_on() -> None:
    asked = VerdictSettings(Rule.either)
    found = verdict_of(evidenced(chances=[chance(0.001, Verdict.match), chance(0.04, Verdict.possible, 1)]), asked)
    assert (found.said, found.rate, found.label("b" * 64, 1, similar=True)) == (Verdict.match, 0.05, "looks alike")
    assert "One kind of evidence is enough by the rule that was asked for (--rule either)" in said(found)
    assert "at most 5 are wrong on average, if decoys and references are a random split of one collection" in said(
        found
    )
    assert "only one kind of evidence speaks for it" not in said(found)
    assert "by one kind of evidence alone" not in said(found)
    whole = replace(WHOLE, p=3e-6, fdr=3e-6, verdict=Verdict.match)
    assert "drawn from the model, or known by it better, than" in said(
        verdict_of(evidenced(set_chances=[whole]), asked)
    )
    known = replace(whole, extraction_p=None)
    assert "of the set mine are known by it better than" in said(verdict_of(evidenced(set_chances=[known]), asked))
    assert "One kind of evidence is enough" not in said(verdict_of(evidenced(), CALIBRATED))


def test_decoys_that_stand_out_are_named() -> None:
    pairing = Pairing("mine", "later", 30, 0, 0, 30, None, ["x.png", "y.png"])
    [warning] = verdict_of(evidenced(pairings=[pairing, replace(pairing, reference_set="b")]), CALIBRATED).warnings
    assert warning.startswith("2 of the decoys stand out")
    assert "later: x.png, later: y.png" in warning
