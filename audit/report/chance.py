"""What a report says of each reference with its error rate: a verdict that follows from p-values among decoys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from audit.evidence.chance import FEWEST, expected_by_chance, false_discovery_rates, set_p
from audit.states import Verdict

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]
RATE = 0.05  # of the references that are called matches, the share that is wrong is at most this, on average
POSSIBLE = 0.05  # p from which a reference is worth a look


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
    """A whole set: how likely its membership scores are as high as they are, had it had no part (Mann and Whitney)."""

    reference_set: str
    pictures: int
    decoys: int
    p: float | None


def chances_of(ask: Ask, audit_id: str, descriptor: str, sets: Sequence[str], rate: float = RATE) -> list[Chance]:
    """The references of ``sets`` that were weighed, the least likely by chance first; matches at the ``rate``."""
    rows = ask(
        """SELECT c.* EXCLUDE (audit_id), r.name
        FROM chances AS c JOIN "references" AS r USING (reference_set, reference_id)
        WHERE c.audit_id = ? AND r.descriptor_name = ? AND list_contains(?::VARCHAR[], c.reference_set)
        QUALIFY row_number() OVER (PARTITION BY c.reference_id ORDER BY c.reference_set) = 1
        ORDER BY c.p NULLS LAST, c.reference_set, r.name""",
        [audit_id, descriptor, list(sets)],
    )
    weighed = np.array([row["p"] for row in rows if row["p"] is not None])
    rates, expected = false_discovery_rates(weighed), expected_by_chance(weighed)
    found = [Chance(**row) for row in rows]
    told = [
        replace(one, fdr=float(fdr), expected=float(by_chance), verdict=_verdict(one.p, float(fdr), rate))
        for one, fdr, by_chance in zip(found, rates, expected, strict=False)
    ]
    return told + [replace(one, verdict=_without_p(one)) for one in found[len(told) :]]


def _verdict(p: float | None, fdr: float, rate: float) -> Verdict:
    if fdr <= rate:
        return Verdict.match
    return Verdict.possible if p is not None and p <= POSSIBLE else Verdict.none


def _without_p(one: Chance) -> Verdict:
    return Verdict.none if one.caveat else Verdict.uncalibrated


def set_chances_of(ask: Ask, audit_id: str, sets: Sequence[str]) -> list[SetChance]:
    """Each of ``sets`` whose membership was measured, among the decoys that were."""
    sql = """SELECT list(m.score) AS scores FROM memberships AS m JOIN
        (SELECT DISTINCT reference_set, reference_id, kind FROM "references") AS r USING (reference_set, reference_id)
        WHERE m.audit_id = ? AND isfinite(m.score) AND """
    known = "list_contains(?::VARCHAR[], reference_set)"
    others = f"r.kind = 'background' AND m.reference_id NOT IN (SELECT reference_id FROM memberships WHERE {known})"
    decoys = _scores(ask(sql + others, [audit_id, list(sets)]))
    problems = {
        row["reference_set"]
        for row in ask("SELECT reference_set FROM chances WHERE audit_id = ? AND uncalibrated IS NOT NULL", [audit_id])
    }
    found = []
    for name in sets:
        scores = _scores(ask(sql + "m.reference_set = ?", [audit_id, name]))
        if len(scores):
            p = set_p(scores, decoys) if len(decoys) >= FEWEST and name not in problems else None
            found.append(SetChance(name, len(scores), len(decoys), p))
    return found


def _scores(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array(rows[0]["scores"] or [], float)
