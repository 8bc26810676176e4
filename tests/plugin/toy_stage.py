"""A stage: counts an audit's extractions into a file of its own, behind clustering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from audit.progress import Tell, quiet
from audit.stages import StageKind
from audit.states import Needs


@dataclass(frozen=True)
class Counted:
    """How many there are."""

    extractions: int


class Count:
    """Count the extractions."""

    name = "count"
    needs = Needs.cpu

    def __init__(self, references: Sequence[str]) -> None:
        self.references = tuple(references)

    def done(self, job: Any, workspace: Any) -> bool:
        """Whether the file is there."""
        found: bool = workspace.files.exists(f"toy/{job.id}.txt")
        return found

    def run(self, job: Any, workspace: Any, bench: Any, tell: Tell = quiet) -> Counted:
        """Write it."""
        [row] = workspace.rows("SELECT count(*) AS n FROM extractions WHERE audit_id = ?", [job.id])
        workspace.files.write(f"toy/{job.id}.txt", f"{row['n']} {len(self.references)}".encode())
        return Counted(row["n"])


STAGE = StageKind("count", "cluster", Count)
