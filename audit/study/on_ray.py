"""A study on Ray: its fine-tunes and their audits are jobs of the engine that audits run on, with its retries."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from audit.config import RunSettings
from audit.engine.places import OpenWorkspace
from audit.progress import Tell, quiet
from audit.states import Happening, Needs
from audit.study.units import Done, Unit, do_unit
from audit.workspace import Workspace


class FineTuneAndAudit:
    """The one stage of a study: trains what is not trained, and audits what is not audited."""

    name = "study"
    needs = Needs.gpu

    def done(self, job: Unit, workspace: Workspace) -> bool:
        """Never: what is done of it the unit finds itself, cell by cell."""
        return False

    def run(self, job: Unit, workspace: Workspace, bench: Any, tell: Tell = quiet) -> Done:
        """What came of it."""
        return do_unit(job, bench, tell)


def on_ray(units: Sequence[Unit], workspace: Workspace, run: RunSettings, stop: threading.Event) -> Iterator[Done]:
    """What came of the units, as they end; ``run`` says where, and with what of the cluster a worker.

    ``stop`` lets what runs have the seconds to drain, and begins nothing. A unit whose worker is killed goes on in
    another; one that is tried too often has failed.
    """
    from audit.engine.ray import RayEngine, RayOptions

    def progress(job: Any) -> tuple[bool, int]:
        keys = [f"{job.study.name}.{cell.id}" for cell in job.cells]
        return True, sum(workspace.has("study_cells", key) for key in keys)

    engine = RayEngine(RayOptions.of(run), progress)
    place = OpenWorkspace(workspace.files.location, run.batch_size, run.compile, run.device)
    for event in engine.run(iter(units), [FineTuneAndAudit()], place, stop, {}):
        if event.what is Happening.finished:
            found = event.record(Done)
            assert found is not None
            yield found
        elif event.what in (Happening.failed, Happening.quarantined):
            yield Done(event.job.name, failed=[f"{event.job.name}: {event.reason}"])
