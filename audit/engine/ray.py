"""The Ray engine: stages that need a GPU run in actors pinned to GPUs, the others as CPU tasks beside them.

Ray places, isolates and autoscales; what is decided here is which job a worker gets (one of the group it holds), how
often a job is tried, and when a worker counts as hung.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from audit.config import RunSettings
from audit.engine.ray_workers import Worker, beside, result_of
from audit.engine.work import (
    Event,
    OpenPlace,
    Outcome,
    Place,
    Progress,
    Queue,
    Segment,
    Stage,
    Work,
    segments_of,
)
from audit.errors import ConfigError, DeviceLostError, WorkspaceError
from audit.states import Cause, Happening, Needs
from audit.tokens import emptied, put_away

MOST_STORAGE_FAILURES = 10  # in a row: the storage is at fault, no job is, and going on makes no sense
MOST_LOSSES = 10  # devices in a row, by several jobs: no job is at fault, and going on makes no sense
MOST_LOSSES_OF_A_JOB = 5  # then it is the job
MOST_TRIES = 20  # whatever the reason, a job is not tried more often in a run
# Workers parse strangers' files: they get no token, whatever the environment of their machine holds.
WITHOUT_TOKENS = {"env_vars": emptied()}
POLL = 0.5  # s between looks at deadlines and at the size of the cluster


@dataclass(frozen=True)
class RayOptions:
    """How the engine uses the cluster; audit.config.RunSettings describes the fields."""

    address: str | None = None
    min_workers: int = 1
    max_workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    cpus_per_finish: float = 0.5
    attempts: int = 3
    sample_deadline: float = 14400.0
    finish_deadline: float = 1800.0
    drain_seconds: float = 60.0
    ahead: int = 256

    @staticmethod
    def of(run: RunSettings) -> RayOptions:
        """As the configuration says."""
        return RayOptions(
            run.address, run.min_workers, run.max_workers, run.gpus_per_worker, run.cpus_per_worker,
            attempts=run.attempts, sample_deadline=run.sample_deadline, finish_deadline=run.finish_deadline,
            drain_seconds=run.drain_seconds,
        )  # fmt: skip


@dataclass
class _Slot:
    """One worker as the driver sees it."""

    actor: Any
    group: str | None = None
    job: Work | None = None
    following: Work | None = None
    running: Any = None
    since: float = 0.0


@dataclass
class _Passing:
    """How far a job has come: the number of its next segment, and what the others measured."""

    at: int = 0
    records: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Aside:
    """A CPU task that runs, which segment it is, and since when."""

    job: Work
    at: int
    since: float


def connect(options: RayOptions, **init: Any) -> None:
    """Join the cluster at the address, or start one here. Raises ConfigError where there is none."""
    if ray.is_initialized():
        return
    try:
        with put_away():  # the processes of a Ray that starts here inherit the environment
            ray.init(
                address=options.address, include_dashboard=False if options.address is None else None,
                log_to_driver=False, configure_logging=False, **init,
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"there is no Ray cluster at {options.address or 'this machine'}: {str(error)[:200]}"
        ) from error


class RayEngine:
    """Runs jobs on a Ray cluster.

    ``progress`` tells whether an attempt that died had got work done; ``deaths`` how many workers have died under each
    job in earlier runs of late.
    """

    def __init__(
        self,
        options: RayOptions | None = None,
        progress: Progress | None = None,
        deaths: Mapping[str, int] | None = None,
    ) -> None:
        self.options = options or RayOptions()
        self.progress = progress or (lambda job: (True, 0))
        self._segments: list[Segment] = []
        self._open_place: OpenPlace = lambda needs: Place(None, None)
        self._slots: list[_Slot] = []
        self._aside: dict[Any, _Aside] = {}
        self._passing: dict[str, _Passing] = {}  # jobs that have begun
        self._reached: dict[str, int] = {}
        self._tries: dict[str, int] = {}
        self._storage_failures = 0
        self._deaths = Counter(deaths or {})  # workers that died under each job
        self._losses: list[str] = []  # the jobs that have lost a device since one was last through
        self._losses_of: Counter[str] = Counter()

    @property
    def workers(self) -> int:
        """Workers that are alive or being placed."""
        return len(self._slots)

    def run(
        self,
        jobs: Iterator[Work],
        stages: Sequence[Stage],
        open_place: OpenPlace,
        stop: threading.Event,
        failed_before: dict[str, int],
    ) -> Iterator[Event]:
        """Events as they happen; see LocalEngine.run."""
        connect(self.options)
        self._segments, self._open_place = segments_of(stages), open_place
        queue = Queue(jobs, self.options.ahead)
        # jobs that wait for a worker with a GPU: those that have not begun, unless another segment comes first
        waiting = queue if self._segments[0].needs is Needs.gpu else Queue(iter(()), 0)
        stopped_at: float | None = None
        try:
            while True:
                if stop.is_set() and stopped_at is None:
                    stopped_at = time.monotonic()
                    queue.drop()
                    waiting.drop()
                    for slot in self._slots:
                        slot.following = None
                queue.fill()
                if waiting is not queue:
                    yield from self._begin_aside(queue, waiting)
                yield from self._assign(waiting)
                if not self._busy() and not len(queue) and not len(waiting):
                    return
                if stopped_at is not None and time.monotonic() - stopped_at > self.options.drain_seconds:
                    return
                yield from self._collect(queue, waiting, stopped_at is not None, failed_before)
                yield from self._overdue(queue, waiting, failed_before)
        finally:
            for slot in self._slots:
                ray.kill(slot.actor)
            self._slots = []

    def _busy(self) -> bool:
        return bool(self._aside) or any(slot.running is not None for slot in self._slots)

    def _most_workers(self) -> int:
        """Workers that there is room for: the maximum that was set, else what the cluster holds now."""
        if self.options.max_workers is not None:
            return self.options.max_workers
        resources = ray.cluster_resources()
        gpus = self._gpus(resources)
        room = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1) / self.options.cpus_per_worker
        return max(1, self.options.min_workers, int(room + 1e-9))

    def _gpus(self, resources: dict[str, float] | None = None) -> float:
        if self.options.gpus_per_worker is not None:
            return self.options.gpus_per_worker
        return 1.0 if (resources or ray.cluster_resources()).get("GPU", 0) >= 1 else 0.0

    def _crowded(self, begun: int) -> bool:
        """Whether there are enough jobs on their way to the workers, or from them: they are not to pile up."""
        return begun >= 2 * max(1, len(self._slots)) + 2

    def _begin(self, job: Work) -> Iterator[Event]:
        """A job that begins, unless it comes back to a worker in the middle of its way."""
        if job.id not in self._passing:
            self._passing[job.id] = _Passing()
            yield Event(Happening.started, job)

    def _begin_aside(self, queue: Queue, waiting: Queue) -> Iterator[Event]:
        """Begin jobs whose first stages need no GPU."""
        on_their_way = len(waiting) + sum(not aside.at for aside in self._aside.values())
        while not self._crowded(on_their_way) and (job := queue.take(None)):
            yield from self._begin(job)
            self._put_aside(job)
            on_their_way += 1

    def _put_aside(self, job: Work) -> None:
        at = self._passing[job.id].at
        kind = beside.options(num_cpus=self.options.cpus_per_finish, runtime_env=WITHOUT_TOKENS)
        self._aside[kind.remote(self._segments[at], self._open_place, job)] = _Aside(job, at, time.monotonic())

    def _assign(self, waiting: Queue) -> Iterator[Event]:
        idle = [slot for slot in self._slots if slot.running is None]
        wanted = min(self._most_workers(), max(self.options.min_workers, len(waiting) + len(self._slots) - len(idle)))
        while len(self._slots) < wanted and len(waiting):
            kind: Any = Worker
            worker = kind.options(
                num_gpus=self._gpus(), num_cpus=self.options.cpus_per_worker, runtime_env=WITHOUT_TOKENS
            )
            idle.append(_Slot(worker.remote(self._segments, self._open_place)))
            self._slots.append(idle[-1])
        behind = sum(aside.at > 0 for aside in self._aside.values())
        for slot in idle if not self._crowded(behind) else []:
            job = slot.following or waiting.take(slot.group)
            slot.following = None
            if job is None:
                if len(self._slots) > self.options.min_workers:
                    ray.kill(slot.actor)  # gives its GPU back, so that the cluster can shrink
                    self._slots.remove(slot)
                continue
            slot.job, slot.group, slot.since = job, job.group, time.monotonic()
            slot.running = slot.actor.process.remote(self._at(job), job)
            yield from self._begin(job)
        for slot in self._slots:
            if slot.running is not None and slot.following is None and (job := waiting.take(slot.group)):
                if job.group != slot.group and len(waiting) < len(self._slots):
                    waiting.put(job, first=True)  # better for a worker that is free sooner
                    continue
                slot.following = job
                slot.actor.prepare.remote(self._at(job), job)

    def _at(self, job: Work) -> int:
        """The number of the segment that ``job`` has come to."""
        return self._passing[job.id].at if job.id in self._passing else 0

    def _collect(self, queue: Queue, waiting: Queue, stopping: bool, failed_before: dict[str, int]) -> Iterator[Event]:
        by_ref = {slot.running: slot for slot in self._slots if slot.running is not None}
        if not by_ref and not self._aside:
            return
        ready, _ = ray.wait([*by_ref, *self._aside], num_returns=1, timeout=POLL)
        more = [ref for ref in (*by_ref, *self._aside) if ref not in ready]
        if ready and more:  # take everything that is there
            others, _ = ray.wait(more, num_returns=len(more), timeout=0)
            ready += others
        for ref in ready:
            outcome = result_of(ref)
            busy = 0.0
            if ref in by_ref:
                slot = by_ref[ref]
                job, slot.job, slot.running = slot.job, None, None
                assert job is not None
                busy = time.monotonic() - slot.since
                if outcome.kind is None:
                    self._losses.clear()
                elif outcome.kind in _LOSING:  # an error of CUDA stays in its process: a new worker starts without
                    self._lose(slot, waiting)
            else:
                job = self._aside.pop(ref).job
                if outcome.kind is None:
                    self._storage_failures = 0
            if outcome.kind is None:
                yield from self._passed(job, outcome, busy, waiting, stopping)
            else:
                stage = outcome.failed or self._segments[self._at(job)].name
                yield self._failed(queue, job, outcome.kind, outcome.reason, stage, failed_before)

    def _passed(self, job: Work, outcome: Outcome, busy: float, waiting: Queue, stopping: bool) -> Iterator[Event]:
        """A segment is over: on to the next one."""
        passing = self._passing[job.id]
        name = self._segments[passing.at].name
        passing.at += 1
        passing.records += outcome.records
        last = passing.at == len(self._segments)
        if not last and self._segments[passing.at].needs is Needs.cpu:
            self._put_aside(job)
        elif not last and not stopping:
            waiting.put(job, first=True)
        yield Event(Happening.passed, job, stage=name, seconds=busy)
        if last:
            del self._passing[job.id]
            yield Event(Happening.finished, job, records=tuple(passing.records))

    def _lose(self, slot: _Slot, waiting: Queue) -> None:
        """Give up a worker; what it was to do next goes back into the queue."""
        ray.kill(slot.actor)
        self._slots.remove(slot)
        if slot.following:
            waiting.put(slot.following, first=True)

    def _failed(
        self, queue: Queue, job: Work, kind: Cause, reason: str, stage: str, failed_before: dict[str, int]
    ) -> Event:
        """What follows from a failure. A job that is tried again begins at the first stage that is not done."""
        self._passing.pop(job.id, None)
        if kind is Cause.storage:
            self._storage_failures += 1
            if self._storage_failures >= MOST_STORAGE_FAILURES:
                raise WorkspaceError(f"results cannot be kept, {MOST_STORAGE_FAILURES} times in a row: {reason}")
        if kind is Cause.input:
            return Event(Happening.failed, job, kind, reason, stage, True)
        if kind is Cause.device_lost:
            return self._device_lost(queue, job, reason, stage)
        begun, reached = self.progress(job)
        tries = self._tries[job.id] = self._tries.get(job.id, 0) + 1
        begun |= kind not in (Cause.worker_died, Cause.deadline)  # an answer came: it had begun
        blamed = kind not in (Cause.node_died, Cause.storage)
        counted = blamed and begun and reached <= self._reached.get(job.id, 0)
        self._reached[job.id] = reached
        self._deaths[job.id] += kind is Cause.worker_died
        if tries >= MOST_TRIES:
            return Event(Happening.quarantined, job, kind, f"tried {tries} times; {reason}", stage, True)
        if counted:
            failed_before[job.id] = failed_before.get(job.id, 0) + 1
            if failed_before[job.id] >= self._attempts(job, kind):
                return Event(Happening.quarantined, job, kind, reason, stage, True)
        queue.put(job)
        return Event(Happening.retry, job, kind, reason, stage, counted)

    def _attempts(self, job: Work, kind: Cause) -> int:
        """Failed attempts after which a job is at fault itself.

        Where workers die under other jobs too, something kills them: every such death may have been the one that hit
        this job, and is one more attempt for it.
        """
        if kind not in (Cause.worker_died, Cause.deadline):
            return self.options.attempts
        return self.options.attempts + self._deaths.total() - self._deaths[job.id]

    def _device_lost(self, queue: Queue, job: Work, reason: str, stage: str) -> Event:
        """A device answers nothing any more. The job goes on elsewhere, and it counts against none.

        Raises DeviceLostError where device after device is lost, and quarantines a job that has lost several alone.
        """
        self._losses.append(job.id)
        self._losses_of[job.id] += 1
        if len(self._losses) >= MOST_LOSSES and len(set(self._losses)) > 1:
            raise DeviceLostError(
                f"devices were lost {len(self._losses)} times in a row, with no audit between: {reason}"
            )
        if self._losses_of[job.id] >= MOST_LOSSES_OF_A_JOB:
            lost = f"a device was lost {MOST_LOSSES_OF_A_JOB} times while it was audited; {reason}"
            return Event(Happening.quarantined, job, Cause.device_lost, lost, stage, True)
        queue.put(job)
        return Event(Happening.retry, job, Cause.device_lost, reason, stage)

    def _overdue(self, queue: Queue, waiting: Queue, failed_before: dict[str, int]) -> Iterator[Event]:
        now = time.monotonic()
        for slot in list(self._slots):
            if slot.running is not None and now - slot.since > self.options.sample_deadline:
                assert slot.job is not None
                self._lose(slot, waiting)
                reason = f"no result after {self.options.sample_deadline:.0f} s: the worker was killed"
                stage = self._segments[self._at(slot.job)].name
                yield self._failed(queue, slot.job, Cause.deadline, reason, stage, failed_before)
        for task, aside in list(self._aside.items()):
            if now - aside.since > self.options.finish_deadline:
                del self._aside[task]
                ray.cancel(task, force=True)
                reason = f"no result after {self.options.finish_deadline:.0f} s: it was cancelled"
                stage = self._segments[self._at(aside.job)].name
                yield self._failed(queue, aside.job, Cause.deadline, reason, stage, failed_before)


_LOSING = (Cause.worker_died, Cause.node_died, Cause.device_lost)
