"""Finished audits matched with reference sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa

from audit.errors import WorkspaceError
from audit.references.match import match_extractions
from audit.references.weigh import WEIGHED, Weighed, weigh_in
from audit.workspace import Workspace


def match_audit(workspace: Workspace, audit_id: str, sets: Sequence[str]) -> None:
    """Match a finished audit with reference sets, and weigh it; a file a set, replaced when it is matched again.

    Raises WorkspaceError where a set is not there any more: an audit without its matches would pass for one that found
    nothing.
    """
    if not sets:
        return

    def ask(connection: duckdb.DuckDBPyConnection) -> tuple[dict[str, list[dict[str, Any]]], Weighed]:
        return _found(connection, workspace, audit_id, sets), weigh_in(connection, audit_id, sets)

    rows_of, weighed = workspace.asked(ask, WEIGHED)
    for name, rows in rows_of.items():
        workspace.write("matches", f"{audit_id}.{name}", rows)
        for table in ("chances", "set_chances"):  # the last has the question: what is there is whole
            mine = [row for row in getattr(weighed, table) if row["reference_set"] == name]
            workspace.write(table, f"{audit_id}.{name}", mine)


def _found(
    connection: duckdb.DuckDBPyConnection, workspace: Workspace, audit_id: str, sets: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of matches by set, all from one view of the tables."""

    def table(sql: str, value: str) -> pa.Table:
        return connection.sql(sql, params=[value]).to_arrow_table()

    sql = "SELECT descriptor, threshold, descriptor_size FROM audits WHERE audit_id = ?"
    [audit] = table(sql, audit_id).to_pylist()
    there = table('SELECT DISTINCT reference_set FROM "references" WHERE descriptor_name = ?', audit["descriptor"])
    missing = [name for name in sets if name not in there["reference_set"].to_pylist()]
    if missing:
        raise WorkspaceError(
            f"the reference set {missing[0]!r} is not in {workspace.files} any more, described by "
            f"{audit['descriptor']}: add it again, or leave it out"
        )
    extractions = table("SELECT * EXCLUDE (image) FROM extractions WHERE audit_id = ?", audit_id)
    control = table("SELECT descriptor FROM control_generations WHERE audit_id = ?", audit_id)
    size, threshold = audit["descriptor_size"] or 0, audit["threshold"]
    return {
        name: match_extractions(connection, extractions, [name], audit["descriptor"], threshold, size, control=control)
        for name in sets
    }
