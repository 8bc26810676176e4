"""What a workspace holds, and what runs are doing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from audit.engine.state import RunState, is_alive, read_runs
from audit.upkeep.failing import LATEST
from audit.workspace import Workspace

MOST_RUNS = 10


@dataclass(frozen=True)
class Status:
    """``catalog`` has items by source and state, ``failures`` audits by state, ``runs`` the newest, and if alive.

    ``alike_audits`` gave back pictures that look like a reference by the fixed threshold, which is no verdict.
    """

    catalog: list[dict[str, Any]]
    audits: int
    images: int
    last: datetime | None
    alike_audits: int
    failures: list[dict[str, Any]]
    runs: list[tuple[RunState, bool]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit status --json`` prints them."""
        plain = {
            name: getattr(self, name) for name in ("catalog", "audits", "images", "last", "alike_audits", "failures")
        }
        return {**plain, "runs": [{**asdict(run), "alive": alive} for run, alive in self.runs]}


def status(workspace: Workspace) -> Status:
    """What ``workspace`` holds now."""
    [totals] = workspace.rows(
        "SELECT count(*) AS audits, coalesce(sum(images), 0)::BIGINT AS images, max(finished_at) AS last FROM audits"
    )
    return Status(
        catalog=workspace.rows("SELECT source, state, count(*) AS items FROM checkpoints GROUP BY ALL ORDER BY ALL"),
        alike_audits=workspace.rows("SELECT count(DISTINCT audit_id) AS n FROM matches WHERE is_match")[0]["n"],
        failures=workspace.rows(f"SELECT state, count(*) AS audits FROM ({LATEST}) GROUP BY ALL ORDER BY ALL"),
        runs=[(run, is_alive(run)) for run in read_runs(workspace)[:MOST_RUNS]],
        **totals,
    )
