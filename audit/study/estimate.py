"""What a study will take, before anything is trained: counts, and seconds by what this workspace has measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from audit.errors import WorkspaceError
from audit.study.plan import Counts, Plan, counts, varied
from audit.workspace import Workspace

MEASURED = """
SELECT (SELECT sum(f.seconds) / sum(f.optimiser_steps * f.batch) FROM fine_tunes AS f WHERE base_revision IN
        (SELECT base_revision FROM studies WHERE base = ?)) AS training,
    (SELECT sum(seconds_sampling) / sum(evaluations) FROM audits WHERE evaluations > 0 AND base_revision IN
        (SELECT base_revision FROM studies WHERE base = ?)) AS auditing
"""


@dataclass(frozen=True)
class StudyEstimate:
    """Counts of a plan; ``seconds`` on one worker by what was measured on this base, None where nothing was."""

    study: str
    counts: Counts
    varied: list[str]
    fine_tunes: list[str]
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``--dry-run --json`` prints them."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        of = self.counts
        yield f"study {self.study}: {of.cells} audits of {of.fine_tunes} fine-tunes of {of.sets} sets"
        yield f"varied: {', '.join(self.varied) or 'nothing'}"
        yield from (f"  {one}" for one in self.fine_tunes)
        yield f"training: {of.training_steps} steps, as much as {of.training_evaluations} evaluations of a picture"
        yield f"audits: {of.images} images, {of.audit_evaluations} evaluations"
        if self.seconds is None:
            yield "seconds: nothing was measured with this base in this workspace (lora-audit estimate knows cards)"
        else:
            yield f"about {self.seconds:.0f} s on one worker, by what this workspace has measured with this base"


def estimate(plan: Plan, workspace: str) -> StudyEstimate:
    """Count a plan, and say what it takes by the fine-tunes and audits of its base that ``workspace`` has."""
    of = counts(plan)
    seconds = None
    try:
        opened = Workspace(workspace, reading=True, create=False)
        [pace] = opened.rows(MEASURED, [plan.study.base, plan.study.base])
        if pace["training"] is not None and pace["auditing"] is not None:
            pictures = of.training_evaluations / 3
            seconds = pictures * pace["training"] + of.audit_evaluations * pace["auditing"]
    except WorkspaceError:
        pass  # there is none yet
    named = []
    for (few_shot, training), cells in plan.groups.items():
        n0 = len(plan.set_of(few_shot, training).training)
        rank = f" of rank {training.rank}" if training.rank else ""
        named.append(
            f"{few_shot}: {training.method}{rank}, {n0} pictures, {training.steps * n0} steps, {len(cells)} audits"
        )
    return StudyEstimate(plan.study.name, of, varied(plan), named, seconds)
