"""Match: the extractions of a finished audit with reference sets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audit.progress import Tell, quiet
from audit.stages.registry import StageKind
from audit.states import Needs

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.job import Job
    from audit.workspace import Workspace


@dataclass(frozen=True)
class Matched:
    """The seconds it took."""

    seconds: float


class Match:
    """Match with ``references``, and weigh them; it is never done, as sets change and matching is cheap."""

    name = "match"
    needs = Needs.cpu

    def __init__(self, references: Sequence[str]) -> None:
        self.references = tuple(references)

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Never: the sets may be others now."""
        return False

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Matched:
        """Write the matches and chances. Raises WorkspaceError where a set is not there any more."""
        from audit.references import audits

        started = time.monotonic()
        tell("matching", 0, len(self.references))
        audits.match_audit(workspace, job.id, self.references)
        tell("matching", len(self.references), len(self.references))
        return Matched(time.monotonic() - started)


STAGE = StageKind("match", "cluster", Match)
