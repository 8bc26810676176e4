"""One audit after the other in this process: what ``scan``, the demo and the benchmarks use."""

from __future__ import annotations

from PIL import Image

from audit.config import Compile
from audit.engine.extraction import Extraction
from audit.engine.plan import Plan
from audit.engine.stages import Progress, evaluate, finish, match
from audit.storage import Workspace


class Auditor:
    """Runs audits into a workspace. ``progress`` is told (stage, done, total)."""

    def __init__(
        self,
        workspace: Workspace,
        device: str = "cpu",
        batch_size: int = 0,
        progress: Progress | None = None,
        compile: Compile = Compile.off,
    ) -> None:
        self.workspace = workspace
        self.progress = progress or (lambda stage, done, total: None)
        self.extraction = Extraction(workspace, device, batch_size, self.progress, compile)

    def audit(self, plan: Plan) -> bool:
        """Extract and cluster, unless this audit is already finished; whether it had to be run.

        A stopped run goes on where it was. Nothing is in the tables until everything is: the audits row is last.
        Raises AuditError.
        """
        if self.workspace.has("audits", plan.audit_id):
            self.workspace.spool(plan.audit_id).discard()
            return False
        self.extraction.run(plan)
        finish(self.workspace, plan, self.progress)
        return True

    def match(self, plan: Plan, sets: list[str]) -> None:
        """Match a finished audit with reference sets."""
        self.progress("matching", 0, len(sets))
        match(self.workspace, plan.audit_id, sets)
        self.progress("matching", len(sets), len(sets))

    def evaluate(self, plan: Plan, kind: str, pictures: list[Image.Image]) -> None:
        """Score a finished audit against known ``pictures``; ``kind`` is "training" or "control"."""
        evaluate(self.workspace, plan, self.extraction.pair(plan), kind, pictures)
