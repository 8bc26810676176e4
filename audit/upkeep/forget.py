"""Audits that are taken away for good, as those of a checkpoint that was opted out."""

from __future__ import annotations

from collections.abc import Collection

from audit.schemas import TABLES
from audit.workspace import Workspace
from audit.workspace.names import REPORTS

# The row of audits comes last: killed before, it is still there to be taken away.
OF_AUDITS = [name for name, schema in TABLES.items() if "audit_id" in schema.names and name != "audits"] + ["audits"]


def forget_audits(workspace: Workspace, checkpoints: Collection[str]) -> list[str]:
    """Erase the audits of the ``checkpoints``, SHA256 of files; their ids.

    Their rows leave every table (pictures, scores, matches, failures), and their pages, with manifests and signatures,
    and the index pages of runs that list them are removed. Raises WorkspaceError where a damaged file could hold rows.
    """
    rows = workspace.rows(
        "SELECT audit_id FROM audits WHERE list_contains(?::VARCHAR[], checkpoint_sha256) ORDER BY audit_id",
        [sorted(checkpoints)],
    )
    audits = [str(row["audit_id"]) for row in rows]
    if not audits:
        return []
    for entry in workspace.files.list(REPORTS, recursive=True):  # what shows pictures goes first
        folder, _, name = entry.key.rpartition("/")
        if folder == REPORTS and name.partition(".")[0] in audits:
            workspace.files.remove(entry.key)
        elif name.endswith(".html") and folder != REPORTS and _names(workspace.files.read(entry.key), audits):
            for key in (entry.key, entry.key.removesuffix(".html") + ".json"):
                workspace.files.remove(key)
    for audit_id in audits:
        workspace.spool(audit_id).discard()
        for table in OF_AUDITS:
            workspace.erase("audit_id", audit_id, table)
    return audits


def _names(page: bytes | None, audits: Collection[str]) -> bool:
    """Whether an index page links to the page of one of ``audits``."""
    return page is not None and any(one.encode() in page for one in audits)
