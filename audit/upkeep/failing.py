"""Audits that have failed and have no result since, grouped by reason."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from audit.states import Attempt
from audit.workspace import Workspace

# The last word on every audit that has failed and is not finished since: also one that is sampled but not matched.
LATEST = """SELECT * FROM failures AS f WHERE state <> 'forgiven'
    AND NOT EXISTS (SELECT 1 FROM audits AS a WHERE a.audit_id = f.audit_id AND a.finished_at > f.failed_at)
    AND failed_at > coalesce((SELECT max(failed_at) FROM failures AS g WHERE g.audit_id = f.audit_id
        AND g.state = 'forgiven'), TIMESTAMPTZ 'epoch')
    QUALIFY row_number() OVER (PARTITION BY audit_id ORDER BY failed_at DESC) = 1"""


@dataclass(frozen=True)
class FailureGroup:
    """Audits that failed for one reason, but for names and numbers; ``items`` are at most 100, the newest first."""

    state: str
    kind: str
    reason: str
    audits: int
    items: list[str]
    newest_reason: str
    newest_at: datetime


def _grouped(rows: list[dict[str, Any]]) -> list[FailureGroup]:
    """``rows`` grouped by reason, each item once with its newest row; the largest group first."""
    newest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["failed_at"], reverse=True):
        newest.setdefault(row["item_id"], row)
    members: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in newest.values():
        members.setdefault((row["state"], row["kind"], _general(row["reason"])), []).append(row)
    found = [
        FailureGroup(*key, len(of), [row["item_id"] for row in of[:100]], of[0]["reason"], of[0]["failed_at"])
        for key, of in members.items()
    ]
    return sorted(found, key=lambda group: -group.audits)


def _general(reason: str) -> str:
    """A reason without what differs from case to case: quoted names, paths, numbers and trace ids."""
    reason = re.sub(r" \(trace [0-9a-f]{8}\)", "", reason)
    return re.sub(r"'[^']*'|(?<![^\s'])[^\s/']*/\S+|\b[0-9a-f]{12,}\b|\d+", "*", reason[:2000])[:200]


@dataclass(frozen=True)
class Failures:
    """The groups, the largest first, and how many audits the next run tries again because of this question."""

    groups: list[FailureGroup]
    forgiven: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit failures --json`` prints them."""
        return {"forgiven": self.forgiven, "groups": [asdict(group) for group in self.groups]}


def failures(workspace: Workspace, kind: str | None = None, retry: bool = False) -> Failures:
    """What has failed for reasons of ``kind`` (None: of any); ``retry`` lets the next run try it all again.

    A file that has failed under several configurations counts once, with what was said of it last, and is released
    under all of them.
    """
    rows = [row for row in workspace.rows(LATEST) if kind in (None, row["kind"])]
    if retry and rows:
        latest = max(row["failed_at"] for row in rows) + timedelta(microseconds=1)  # also where a clock was set back
        now = max(datetime.now(UTC), latest)
        workspace.append("failures", [row | {"state": Attempt.forgiven, "failed_at": now} for row in rows])
    return Failures(_grouped(rows), len(rows) if retry else 0)
