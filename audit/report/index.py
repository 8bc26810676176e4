"""The index page of a run: every audit it finished, those with matches first, with links to their pages.

A match there is one over all audits of the run together: of many, some would match by chance. A page speaks of its
audit alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from audit.config import Rule, VerdictSettings
from audit.evidence.chance import KINDS, expected_by_chance, false_discovery_rates
from audit.references.decoys import questions_of
from audit.report.chance import undeclared
from audit.report.page import environment
from audit.report.pages import FOLDER, keep_sets
from audit.states import Verdict
from audit.workspace import Workspace

RUNS = f"{FOLDER}/runs"


@dataclass(frozen=True)
class Answer:
    """What was found of one audit: its verdict, how many pictures and sets match, and where its page is."""

    audit_id: str
    name: str
    item_id: str
    verdict: Verdict | None
    matches: int
    matched_sets: int
    page: str
    tells_nothing: bool


@dataclass(frozen=True)
class Together:
    """The answers of many audits, at one rate over all of them.

    ``compared`` pairs of a checkpoint and a reference have a p; of those that match, ``expected`` would by chance.
    """

    asked: VerdictSettings
    answers: list[Answer] = field(default_factory=list)
    compared: int = 0
    expected: float = 0.0

    def those(self, verdict: Verdict) -> list[Answer]:
        """The answers whose verdict it is."""
        return [one for one in self.answers if one.verdict == verdict]


def together(workspace: Workspace, answers: Sequence[Answer], sets: Sequence[str], asked: VerdictSettings) -> Together:
    """``answers`` of audits that were just weighed, with matches over all of them; the most matches first."""
    if asked.rule is Rule.fixed or not answers or not sets:
        return Together(asked, _ordered(answers))
    rows = _told(workspace, [one.audit_id for one in answers], list(sets), asked.rule)
    pictures, whole = ([row for row in rows if row["is_set"] is is_set] for is_set in (False, True))
    p = np.array([row["p"] for row in pictures])
    others = _unnamed(workspace, [one.audit_id for one in answers], list(sets), asked.rule)
    counts = false_discovery_rates(p, others) <= asked.fdr
    sets_count = false_discovery_rates(np.array([row["p"] for row in whole])) <= asked.fdr
    matches, matched_sets = _count(pictures, counts), _count(whole, sets_count)
    told = [_with(one, matches.get(one.audit_id, 0), matched_sets.get(one.audit_id, 0)) for one in answers]
    expected = float(expected_by_chance(p, others)[counts].max()) if counts.any() else 0.0
    return Together(asked, _ordered(told), len(p) + others, expected)


def _told(workspace: Workspace, audits: list[str], sets: list[str], rule: Rule) -> list[dict[str, Any]]:
    """The p by the rule of all pictures, each once for an audit, and of all sets (``is_set``) that can match."""
    p, counts = "p", "extraction_p IS NOT NULL"
    refused: list[str] = []
    if rule is Rule.either:
        p, counts = f"least(1.0, {KINDS} * list_min([extraction_p, membership_p]))", "true"
        refused = _refused(workspace, audits, sets)
    where = (
        f"WHERE p IS NOT NULL AND {counts} AND audit_id IN (SELECT unnest(?::VARCHAR[])) "
        "AND list_contains(?::VARCHAR[], reference_set) "
        "AND audit_id || ' ' || reference_set NOT IN (SELECT unnest(?::VARCHAR[]))"
    )
    return workspace.rows(
        f"SELECT audit_id, true AS is_set, {p} AS p FROM set_chances {where} UNION ALL "
        f"SELECT audit_id, false, arg_min({p}, reference_set) FROM chances {where} GROUP BY audit_id, reference_id",
        [audits, sets, refused, audits, sets, refused],
    )


def _unnamed(workspace: Workspace, audits: list[str], sets: list[str], rule: Rule) -> int:
    """How many references of large sets were compared, and have no row of their own."""
    refused = _refused(workspace, audits, sets) if rule is Rule.either else []
    where = (
        "audit_id IN (SELECT unnest(?::VARCHAR[])) AND list_contains(?::VARCHAR[], reference_set) "
        "AND audit_id || ' ' || reference_set NOT IN (SELECT unnest(?::VARCHAR[]))"
    )
    [row] = workspace.rows(
        f"""SELECT coalesce(sum(greatest(compared - coalesce(named, 0), 0)), 0)::BIGINT AS others FROM set_chances
        LEFT JOIN (SELECT audit_id, reference_set, count(p) AS named FROM chances GROUP BY ALL)
        USING (audit_id, reference_set) WHERE uncalibrated IS NULL AND {where}""",
        [audits, sets, refused],
    )
    return int(row["others"])


def _refused(workspace: Workspace, audits: list[str], sets: list[str]) -> list[str]:
    """AUDIT SET of those of which the rule "either" says nothing, for their decoys."""
    rows = workspace.rows(
        """SELECT audit_id, descriptor, reference_set, backgrounds FROM set_chances JOIN audits USING (audit_id)
        WHERE audit_id IN (SELECT unnest(?::VARCHAR[])) AND list_contains(?::VARCHAR[], reference_set)""",
        [audits, sets],
    )
    drawn = {name: questions_of(workspace.rows, name, sets).drawn for name in {row["descriptor"] for row in rows}}
    return [
        f"{row['audit_id']} {row['reference_set']}" for row in rows
        if undeclared(row["backgrounds"] or (), drawn[row["descriptor"]].get(row["reference_set"], ()))
    ]  # fmt: skip


def in_words(found: Together) -> str:
    """What a run, or a comparison of finished audits, found: one line with its denominators."""
    matched = found.those(Verdict.match)
    whole = f"{len(found.answers)} audit{'s' if len(found.answers) != 1 else ''}"
    said = f"{len(matched)} of {whole} with matches"
    if found.asked.rule is Rule.fixed:
        return f"{said}, by a fixed threshold whose error rate is not known"
    pictures, sets = sum(one.matches for one in matched), sum(one.matched_sets for one in matched)
    if matched:
        said += (
            f" ({pictures} pictures of {found.compared} compared, {sets} whole sets; of 100 such, at most "
            f"{100 * found.asked.fdr:.3g} are wrong on average, and {found.expected:.2g} pictures would be by chance)"
        )
    uncalibrated = len(found.those(Verdict.uncalibrated))
    return said + (f"; {uncalibrated} without a verdict, for lack of decoys" if uncalibrated else "")


def _count(rows: list[dict[str, Any]], chosen: np.ndarray) -> dict[str, int]:
    found: dict[str, int] = {}
    for row, one in zip(rows, chosen, strict=True):
        found[row["audit_id"]] = found.get(row["audit_id"], 0) + int(one)
    return found


def _with(answer: Answer, matches: int, matched_sets: int) -> Answer:
    """The answer with what matches over all: what matches alone and not among so many is possible."""
    verdict = answer.verdict
    if matches or matched_sets:
        verdict = Verdict.match
    elif verdict is Verdict.match:
        verdict = Verdict.possible
    tells_nothing = answer.tells_nothing and verdict is not Verdict.match
    return replace(answer, verdict=verdict, matches=matches, matched_sets=matched_sets, tells_nothing=tells_nothing)


def _ordered(answers: Sequence[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda one: (-one.matches, -one.matched_sets, one.tells_nothing, one.name))


def write_index(workspace: Workspace, run_id: str, sets: Sequence[str], found: Together) -> str:
    """Write the page; where it is."""
    html = environment().get_template("index.html").render(run_id=run_id, sets=list(sets), found=found)
    key = f"{RUNS}/{run_id}.html"
    keep_sets(workspace, key, sets)
    workspace.files.write(key, html.encode())
    return f"{workspace.files}/{key}"
