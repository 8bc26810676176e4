"""What is said of each reference, and of each set, with its error rate: it follows from p-values among decoys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from audit.config import Rule, VerdictSettings
from audit.evidence.chance import POSSIBLE, agreed_p, either_p, expected_by_chance, false_discovery_rates
from audit.references.decoys import Questions
from audit.states import Verdict

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]
_One = TypeVar("_One", "Chance", "SetChance")


@dataclass(frozen=True)
class Chance:
    """One reference. ``fdr`` is the smallest rate of wrong ones among the matches at which it is one.

    ``alone_fdr`` is that rate where one kind of evidence is enough, ``p`` that of the rule that was asked for.
    ``expected`` is how many of the references compared would have so small a p had none been trained on.
    ``control_similarity`` is the cosine of the control generation nearest to it, number ``control_index``;
    ``part`` is the box of the part that is nearest to the extraction, as shares of the picture's sides.
    """

    reference_set: str
    reference_id: str
    name: str
    similarity: float | None
    rank: int | None
    extraction_p: float | None
    extraction_decoys: int
    score: float | None
    membership_p: float | None
    membership_decoys: int
    p: float | None
    caveat: str | None
    uncalibrated: str | None
    fdr: float | None = None
    alone_fdr: float | None = None
    expected: float | None = None
    verdict: Verdict = Verdict.uncalibrated
    control_similarity: float | None = None
    control_index: int | None = None
    part: list[float] | None = None

    def is_drawn_alone(self, threshold: float) -> bool:
        """Whether the base alone draws it as well: as near as the extractions, or as the ``threshold``."""
        if self.control_similarity is None or self.similarity is None:
            return False
        return self.control_similarity >= min(self.similarity, threshold)


@dataclass(frozen=True)
class SetChance:
    """A whole set: how likely what speaks for it is, had it had no part (Mann and Whitney).

    ``fdr`` is the smallest rate of wrong ones among such sets at which it is one. Of its ``pictures``, those that
    count, ``compared`` have a p. ``decoy_similarities`` to the nearest extractions and ``decoy_scores`` are those that
    the references' are taken among.
    """

    reference_set: str
    pictures: int
    compared: int
    decoys: int
    extraction_p: float | None
    membership_p: float | None
    p: float | None
    uncalibrated: str | None
    backgrounds: list[dict[str, Any]] = field(default_factory=list)
    decoy_similarities: list[float] = field(default_factory=list)
    decoy_scores: list[float] = field(default_factory=list)
    fdr: float | None = None
    verdict: Verdict = Verdict.uncalibrated

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the backgrounds and what their pictures have."""
        left_out = ("backgrounds", "decoy_similarities", "decoy_scores")
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass(frozen=True)
class Pairing:
    """What was taken of a background as decoys of a set; ``suspects`` score as if they had been trained on.

    ``drawn``: it was declared a random split of one collection with the set.
    """

    reference_set: str
    background: str
    pictures: int
    copies: int
    trivial: int
    decoys: int
    problem: str | None
    suspects: list[str]
    drawn: bool = False


def chances_of(
    ask: Ask, audit_id: str, descriptor: str, weighed: Sequence[SetChance], asked: VerdictSettings
) -> list[Chance]:
    """The references of the ``weighed`` sets, the least likely by chance first; matches as ``asked``."""
    refused = {one.reference_set: one.uncalibrated for one in weighed if asked.rule is Rule.either and one.uncalibrated}
    rows = ask(
        """SELECT c.* EXCLUDE (audit_id), r.name
        FROM chances AS c JOIN "references" AS r USING (reference_set, reference_id)
        WHERE c.audit_id = ? AND r.descriptor_name = ? AND list_contains(?::VARCHAR[], c.reference_set)
        QUALIFY row_number() OVER (PARTITION BY c.reference_id
            ORDER BY list_contains(?::VARCHAR[], c.reference_set), c.p IS NULL, c.reference_set) = 1
        ORDER BY c.p NULLS LAST, c.reference_set, r.name""",
        [audit_id, descriptor, [one.reference_set for one in weighed], list(refused)],
    )
    found = [_by_rule(Chance(**row), asked.rule) for row in rows]
    found = [replace(one, p=None, uncalibrated=refused[one.reference_set]) if one.reference_set in refused else one
             for one in found]  # fmt: skip
    told = sorted((one for one in found if one.p is not None), key=lambda one: one.p or 0.0)
    others = unnamed(ask, audit_id, weighed)
    expected = expected_by_chance(np.array([one.p for one in told]), others)
    alone = false_discovery_rates(np.array([either_p(_there(one)) for one in told], float), others)
    at_rate = said_at(told, asked, others)
    said = [
        replace(one, fdr=fdr, alone_fdr=float(by_one), expected=float(by_chance), verdict=verdict)
        for one, by_one, by_chance, (fdr, verdict) in zip(told, alone, expected, at_rate, strict=True)
    ]
    return said + [replace(one, verdict=_without_p(one)) for one in found if one.p is None]


