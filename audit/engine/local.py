"""The local engine: the stages in this process, one task after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from audit.engine.work import Event, Queue, Stage, Task
from audit.errors import AuditError, WorkspaceError


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
        written: that is no task's fault.
        """
        stages = [("extract", extract()), ("finish", finish())]
        queue = Queue(tasks, 64)
        while not stop.is_set() and (task := queue.take(None)):
            yield Event("started", task)
            measured: dict[str, object] = {}
            name = "extract"
            try:
                for name, stage in stages:
                    measured |= stage.process(task)
                    if name == "extract":
                        yield Event("extracted", task)
            except WorkspaceError:
                raise
            except AuditError as error:
                yield Event("failed", task, "input", str(error), name, True)
            except MemoryError as error:
                yield self._again(queue, task, "out-of-memory", f"out of memory: {error}", name, failed_before)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                yield self._again(queue, task, "error", reason[:1000], name, failed_before)
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
