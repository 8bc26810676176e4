"""Everything a report says about one audit, read back from the workspace's tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from audit.errors import WorkspaceError
from audit.storage import Workspace


@dataclass(frozen=True)
class Match:
    """One reference near an extraction, with both similarities."""

    reference_set: str
    reference_id: str
    name: str
    similarity: float
    pdq_distance: int | None
    is_match: bool
    evidence: str
    thumbnail: bytes | None


@dataclass(frozen=True)
class Extraction:
    """One extraction, and its nearest references, the nearest first."""

    rank: int
    confidence: float
    size: int
    tightness: float
    image: bytes | None
    matches: list[Match]


@dataclass(frozen=True)
class AuditFacts:
    """One finished audit. ``row`` is its line of the audits table."""

    row: dict[str, Any]
    checkpoint: dict[str, Any]
    captions: list[dict[str, Any]]
    extractions: list[Extraction]
    evaluations: list[dict[str, Any]]
    reference_sets: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it ran under."""
        return json.loads(self.row["settings"])

    @property
    def matched(self) -> list[tuple[Extraction, Match]]:
        """Each reference that was matched, once, with the extraction nearest to it; the most similar first."""
        best: dict[tuple[str, str], tuple[Extraction, Match]] = {}
        for extraction in self.extractions:
            for match in extraction.matches:
                key = (match.reference_set, match.reference_id)
                if match.is_match and (key not in best or best[key][1].similarity < match.similarity):
                    best[key] = (extraction, match)
        return sorted(best.values(), key=lambda pair: -pair[1].similarity)

    def as_json(self) -> dict[str, Any]:
        """Plain values for scripts: everything but pictures and vectors."""
        row = {**self.row, "settings": self.settings, "versions": json.loads(self.row["versions"])}
        row["finished_at"] = self.row["finished_at"].isoformat()
        checkpoint = {
            name: value.isoformat() if isinstance(value, datetime) else value for name, value in self.checkpoint.items()
        } | {"claimed_metadata": json.loads(self.checkpoint["claimed_metadata"])}
        return {
            "audit": row,
            "checkpoint": checkpoint,
            "captions": self.captions,
            "reference_sets": self.reference_sets,
            "matched_references": [
                {"reference_set": match.reference_set, "reference_id": match.reference_id, "name": match.name,
                 "similarity": match.similarity, "pdq_distance": match.pdq_distance, "evidence": match.evidence,
                 "rank": extraction.rank}
                for extraction, match in self.matched
            ],
            "extractions": [
                {"rank": extraction.rank, "confidence": extraction.confidence, "size": extraction.size,
                 "tightness": extraction.tightness,
                 "matches": [
                     {name: value for name, value in vars(match).items() if name != "thumbnail"}
                     for match in extraction.matches
                 ]}
                for extraction in self.extractions
            ],
            "evaluations": self.evaluations,
        }  # fmt: skip


def find_audit(workspace: Workspace, beginning: str) -> str:
    """The id of the finished audit that starts with ``beginning``. Raises WorkspaceError for none or several."""
    rows = workspace.rows(
        "SELECT audit_id FROM audits WHERE starts_with(audit_id, ?) ORDER BY finished_at", [beginning]
    )
    if len(rows) == 1:
        return str(rows[0]["audit_id"])
    if rows:
        raise WorkspaceError(f"{len(rows)} audits start with {beginning!r}: give more of the id")
    raise WorkspaceError(
        f"no finished audit starts with {beginning!r} in {workspace.files}: see 'lora-audit query \"SELECT audit_id, "
        "checkpoint_name FROM audits\"'"
    )


def collect(workspace: Workspace, audit_id: str) -> AuditFacts:
    """Read one finished audit back. Raises WorkspaceError where there is none."""
    audit_id = find_audit(workspace, audit_id)
    row = workspace.rows("SELECT * FROM audits WHERE audit_id = ?", [audit_id])[0]
    checkpoint = workspace.rows("SELECT * FROM checkpoints WHERE checkpoint_sha256 = ?", [row["checkpoint_sha256"]])[0]
    captions = row.pop("captions")
    matches = workspace.rows(
        """SELECT m.*, r.name, r.thumbnail FROM matches AS m LEFT JOIN "references" AS r
        ON r.reference_set = m.reference_set AND r.reference_id = m.reference_id AND r.descriptor_name = ?
        WHERE m.audit_id = ? ORDER BY m.rank, m.similarity DESC, m.position""",
        [row["descriptor"], audit_id],
    )
    by_rank: dict[int, list[Match]] = {}
    for found in matches:
        match = Match(
            found["reference_set"], found["reference_id"], found["name"] or "(removed from the workspace)",
            found["similarity"], found["pdq_distance"], found["is_match"], found["evidence"], found["thumbnail"],
        )  # fmt: skip
        by_rank.setdefault(found["rank"], []).append(match)
    extractions = [
        Extraction(matches=by_rank.get(found["rank"], []), **found)
        for found in workspace.rows(
            "SELECT rank, confidence, size, tightness, image FROM extractions WHERE audit_id = ? ORDER BY rank",
            [audit_id],
        )
    ]
    evaluations = workspace.rows(
        "SELECT * EXCLUDE (audit_id) FROM evaluations WHERE audit_id = ? ORDER BY kind DESC", [audit_id]
    )
    sets = sorted({found["reference_set"] for found in matches})
    return AuditFacts(row, checkpoint, captions, extractions, evaluations, sets)
