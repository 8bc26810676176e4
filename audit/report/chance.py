"""What is said of each reference, and of each set, with its error rate: it follows from p-values among decoys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from audit.evidence.chance import POSSIBLE, expected_by_chance, false_discovery_rates
from audit.references.decoys import Questions
from audit.states import Verdict

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Chance:
    """One reference. ``fdr`` is the smallest rate of wrong ones among the matches at which it is one.

    ``expected`` is how many of the references compared would have so small a p had none been trained on.
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
    expected: float | None = None
    verdict: Verdict = Verdict.uncalibrated


@dataclass(frozen=True)
class SetChance:
    """A whole set: how likely its membership scores are as high as they are, had it had no part (Mann and Whitney).

    ``fdr`` is the smallest rate of wrong ones among such sets at which it is one.
    """

    reference_set: str
    pictures: int
    decoys: int
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
    weighed = np.array([row["p"] for row in rows if row["p"] is not None])
    rates, expected = false_discovery_rates(weighed), expected_by_chance(weighed)
    found = [Chance(**row) for row in rows]
    told = [
        replace(one, fdr=float(fdr), expected=float(by_chance), verdict=said_at(one.p, float(fdr), rate))
        for one, fdr, by_chance in zip(found, rates, expected, strict=False)
    ]
    return told + [replace(one, verdict=_without_p(one)) for one in found[len(told) :]]


def said_at(p: float | None, fdr: float, rate: float) -> Verdict:
    """What is said at the ``rate`` of something whose p is one of many, which makes it count from ``fdr`` on."""
    if fdr <= rate:
        return Verdict.match
    return Verdict.possible if p is not None and p <= POSSIBLE else Verdict.none


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
    rates = false_discovery_rates(np.array([one.p for one in found if one.p is not None]))
    told = [
        replace(one, fdr=float(fdr), verdict=said_at(one.p, float(fdr), rate))
        for one, fdr in zip(found, rates, strict=False)
    ]
    return told + found[len(told) :]
