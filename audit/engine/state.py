"""The state of a run, which it keeps in ``runs/``, and those of a workspace's runs read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from audit.states import RunStatus
from audit.workspace import Workspace
from audit.workspace.leases import LATEST, is_recent


@dataclass
class RunState:
    """What a run has done so far; it is written to ``runs/`` with every heartbeat.

    While it goes on, matches are those of each audit by itself; at its end those at one rate over all of them.
    """

    run_id: str
    shard: str
    host: str
    pid: int
    started_at: float
    config: dict[str, Any]
    state: str = RunStatus.running
    heartbeat_at: float = 0.0
    finished: int = 0
    failed: int = 0
    quarantined: int = 0
    retries: int = 0
    matches: int = 0
    matched_audits: int = 0
    images: int = 0
    evaluations: int = 0
    busy_seconds: float = 0.0
    gpu_hours: float = 0.0
    waiting: int = 0
    running: int = 0
    workers: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    told_nothing: int = 0
    uncalibrated: int = 0
    possible: int = 0
    compared: int = 0
    expected: float = 0.0
    matched: list[dict[str, Any]] = field(default_factory=list)
    index: str = ""


def read_runs(workspace: Workspace) -> list[RunState]:
    """The runs of a workspace, the newest first; files that are damaged or of another version are passed over."""
    found = (read_run(workspace, entry.key) for entry in workspace.files.list("runs") if entry.key.endswith(".json"))
    return sorted((run for run in found if run is not None), key=lambda run: -run.started_at)


def read_run(workspace: Workspace, key: str) -> RunState | None:
    """The run in the file ``key``; None where it is gone, damaged, or of another version."""
    try:
        run = RunState(**json.loads(workspace.files.read(key) or b""))
    except (ValueError, TypeError, RecursionError):
        return None
    return run if all(_is_one(getattr(run, field.name), str(field.type)) for field in fields(run)) else None


def _is_one(value: Any, kind: str) -> bool:
    """Whether ``value`` is of the type that RunState names ``kind``."""
    if kind == "float":
        return isinstance(value, int | float) and 0 <= value < LATEST
    kinds = {"str": str, "int": int, "list[dict[str, Any]]": list}
    return isinstance(value, kinds.get(kind, dict))


def is_alive(run: RunState) -> bool:
    """Whether a run says that it is running, and has said so lately."""
    return run.state == RunStatus.running and is_recent(run.heartbeat_at)
