"""What is said of each reference, and of each set, with its error rate: it follows from p-values among decoys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from audit.evidence.chance import POSSIBLE, agreed_p, either_p, expected_by_chance, false_discovery_rates
from audit.references.decoys import Questions
from audit.states import Verdict

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Chance:
    """One reference. ``fdr`` is the smallest rate of wrong ones among the matches at which it is one.

    ``alone_fdr`` is that rate where one kind of evidence is enough. ``expected`` is how many of the references compared
    would have so small a p had none been trained on. ``control_similarity`` is the cosine of the control generation
    nearest to it, number ``control_index``.
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

    def is_drawn_alone(self, threshold: float) -> bool:
        """Whether the base alone draws it as well: as near as the extractions, or as the ``threshold``."""
        if self.control_similarity is None or self.similarity is None:
            return False
        return self.control_similarity >= min(self.similarity, threshold)


@dataclass(frozen=True)
class SetChance:
    """A whole set: how likely what speaks for it is, had it had no part (Mann and Whitney).

    ``fdr`` is the smallest rate of wrong ones among such sets at which it is one.
    """

    reference_set: str
    pictures: int
    decoys: int
    extraction_p: float | None
    membership_p: float | None
    p: float | None
    uncalibrated: str | None
    backgrounds: list[dict[str, Any]] = field(default_factory=list)
    fdr: float | None = None
    verdict: Verdict = Verdict.uncalibrated

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the backgrounds."""
        return {name: value for name, value in vars(self).items() if name != "backgrounds"}

    @property
    def pairings(self) -> list[Pairing]:
        """What was taken of each background."""
        return [Pairing(self.reference_set, **one) for one in self.backgrounds]


@dataclass(frozen=True)
class Pairing:
    """What was taken of a background as decoys of a set; ``suspects`` score as if they had been trained on."""

    reference_set: str
    background: str
    pictures: int
    copies: int
    trivial: int
    decoys: int
    problem: str | None
    suspects: list[str]


def chances_of(ask: Ask, audit_id: str, descriptor: str, sets: Sequence[str], rate: float) -> list[Chance]:
    """The references of ``sets`` that were weighed, the least likely by chance first; matches at the ``rate``."""
    rows = ask(
        """SELECT c.* EXCLUDE (audit_id), r.name
        FROM chances AS c JOIN "references" AS r USING (reference_set, reference_id)
        WHERE c.audit_id = ? AND r.descriptor_name = ? AND list_contains(?::VARCHAR[], c.reference_set)
        QUALIFY row_number() OVER (PARTITION BY c.reference_id ORDER BY c.p IS NULL, c.reference_set) = 1
        ORDER BY c.p NULLS LAST, c.reference_set, r.name""",
        [audit_id, descriptor, list(sets)],
    )
    found = [Chance(**row) for row in rows]
    told = [one for one in found if one.p is not None]
    expected = expected_by_chance(np.array([one.p for one in told]))
    alone = false_discovery_rates(np.array([either_p(_there(one)) for one in told], float))
    said = [
        replace(one, fdr=fdr, alone_fdr=float(by_one), expected=float(by_chance), verdict=verdict)
        for one, by_one, by_chance, (fdr, verdict) in zip(told, alone, expected, said_at(told, rate), strict=True)
    ]
    return said + [replace(one, verdict=_without_p(one)) for one in found[len(told) :]]


def said_at(told: Sequence[Chance | SetChance], rate: float) -> list[tuple[float, Verdict]]:
    """For each of several things that have a p: from which rate on it counts, and what is said of it at ``rate``.

    A match is one by all kinds of evidence that were asked for, what was drawn among them: what is like a training
    picture is known better than decoys as well, and does not come out. What one kind alone speaks for is possible.
    """
    rates = false_discovery_rates(np.array([one.p for one in told], float))
    return [(float(fdr), _verdict(one, float(fdr), rate)) for one, fdr in zip(told, rates, strict=True)]


def _verdict(one: Chance | SetChance, fdr: float, rate: float) -> Verdict:
    if fdr <= rate and one.extraction_p is not None:
        return Verdict.match
    there = _there(one)
    return Verdict.possible if min(either_p(there), agreed_p(there)) <= POSSIBLE else Verdict.none


def _there(one: Chance | SetChance) -> list[float]:
    return [p for p in (one.extraction_p, one.membership_p) if p is not None]


def _without_p(one: Chance) -> Verdict:
    return Verdict.none if one.caveat and one.uncalibrated is None else Verdict.uncalibrated


def set_chances_of(ask: Ask, audit_id: str, questions: Questions, rate: float) -> list[SetChance]:
    """The sets of ``questions`` that were weighed with just these pictures and decoys; matches at the ``rate``."""
    rows = ask(
        "SELECT * EXCLUDE (audit_id) FROM set_chances WHERE audit_id = ? "
        "AND list_contains(?::VARCHAR[], reference_set) ORDER BY p NULLS LAST, reference_set",
        [audit_id, list(questions.of)],
    )
    found = [SetChance(**row) for row in rows if row.pop("question") == questions.of[row["reference_set"]]]
    told = [one for one in found if one.p is not None]
    at_rate = zip(told, said_at(told, rate), strict=True)
    said = [replace(one, fdr=fdr, verdict=verdict) for one, (fdr, verdict) in at_rate]
    return said + found[len(told) :]
