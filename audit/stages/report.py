"""Report: the page of a finished and matched audit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audit.progress import Tell, quiet
from audit.stages.registry import StageKind
from audit.states import Needs, Verdict

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.config import VerdictSettings
    from audit.custody.keep import Custody
    from audit.job import Job
    from audit.workspace import Workspace


@dataclass(frozen=True)
class Reported:
    """Where the page is, what it says in short, and the seconds it took."""

    seconds: float
    page: str
    verdict: Verdict | None
    matches: int
    matched_sets: int
    tells_nothing: bool


class Report:
    """Write the page about ``references``; it is never done, as what it shows may be others now.

    ``asked`` is what counts as a match; by default what is one without being told. ``custody`` says whose command it
    is, for the page's manifest; it has no key: workers sign nothing.
    """

    name = "report"
    needs = Needs.cpu

    def __init__(
        self, references: Sequence[str], asked: VerdictSettings | None = None, custody: Custody | None = None
    ) -> None:
        self.references, self.asked, self.custody = tuple(references), asked, custody

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Never: the sets may be others now."""
        return False

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Reported:
        """Write the page. Raises WorkspaceError."""
        from audit.custody.keep import NOBODY
        from audit.report import collect, write_page

        started = time.monotonic()
        facts = collect(workspace, job.id, self.references, self.asked)
        page, said = write_page(facts, workspace, self.custody or NOBODY), facts.verdict
        return Reported(
            time.monotonic() - started, page, said.said, len(said.matched), len(said.matched_sets),
            said.tells_nothing is not None,
        )  # fmt: skip


STAGE = StageKind("report", "match", Report)
