"""The local engine: the stages in this process, one task after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from audit.engine.work import Event, Queue, Stage, Task, kind_of, reason_of
from audit.errors import DeviceLostError


class LocalEngine:
    """Runs every task through both stages; a task that fails costs itself alone."""

    def __init__(self, attempts: int = 3) -> None:
        self.attempts = attempts
        self.workers = 1

    def run(
        self,
        tasks: Iterator[Task],
        extract: Callable[[], Stage],
        finish: Callable[[], Stage],
        stop: threading.Event,
        failed_before: dict[str, int],
    ) -> Iterator[Event]:
        """Events as they happen. ``stop`` ends it after the running task; its work is kept.

        ``failed_before`` counts attempts that failed in earlier runs. Raises WorkspaceError where results cannot be
        written and DeviceLostError where this process has lost its device: that is no task's fault.
        """
        stages = [("extract", extract()), ("finish", finish())]
        queue = Queue(tasks, 64)
        following = queue.take(None)
        while not stop.is_set() and (task := following or queue.take(None)):
            following = queue.take(task.group)
            if following:
                stages[0][1].prepare(following)
            yield Event("started", task)
            measured: dict[str, object] = {}
            name = "extract"
            try:
                for name, stage in stages:
                    measured |= stage.process(task)
                    if name == "extract":
                        yield Event("extracted", task)
            except Exception as error:
                kind, reason = kind_of(error), reason_of(error)
                if kind == "storage":
                    raise
                if kind == "device-lost":  # this process has no device any more: the next one goes on
                    yield Event("retry", task, kind, reason, name)
                    raise DeviceLostError(reason) from error
                if kind == "input":
                    yield Event("failed", task, kind, reason, name, True)
                else:
                    yield self._again(queue, task, kind, reason, name, failed_before)
            else:
                yield Event("finished", task, measured=measured)

    def _again(
        self, queue: Queue, task: Task, kind: str, reason: str, stage: str, failed_before: dict[str, int]
    ) -> Event:
        failed_before[task.key] = failed_before.get(task.key, 0) + 1
        if failed_before[task.key] >= self.attempts:
            return Event("quarantined", task, kind, reason, stage, True)
        queue.put(task)
        return Event("retry", task, kind, reason, stage, True)
