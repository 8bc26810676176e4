"""Finished audits matched with reference sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from audit.errors import WorkspaceError
from audit.references.index import open_bank
from audit.references.match import match_extractions
from audit.references.normalized import normalized
from audit.references.parts import open_parts
from audit.references.second_look import looked_at_again
from audit.references.silence import Rule, rules_of
from audit.references.weigh import WEIGHED, Weighed, weigh_in
from audit.workspace import Workspace

BLOCK = 64  # audits that are matched together, some thousand extractions: references are read once for all of them


def match_audit(workspace: Workspace, audit_id: str, sets: Sequence[str]) -> None:
    """Match a finished audit with reference sets, and weigh it; see match_audits."""
    match_audits(workspace, [audit_id], sets)


def match_audits(workspace: Workspace, audits: Sequence[str], sets: Sequence[str]) -> None:
    """Match finished audits with reference sets, and weigh them; a file an audit and set, replaced when done again.

    Raises WorkspaceError where a set is not there any more: an audit without its matches would pass for one that found
    nothing.
    """
    if not sets or not audits:
        return

    def ask(connection: duckdb.DuckDBPyConnection) -> tuple[pa.Table, list[Weighed]]:
        rules: dict[str, dict[str, Rule]] = {}
        found = pa.concat_tables(_found(connection, workspace, audits, sets, rules))
        return found, [weigh_in(connection, workspace, one, sets, rules[one]) for one in audits]

    found, weighed = workspace.asked(ask, f"{WEIGHED} policies")
    for audit_id, chances in zip(audits, weighed, strict=True):
        mine = found.filter(pc.equal(found["audit_id"], audit_id))
        for name in sets:
            workspace.write("matches", f"{audit_id}.{name}", mine.filter(pc.equal(mine["reference_set"], name)))
            for table in ("chances", "set_chances"):  # the last has the question: what is there is whole
                rows = [row for row in getattr(chances, table) if row["reference_set"] == name]
                workspace.write(table, f"{audit_id}.{name}", rows)


def _found(
    connection: duckdb.DuckDBPyConnection, workspace: Workspace, audits: Sequence[str], sets: Sequence[str],
    rules_of_audits: dict[str, dict[str, Rule]],
) -> Iterable[pa.Table]:  # fmt: skip
    """Rows of matches, all from one view of the tables; by what rules is put into ``rules_of_audits``."""

    def table(sql: str, *values: object) -> pa.Table:
        return connection.sql(sql, params=list(values)).to_arrow_table()

    sql = """SELECT descriptor, threshold, coalesce(descriptor_size, 0) AS size, list(audit_id) AS audits FROM audits
        WHERE list_contains(?::VARCHAR[], audit_id) GROUP BY ALL ORDER BY ALL"""
    for alike in table(sql, list(audits)).to_pylist():
        described_by = alike["descriptor"]
        there = table('SELECT DISTINCT reference_set FROM "references" WHERE descriptor_name = ?', described_by)
        missing = [name for name in sets if name not in there["reference_set"].to_pylist()]
        if missing:
            raise WorkspaceError(
                f"the reference set {missing[0]!r} is not in {workspace.files} any more, described by "
                f"{described_by}: add it again, or leave it out"
            )
        extractions = table(
            """SELECT * EXCLUDE (image) FROM extractions WHERE list_contains(?::VARCHAR[], audit_id)
            ORDER BY audit_id, rank""",
            alike["audits"],
        )
        control = table(
            "SELECT audit_id, descriptor FROM control_generations WHERE list_contains(?::VARCHAR[], audit_id)",
            alike["audits"],
        )
        banks = {name: open_bank(connection, workspace, name, described_by) for name in sets}
        opened = {name: open_parts(connection, bank, name, described_by) for name, bank in banks.items()}
        rules = rules_of(connection, workspace, described_by, alike["threshold"], banks)
        rules_of_audits |= dict.fromkeys(alike["audits"], rules)
        matches = match_extractions(
            connection, extractions, banks, alike["threshold"], alike["size"], control=control, rules=rules,
            parts={name: one for name, one in opened.items() if one},
        )  # fmt: skip
        matches = normalized(table, matches, extractions, described_by)
        yield looked_at_again(connection, matches, described_by)
