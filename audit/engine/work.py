"""What engines run: jobs through a list of stages, some on a worker with a GPU and some beside it.

An engine knows nothing of diffusion: a job is an id and a group, a stage a name and what it needs.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar

from audit.devices import Fault, fault_of
from audit.errors import AuditError, ConfigError, DescriptorError, WorkspaceError
from audit.locations import without_credentials
from audit.progress import Tell, quiet
from audit.states import Cause, Happening, Needs
from audit.storable import storable

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRIED = tuple(cause for cause in Cause if cause is not Cause.input)


def kind_of(error: BaseException) -> Cause:
    """Why a stage failed: ``input`` where the job itself is at fault, else one of RETRIED.

    A descriptor that cannot be had, or a base that is another one, is the fault of this machine: another may have it.
    """
    if isinstance(error, WorkspaceError):
        return Cause.storage
    fault = fault_of(error)
    if fault is Fault.lost:
        return Cause.device_lost
    if fault is Fault.memory:
        return Cause.out_of_memory
    of_the_job = isinstance(error, AuditError) and not isinstance(error, ConfigError | DescriptorError)
    return Cause.input if of_the_job else Cause.error


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


class Work(Protocol):
    """A job as an engine sees it: small, and it can be pickled. Jobs of a group go to one worker, which keeps in memory
    what they share.
    """

    @property
    def id(self) -> str:
        """What tells it from all others."""

    @property
    def group(self) -> str:
        """What it shares with others."""


class Stage(Protocol):
    """One step of the way of a job. Stages are pickled to workers, and each is used by one thread at a time.

    One that needs a GPU may also have ``prepare(job, workspace, bench)``: what can be done ahead without the GPU, while
    another job is in ``run``. Errors of it come back from ``run``.
    """

    @property
    def name(self) -> str:
        """What it is called in events, metrics and tables."""

    @property
    def needs(self) -> Needs:
        """What it runs on."""

    def done(self, job: Any, workspace: Any) -> bool:
        """Whether there is nothing to do for ``job``."""

    def run(self, job: Any, workspace: Any, bench: Any, tell: Tell = quiet) -> Any:
        """Do it; a record of what was measured. Raises AuditError for a job that is at fault itself."""


class Place(NamedTuple):
    """What stages work in: where results are, and what a worker has in memory."""

    workspace: Any
    bench: Any


OpenPlace = Callable[[Needs], Place]  # makes a worker's place; it can be pickled, and hashed


_PLACES: dict[OpenPlace, Place] = {}


def kept_place(open_place: OpenPlace) -> Place:
    """The place of this process for what needs no GPU; the last one that was opened is kept."""
    if open_place not in _PLACES:
        _PLACES.clear()
        _PLACES[open_place] = open_place(Needs.cpu)
    return _PLACES[open_place]


@dataclass(frozen=True)
class Segment:
    """Stages that follow each other and need the same, with one worker or task for all of them."""

    stages: tuple[Stage, ...]

    @property
    def needs(self) -> Needs:
        """What they run on."""
        return self.stages[0].needs

    @property
    def name(self) -> str:
        """Their names."""
        return ", ".join(stage.name for stage in self.stages)

    def prepare(self, job: Work, place: Place) -> None:
        """Do ahead what can be."""
        for stage in self.stages:
            if (prepare := getattr(stage, "prepare", None)) is not None:
                prepare(job, *place)


def segments_of(stages: Sequence[Stage]) -> list[Segment]:
    """The stages in order, cut where what they need changes."""
    return [Segment(tuple(some)) for _, some in groupby(stages, key=lambda stage: stage.needs)]


@dataclass(frozen=True)
class Outcome:
    """What came of a segment: the records of its stages, or why the stage ``failed`` did."""

    records: tuple[Any, ...] = ()
    seconds: float = 0.0
    failed: str = ""
    kind: Cause | None = None
    reason: str = ""


def outcome_of(segment: Segment, job: Work, place: Place) -> Outcome:
    """Run the stages that are not done. Errors become words: one from a stranger's file need not survive pickling."""
    started = time.monotonic()
    records: list[Any] = []
    name = segment.stages[0].name
    try:
        for stage in segment.stages:
            name = stage.name
            if not stage.done(job, place.workspace):
                records.append(stage.run(job, *place))
    except Exception as error:
        seconds = time.monotonic() - started
        return Outcome(tuple(records), seconds, name, kind_of(error), reason_of(error))
    return Outcome(tuple(records), time.monotonic() - started)


@dataclass(frozen=True)
class Event:
    """What happened to a job.

    ``stage`` names the stage, or all that ran together where it is not known which. ``kind`` says why it failed,
    ``counted`` whether the attempt counts towards quarantine. ``seconds`` is how long a worker was busy with the stages
    that need a GPU and are passed; ``records`` is what all stages measured, once the job is finished.
    """

    what: Happening
    job: Any
    kind: Cause | None = None
    reason: str = ""
    stage: str = ""
    counted: bool = False
    seconds: float = 0.0
    records: tuple[Any, ...] = field(default=())

    def record(self, kind: type[T]) -> T | None:
        """The record of this type; None where its stage had nothing to do."""
        return next((one for one in self.records if isinstance(one, kind)), None)


class Progress(Protocol):
    """How far a job has got when its worker died: whether it is to blame."""

    def __call__(self, job: Any) -> tuple[bool, int]:
        """Whether its stage had begun since the last call, and a number that grows with the work that survives."""


class Queue:
    """Jobs by group, read from an iterator no further ahead than ``ahead``: memory does not grow with the work.

    A worker gets the next job of the group it has in memory; without one, of the group with most waiting.
    """

    def __init__(self, jobs: Iterator[Work], ahead: int) -> None:
        self._jobs, self._ahead = jobs, ahead
        self._groups: dict[str, deque[Work]] = {}
        self._waiting = 0
        self._ended = False

    def __len__(self) -> int:
        return self._waiting

    def fill(self) -> None:
        """Read ahead."""
        while not self._ended and self._waiting < self._ahead:
            job = next(self._jobs, None)
            if job is None:
                self._ended = True
                return
            self.put(job)

    def put(self, job: Work, first: bool = False) -> None:
        """Add one, at the end or in front."""
        group = self._groups.setdefault(job.group, deque())
        group.appendleft(job) if first else group.append(job)
        self._waiting += 1

    def take(self, group: str | None) -> Work | None:
        """The next job for a worker that has ``group`` in memory."""
        self.fill()
        if not self._waiting:
            return None
        mine = group if group in self._groups else max(self._groups, key=lambda name: len(self._groups[name]))
        job = self._groups[mine].popleft()
        if not self._groups[mine]:
            del self._groups[mine]
        self._waiting -= 1
        return job

    def drop(self) -> None:
        """Forget what waits."""
        self._groups, self._waiting, self._ended = {}, 0, True
