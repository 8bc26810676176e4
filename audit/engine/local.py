"""The local engine: the stages in this process, one job after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from audit.engine.work import Event, OpenPlace, Place, Queue, Stage, Work, kind_of, reason_of, segments_of
from audit.errors import DeviceLostError
from audit.progress import Tell, quiet
from audit.states import Cause, Happening, Needs


def run_stages(stages: Sequence[Stage], job: Any, place: Place, tell: Tell = quiet) -> list[Any]:
    """Run the stages of one job that are not done, here and now; their records. Raises what they raise."""
    return [stage.run(job, *place, tell) for stage in stages if not stage.done(job, place.workspace)]


class LocalEngine:
    """Runs every job through all stages; a job that fails costs itself alone."""

    def __init__(self, attempts: int = 3) -> None:
        self.attempts = attempts
        self.workers = 1

    def run(
        self,
        jobs: Iterator[Work],
        stages: Sequence[Stage],
        open_place: OpenPlace,
        stop: threading.Event,
        failed_before: dict[str, int],
    ) -> Iterator[Event]:
        """Events as they happen. ``stop`` ends it after the running job; its work is kept.

        ``failed_before`` counts attempts that failed in earlier runs. Raises WorkspaceError where results cannot be
        written and DeviceLostError where this process has lost its device: that is no job's fault.
        """
        place = open_place(Needs.gpu if any(stage.needs is Needs.gpu for stage in stages) else Needs.cpu)
        ahead = [segment for segment in segments_of(stages) if segment.needs is Needs.gpu]
        queue = Queue(jobs, 64)
        following = queue.take(None)
        while not stop.is_set() and (job := following or queue.take(None)):
            following = queue.take(job.group)
            if following:
                for segment in ahead:
                    segment.prepare(following, place)
            yield from self._through(queue, job, stages, place, failed_before)

    def _through(
        self, queue: Queue, job: Work, stages: Sequence[Stage], place: Place, failed_before: dict[str, int]
    ) -> Iterator[Event]:
        yield Event(Happening.started, job)
        records: list[Any] = []
        for stage in stages:
            started = time.monotonic()
            try:
                records += run_stages([stage], job, place)
            except Exception as error:
                yield from self._failed(queue, job, stage, error, failed_before)
                return
            busy = time.monotonic() - started if stage.needs is Needs.gpu else 0.0
            yield Event(Happening.passed, job, stage=stage.name, seconds=busy)
        yield Event(Happening.finished, job, records=tuple(records))

    def _failed(
        self, queue: Queue, job: Work, stage: Stage, error: Exception, failed_before: dict[str, int]
    ) -> Iterator[Event]:
        kind, reason = kind_of(error), reason_of(error)
        if kind is Cause.storage:
            raise error
        if kind is Cause.device_lost:  # this process has no device any more: the next one goes on
            yield Event(Happening.retry, job, kind, reason, stage.name)
            raise DeviceLostError(reason) from error
        if kind is Cause.input:
            yield Event(Happening.failed, job, kind, reason, stage.name, True)
            return
        failed_before[job.id] = failed_before.get(job.id, 0) + 1
        if failed_before[job.id] >= self.attempts:
            yield Event(Happening.quarantined, job, kind, reason, stage.name, True)
            return
        queue.put(job)
        yield Event(Happening.retry, job, kind, reason, stage.name, True)
