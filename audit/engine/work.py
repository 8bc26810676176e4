"""What engines run: tasks through a stage that needs a GPU and one that needs a CPU. It knows nothing of diffusion."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from audit.devices import Fault, fault_of
from audit.errors import AuditError, WorkspaceError
from audit.locations import without_credentials
from audit.storable import storable

log = logging.getLogger(__name__)

RETRIED = ("worker-died", "node-died", "device-lost", "deadline", "out-of-memory", "storage", "error")


def kind_of(error: BaseException) -> str:
    """Why a stage failed: "input" where the task itself is at fault, else one of RETRIED."""
    if isinstance(error, WorkspaceError):
        return "storage"
    fault = fault_of(error)
    if fault is Fault.lost:
        return "device-lost"
    if fault is Fault.memory:
        return "out-of-memory"
    return "input" if isinstance(error, AuditError) else "error"


def reason_of(error: BaseException) -> str:
    """What is recorded of an error: our own words, or its class, the beginning of its text, and a trace id.

    The log of the process that it happened in has the same id beside the traceback.
    """
    if isinstance(error, AuditError):
        return str(error)
    trace = secrets.token_hex(4)
    reason = f"{type(error).__name__}: {storable(without_credentials(str(error)))[:900]} (trace {trace})"
    log.error("a task failed: %s", reason, exc_info=error, extra={"fields": {"trace": trace}})
    return reason


@dataclass(frozen=True)
class Task:
    """One piece of work. ``group`` names what a worker keeps in memory for it: tasks of a group go to one worker."""

    key: str
    group: str
    payload: Any


@dataclass(frozen=True)
class Event:
    """What happened to a task: "started", "extracted", "finished", "retry", "failed" or "quarantined".

    ``kind`` says why ("input" is of no use to try again), ``counted`` whether the attempt counts towards quarantine,
    ``measured`` what the stages measured.
    """

    what: str
    task: Task
    kind: str = ""
    reason: str = ""
    stage: str = ""
    counted: bool = False
    measured: dict[str, Any] = field(default_factory=dict)


class Stage(Protocol):
    """A stage of the flow. It is made once in each worker."""

    def prepare(self, task: Task) -> None:
        """Do ahead what needs no GPU, while another task is in ``process``. Errors come back from ``process``."""

    def process(self, task: Task) -> dict[str, Any]:
        """Do the work; what was measured. Raises AuditError for a task that is at fault itself."""


class Progress(Protocol):
    """How far a task has got when its worker died: whether it is to blame."""

    def __call__(self, task: Task) -> tuple[bool, int]:
        """Whether its stage had begun since the last call, and a number that grows with the work that survives."""


class Queue:
    """Tasks by group, read from an iterator no further ahead than ``ahead``: memory does not grow with the work.

    A worker gets the next task of the group it has in memory; without one, of the group with most waiting.
    """

    def __init__(self, tasks: Iterator[Task], ahead: int) -> None:
        self._tasks, self._ahead = tasks, ahead
        self._groups: dict[str, deque[Task]] = {}
        self._waiting = 0
        self._ended = False

    def __len__(self) -> int:
        return self._waiting

    def fill(self) -> None:
        """Read ahead."""
        while not self._ended and self._waiting < self._ahead:
            task = next(self._tasks, None)
            if task is None:
                self._ended = True
                return
            self.put(task)

    def put(self, task: Task, first: bool = False) -> None:
        """Add one, at the end or in front."""
        group = self._groups.setdefault(task.group, deque())
        group.appendleft(task) if first else group.append(task)
        self._waiting += 1

    def take(self, group: str | None) -> Task | None:
        """The next task for a worker that has ``group`` in memory."""
        self.fill()
        if not self._waiting:
            return None
        mine = group if group in self._groups else max(self._groups, key=lambda name: len(self._groups[name]))
        task = self._groups[mine].popleft()
        if not self._groups[mine]:
            del self._groups[mine]
        self._waiting -= 1
        return task

    def drop(self) -> None:
        """Forget what waits."""
        self._groups, self._waiting, self._ended = {}, 0, True
