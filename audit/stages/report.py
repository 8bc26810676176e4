"""Report: the page of a finished and matched audit."""

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
    from audit.custody.keep import Custody
    from audit.job import Job
    from audit.workspace import Workspace


@dataclass(frozen=True)
class Reported:
    """Where the page is, whether the audit tells nothing, and the seconds it took."""

    seconds: float
    page: str
    tells_nothing: bool


class Report:
    """Write the page about ``references``; it is never done, as what it shows may be others now.

    ``custody`` says whose command it is, for the page's manifest; it has no key: workers sign nothing.
    """

    name = "report"
    needs = Needs.cpu

    def __init__(self, references: Sequence[str], custody: Custody | None = None) -> None:
        self.references, self.custody = tuple(references), custody

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Never: the sets may be others now."""
        return False

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Reported:
        """Write the page. Raises WorkspaceError."""
        from audit.custody.keep import NOBODY
        from audit.report import collect, write_page

        started = time.monotonic()
        facts = collect(workspace, job.id, self.references)
        page = write_page(facts, workspace, self.custody or NOBODY)
        return Reported(time.monotonic() - started, page, facts.tells_nothing is not None)


STAGE = StageKind("report", "match", Report)