def _by_rule(one: _One, rule: Rule) -> _One:
    """``one`` with its p by the rule; the tables have that of both kinds of evidence together."""
    return replace(one, p=either_p(_there(one))) if rule is Rule.either and one.p is not None else one


def unnamed(ask: Ask, audit_id: str, weighed: Sequence[SetChance]) -> int:
    """How many references of ``weighed`` sets were compared and have no row of their own: those of large sets."""
    rows = ask(
        "SELECT reference_set, count(p) AS named FROM chances WHERE audit_id = ? "
        "AND list_contains(?::VARCHAR[], reference_set) GROUP BY ALL",
        [audit_id, [one.reference_set for one in weighed]],
    )
    named = {row["reference_set"]: row["named"] for row in rows}
    told = [one for one in weighed if one.uncalibrated is None]
    return sum(max(0, one.compared - named.get(one.reference_set, 0)) for one in told)


def said_at(told: Sequence[Chance | SetChance], asked: VerdictSettings, others: int = 0) -> list[tuple[float, Verdict]]:
    """For each of several things that have a p: from which rate on it counts, and what is said of it as ``asked``.

    ``others`` were compared beside.

    A match is one by all kinds of evidence that were asked for, what was drawn among them: what is like a training
    picture is known better than decoys as well, and does not come out. What one kind alone speaks for is possible. By
    the rule "either" one kind is enough.
    """
    rates = false_discovery_rates(np.array([one.p for one in told], float), others)
    return [(float(fdr), _verdict(one, float(fdr), asked)) for one, fdr in zip(told, rates, strict=True)]


def _verdict(one: Chance | SetChance, fdr: float, asked: VerdictSettings) -> Verdict:
    if fdr <= asked.fdr and (one.extraction_p is not None or asked.rule is Rule.either):
        return Verdict.match
    there = _there(one)
    least = either_p(there) if asked.rule is Rule.either else min(either_p(there), agreed_p(there))
    return Verdict.possible if least <= POSSIBLE else Verdict.none


def _there(one: Chance | SetChance) -> list[float]:
    return [p for p in (one.extraction_p, one.membership_p) if p is not None]


def _without_p(one: Chance) -> Verdict:
    return Verdict.none if one.caveat and one.uncalibrated is None else Verdict.uncalibrated


def set_chances_of(ask: Ask, audit_id: str, questions: Questions, asked: VerdictSettings) -> list[SetChance]:
    """The sets of ``questions`` that were weighed with just these pictures and decoys; matches as ``asked``."""
    rows = ask(
        "SELECT * EXCLUDE (audit_id, policy) FROM set_chances WHERE audit_id = ? "
        "AND list_contains(?::VARCHAR[], reference_set) ORDER BY p NULLS LAST, reference_set",
        [audit_id, list(questions.of)],
    )
    found = [SetChance(**row) for row in rows if row.pop("question") == questions.of[row["reference_set"]]]
    found = [_refused(_by_rule(one, asked.rule), questions, asked.rule) for one in found]
    told = sorted((one for one in found if one.p is not None), key=lambda one: one.p or 0.0)
    at_rate = zip(told, said_at(told, asked), strict=True)
    said = [replace(one, fdr=fdr, verdict=verdict) for one, (fdr, verdict) in at_rate]
    return said + [one for one in found if one.p is None]


def _refused(one: SetChance, questions: Questions, rule: Rule) -> SetChance:
    """A set of which the rule says nothing, as its decoys are not declared to be what the rule rests on."""
    why = undeclared(one.backgrounds or (), questions.drawn.get(one.reference_set, frozenset()))
    if rule is not Rule.either or why is None or one.uncalibrated:
        return one
    return replace(one, p=None, uncalibrated=why)


def undeclared(backgrounds: Sequence[dict[str, Any]], drawn: Collection[str]) -> str | None:
    """Why the rule "either" says nothing of a set with decoys of ``backgrounds``, of which ``drawn`` are declared.

    None where all that decoys were taken of are.
    """
    names = [one["background"] for one in backgrounds if one["decoys"] and one["background"] not in drawn]
    if not names:
        return None
    return (
        f"the rule 'either' asks for decoys that were declared a random split of one collection with these references, "
        f"as they are now, and {', '.join(sorted(names))} {'are' if len(names) > 1 else 'is'} not: if it is so, say it "
        "with 'scan --background FOLDER --drawn' or 'lora-audit references add NAME FOLDER --kind background --of SET "
        "--drawn'; if not, use --rule calibrated"
    )


def pairings_of(found: Sequence[SetChance], questions: Questions) -> list[Pairing]:
    """What was taken of each background as decoys of each set."""
    return [
        Pairing(one.reference_set, **row, drawn=row["background"] in questions.drawn.get(one.reference_set, ()))
        for one in found
        for row in one.backgrounds or ()
    ]
