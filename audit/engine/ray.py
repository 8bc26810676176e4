"""The Ray engine: workers are actors pinned to GPUs, finishing runs as CPU tasks beside them.

Ray places, isolates and autoscales; what is decided here is which task a worker gets (one of the base model it holds),
how often a task is tried, and when a worker counts as hung.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from audit.engine.work import Event, Progress, Queue, Stage, Task, kind_of, reason_of
from audit.errors import ConfigError, DeviceLostError, WorkspaceError
from audit.tokens import emptied, put_away

NODE_DIED = "its node has died"  # how Ray words an actor's death with its node
MOST_STORAGE_FAILURES = 10  # in a row: the storage is at fault, no task is, and going on makes no sense
MOST_LOSSES = 10  # devices in a row, by several tasks: no task is at fault, and going on makes no sense
MOST_LOSSES_OF_A_TASK = 5  # then it is the task
MOST_TRIES = 20  # whatever the reason, a task is not tried more often in a run
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
    extract_deadline: float = 14400.0
    finish_deadline: float = 1800.0
    drain_seconds: float = 60.0
    ahead: int = 256


# A worker that died is replaced by a new one, not restarted in place: a call to an actor that is just restarting fails,
# and would count against a task that has nothing to do with the crash.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"prepare": 1, "process": 1})
class Worker:
    """Holds one stage in memory. ``prepare`` runs beside ``process``: the next checkpoint is read meanwhile."""

    def __init__(self, factory: Callable[[], Stage]) -> None:
        self.stage = factory()

    @ray.method(concurrency_group="prepare")
    def prepare(self, task: Task) -> None:
        """Read ahead; what goes wrong shows when the task is processed."""
        self.stage.prepare(task)

    @ray.method(concurrency_group="process")
    def process(self, task: Task) -> tuple[str, Any]:
        """("done", measured), or (kind, reason) where it failed; "input" for a task that is at fault itself."""
        return _outcome(self.stage, task)

    @ray.method(concurrency_group="prepare")
    def devices(self) -> tuple[list[int], str | None]:
        """The GPU ids that Ray gave this worker, and CUDA_VISIBLE_DEVICES as it sees it."""
        import os

        return [int(i) for i in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")


def _outcome(stage: Stage, task: Task) -> tuple[str, Any]:
    try:
        return "done", stage.process(task)
    except Exception as error:  # travels as text: an error from a stranger's file need not survive pickling
        return kind_of(error), reason_of(error)


@ray.remote(max_retries=0)
def _finish(factory: Callable[[], Stage], task: Task) -> tuple[str, Any]:
    return _outcome(factory(), task)


@dataclass
class _Slot:
    """One worker as the driver sees it."""

    actor: Any
    group: str | None = None
    task: Task | None = None
    following: Task | None = None
    running: Any = None
    since: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)


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
    """Runs tasks on a Ray cluster.

    ``progress`` tells whether an attempt that died had got work done; ``deaths`` how many workers have died under each
    task in earlier runs of late.
    """

    def __init__(
        self,
        options: RayOptions | None = None,
        progress: Progress | None = None,
        deaths: Mapping[str, int] | None = None,
    ) -> None:
        self.options = options or RayOptions()
        self.progress = progress or (lambda task: (True, 0))
        self._slots: list[_Slot] = []
        self._finishing: dict[Any, tuple[Task, dict[str, Any], float]] = {}
        self._reached: dict[str, int] = {}
        self._tries: dict[str, int] = {}
        self._storage_failures = 0
        self._deaths = Counter(deaths or {})  # workers that died under each task
        self._losses: list[str] = []  # the tasks that have lost a device since one was last extracted
        self._losses_of: Counter[str] = Counter()

    @property
    def workers(self) -> int:
        """Workers that are alive or being placed."""
        return len(self._slots)

    def run(
        self,
        tasks: Iterator[Task],
        extract: Callable[[], Stage],
        finish: Callable[[], Stage],
        stop: threading.Event,
        failed_before: dict[str, int],
    ) -> Iterator[Event]:
        """Events as they happen; see LocalEngine.run."""
        connect(self.options)
        queue = Queue(tasks, self.options.ahead)
        stopped_at: float | None = None
        try:
            while True:
                if stop.is_set() and stopped_at is None:
                    stopped_at = time.monotonic()
                    queue.drop()
                    for slot in self._slots:
                        slot.following = None
                queue.fill()
                yield from self._assign(queue, extract)
                if not self._busy() and not len(queue):
                    return
                if stopped_at is not None and time.monotonic() - stopped_at > self.options.drain_seconds:
                    return
                yield from self._collect(queue, finish, failed_before)
                yield from self._overdue(queue, failed_before)
        finally:
            for slot in self._slots:
                ray.kill(slot.actor)
            self._slots = []

    def _busy(self) -> bool:
        return bool(self._finishing) or any(slot.running is not None for slot in self._slots)

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

    def _assign(self, queue: Queue, factory: Any) -> Iterator[Event]:
        idle = [slot for slot in self._slots if slot.running is None]
        wanted = min(self._most_workers(), max(self.options.min_workers, len(queue) + len(self._slots) - len(idle)))
        while len(self._slots) < wanted and len(queue):
            kind: Any = Worker
            worker = kind.options(
                num_gpus=self._gpus(), num_cpus=self.options.cpus_per_worker, runtime_env=WITHOUT_TOKENS
            )
            idle.append(_Slot(worker.remote(factory)))
            self._slots.append(idle[-1])
        crowded = len(self._finishing) >= 2 * max(1, len(self._slots)) + 2  # finishing falls behind: do not pile up
        for slot in idle if not crowded else []:
            task = slot.following or queue.take(slot.group)
            slot.following = None
            if task is None:
                if len(self._slots) > self.options.min_workers:
                    ray.kill(slot.actor)  # gives its GPU back, so that the cluster can shrink
                    self._slots.remove(slot)
                continue
            slot.task, slot.group, slot.since = task, task.group, time.monotonic()
            slot.running = slot.actor.process.remote(task)
            yield Event("started", task)
        for slot in self._slots:
            if slot.running is not None and slot.following is None and (task := queue.take(slot.group)):
                if task.group != slot.group and len(queue) < len(self._slots):
                    queue.put(task, first=True)  # better for a worker that is free sooner
                    continue
                slot.following = task
                slot.actor.prepare.remote(task)

    def _collect(self, queue: Queue, finish: Any, failed_before: dict[str, int]) -> Iterator[Event]:
        by_ref = {slot.running: slot for slot in self._slots if slot.running is not None}
        ready, _ = ray.wait([*by_ref, *self._finishing], num_returns=1, timeout=POLL)
        more = [ref for ref in (*by_ref, *self._finishing) if ref not in ready]
        if ready and more:  # take everything that is there
            others, _ = ray.wait(more, num_returns=len(more), timeout=0)
            ready += others
        for ref in ready:
            if ref in by_ref:
                slot = by_ref[ref]
                task, slot.task, slot.running = slot.task, None, None
                assert task is not None
                busy = time.monotonic() - slot.since
                kind, value = self._result(ref)
                if kind == "done":
                    self._losses.clear()
                    measured = value | {"busy": busy}
                    finishing = _finish.options(num_cpus=self.options.cpus_per_finish, runtime_env=WITHOUT_TOKENS)
                    self._finishing[finishing.remote(finish, task)] = (task, measured, time.monotonic())
                    yield Event("extracted", task, measured={"busy": busy})
                else:
                    if kind in ("worker-died", "node-died", "device-lost"):
                        self._lose(slot, queue)  # an error of CUDA stays in its process: a new worker starts without
                    yield self._failed(queue, task, kind, value, "extract", failed_before)
            else:
                task, measured, _ = self._finishing.pop(ref)
                kind, value = self._result(ref)
                if kind == "done":
                    self._storage_failures = 0
                    yield Event("finished", task, measured=measured | value)
                else:
                    yield self._failed(queue, task, kind, value, "finish", failed_before)

    def _lose(self, slot: _Slot, queue: Queue) -> None:
        """Give up a worker; what it was to do next goes back into the queue."""
        ray.kill(slot.actor)
        self._slots.remove(slot)
        if slot.following:
            queue.put(slot.following, first=True)

    @staticmethod
    def _result(ref: Any) -> tuple[str, Any]:
        try:
            kind, value = ray.get(ref)
            return kind, value
        except NodeDiedError as error:
            return "node-died", _text(error)
        except (OutOfMemoryError, MemoryError) as error:
            return "out-of-memory", _text(error)
        except (ActorDiedError, ActorUnavailableError, WorkerCrashedError, ObjectLostError) as error:
            text = _text(error)
            return ("node-died" if NODE_DIED in text else "worker-died"), text
        except RayTaskError as error:
            return "error", _text(error)
        except RayError as error:
            return "worker-died", _text(error)

    def _failed(
        self, queue: Queue, task: Task, kind: str, reason: str, stage: str, failed_before: dict[str, int]
    ) -> Event:
        if kind == "storage":
            self._storage_failures += 1
            if self._storage_failures >= MOST_STORAGE_FAILURES:
                raise WorkspaceError(f"results cannot be kept, {MOST_STORAGE_FAILURES} times in a row: {reason}")
        if kind == "input":
            return Event("failed", task, kind, reason, stage, True)
        if kind == "device-lost":
            return self._device_lost(queue, task, reason, stage)
        begun, reached = self.progress(task)
        tries = self._tries[task.key] = self._tries.get(task.key, 0) + 1
        begun |= kind not in ("worker-died", "deadline")  # an answer came: it had begun
        counted = kind not in ("node-died", "storage") and begun and reached <= self._reached.get(task.key, 0)
        self._reached[task.key] = reached
        self._deaths[task.key] += kind == "worker-died"
        if tries >= MOST_TRIES:
            return Event("quarantined", task, kind, f"tried {tries} times; {reason}", stage, True)
        if counted:
            failed_before[task.key] = failed_before.get(task.key, 0) + 1
            if failed_before[task.key] >= self._attempts(task, kind):
                return Event("quarantined", task, kind, reason, stage, True)
        queue.put(task)
        return Event("retry", task, kind, reason, stage, counted)

    def _attempts(self, task: Task, kind: str) -> int:
        """Failed attempts after which a task is at fault itself.

        Where workers die under other tasks too, something kills them: every such death may have been the one that hit
        this task, and is one more attempt for it.
        """
        if kind not in ("worker-died", "deadline"):
            return self.options.attempts
        return self.options.attempts + self._deaths.total() - self._deaths[task.key]

    def _device_lost(self, queue: Queue, task: Task, reason: str, stage: str) -> Event:
        """A device answers nothing any more. The task goes on elsewhere, and it counts against none.

        Raises DeviceLostError where device after device is lost, and quarantines a task that has lost several alone.
        """
        self._losses.append(task.key)
        self._losses_of[task.key] += 1
        if len(self._losses) >= MOST_LOSSES and len(set(self._losses)) > 1:
            raise DeviceLostError(
                f"devices were lost {len(self._losses)} times in a row, with no audit between: {reason}"
            )
        if self._losses_of[task.key] >= MOST_LOSSES_OF_A_TASK:
            lost = f"a device was lost {MOST_LOSSES_OF_A_TASK} times while it was audited; {reason}"
            return Event("quarantined", task, "device-lost", lost, stage, True)
        queue.put(task)
        return Event("retry", task, "device-lost", reason, stage)

    def _overdue(self, queue: Queue, failed_before: dict[str, int]) -> Iterator[Event]:
        now = time.monotonic()
        for slot in list(self._slots):
            if slot.running is not None and now - slot.since > self.options.extract_deadline:
                assert slot.task is not None
                self._lose(slot, queue)
                reason = f"no result after {self.options.extract_deadline:.0f} s: the worker was killed"
                yield self._failed(queue, slot.task, "deadline", reason, "extract", failed_before)
        for ref, (task, _, since) in list(self._finishing.items()):
            if now - since > self.options.finish_deadline:
                del self._finishing[ref]
                ray.cancel(ref, force=True)
                reason = f"no result after {self.options.finish_deadline:.0f} s: it was cancelled"
                yield self._failed(queue, task, "deadline", reason, "finish", failed_before)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
