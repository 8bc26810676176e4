"""Finished audits matched and reported again: no model is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from audit.config import VerdictSettings
from audit.custody.keep import NOBODY, Custody, KeptHashes, sign_one_of_many
from audit.references.audits import BLOCK, match_audit, match_audits
from audit.report.facts import collect
from audit.report.index import Answer, Together, together
from audit.report.page import write_page
from audit.workspace import Workspace


def match_again(
    workspace: Workspace,
    sets: Sequence[str],
    audits: Sequence[str] | None = None,
    tell: Callable[[str, int, int], None] = lambda stage, done, total: None,
    asked: VerdictSettings | None = None,
    custody: Custody = NOBODY,
) -> tuple[Together, dict[str, int]]:
    """Match finished ``audits``, or all, with ``sets`` and write their pages; what matches over all of them.

    Also how many audits were left out, by reason: their descriptor is not one that all the sets were described by.
    """
    described = workspace.rows(
        'SELECT descriptor_name, count(DISTINCT reference_set) AS n FROM "references" '
        "WHERE list_contains(?::VARCHAR[], reference_set) GROUP BY ALL",
        [list(sets)],
    )
    usable = {row["descriptor_name"] for row in described if row["n"] == len(set(sets))}
    rows = workspace.rows("SELECT audit_id, checkpoint_name, descriptor FROM audits ORDER BY audit_id")
    rows = [row for row in rows if audits is None or row["audit_id"] in audits]
    left_out = Counter(f"they were described by {row['descriptor']}, the sets were not" for row in rows
                       if row["descriptor"] not in usable)  # fmt: skip
    rows = [row for row in rows if row["descriptor"] in usable]
    answers = []
    hashes = KeptHashes(workspace)
    for number, row in enumerate(rows):
        tell("matching", number, len(rows))
        if number % BLOCK == 0:
            match_audits(workspace, [one["audit_id"] for one in rows[number : number + BLOCK]], sets)
        facts = collect(workspace, row["audit_id"], sets, asked, hashes)
        page, said = write_page(facts, workspace, custody), facts.verdict
        sign_one_of_many(workspace, page, custody)
        answers.append(
            Answer(
                row["audit_id"], row["checkpoint_name"], "", said.said, len(said.matched), len(said.matched_sets), page,
                said.tells_nothing is not None,
            )
        )  # fmt: skip
    tell("matching", len(rows), len(rows))
    return together(workspace, answers, sets, asked or VerdictSettings()), dict(left_out)


def compare_again(workspace: Workspace, audit_id: str, sets: Sequence[str]) -> str:
    """Match a finished audit with ``sets`` as they are now, or with those that it was matched with; its id.

    Raises WorkspaceError where one of ``sets`` is not there, or not described by the audit's descriptor.
    """
    if not sets:
        rows = workspace.rows(
            """SELECT DISTINCT m.reference_set FROM matches AS m JOIN audits AS a USING (audit_id)
            JOIN "references" AS r ON r.reference_set = m.reference_set AND r.descriptor_name = a.descriptor
            WHERE m.audit_id = ?""",
            [audit_id],
        )
        sets = sorted(row["reference_set"] for row in rows)
    match_audit(workspace, audit_id, sets)
    return audit_id
