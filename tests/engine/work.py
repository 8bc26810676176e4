"""Stages that need no model: they sleep, crash, hang or fail as their task says. Sent to Ray's workers by value."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.engine.work import Task
from audit.errors import CheckpointError, WorkspaceError


@dataclass(frozen=True)
class Payload:
    """What a task does: the name of a behaviour, how long it takes, and where it leaves traces."""

    do: str
    seconds: float
    folder: str
    item_id: str = "item"
    name: str = "name"


def tasks(folder: Path, *behaviours: str, seconds: float = 0.0, groups: int = 1) -> Iterator[Task]:
    """A task a behaviour."""
    for number, do in enumerate(behaviours):
        yield Task(f"t{number:04d}", f"g{number % groups}", Payload(do, seconds, str(folder)))


class Extract:
    """The first stage."""

    def __init__(self) -> None:
        self.groups: list[str] = []
        self.poisoned = False

    def prepare(self, task: Task) -> None:
        """Leave a trace."""
        (Path(task.payload.folder) / f"{task.key}.prepared").touch()

    def process(self, task: Task) -> dict[str, Any]:
        """Behave."""
        payload: Payload = task.payload
        tries = Path(payload.folder) / f"{task.key}.tries"
        with tries.open("a") as file:
            file.write(f"{os.getpid()}\n")
        first = len(tries.read_text().splitlines()) == 1
        time.sleep(payload.seconds)
        self.groups.append(task.group)
        switches = sum(a != b for a, b in zip(self.groups, self.groups[1:], strict=False))
        if payload.do == "crash" or (payload.do == "crash-once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if payload.do == "hang" or (payload.do == "hang-once" and first):
            time.sleep(3600)
        if payload.do == "input":
            raise CheckpointError("the file is at fault")
        if payload.do == "error" or (payload.do == "error-once" and first):
            raise RuntimeError("something broke")
        if payload.do == "memory-once" and first:
            raise MemoryError("full")
        if payload.do == "assert" or (payload.do == "assert-once" and first):
            self.poisoned = True
        if self.poisoned:  # as with CUDA: from its first error on, every call in this process fails
            raise RuntimeError("CUDA error: device-side assert triggered")
        if payload.do == "storage" or (payload.do == "storage-once" and first):
            raise WorkspaceError("the storage was away")
        import ray

        gpus = list(ray.get_gpu_ids()) if ray.is_initialized() else []
        return {"pid": os.getpid(), "gpus": gpus, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "switches": switches, "extract": payload.seconds}  # fmt: skip


class Finish:
    """The second stage."""

    def prepare(self, task: Task) -> None:
        """Nothing."""

    def process(self, task: Task) -> dict[str, Any]:
        """Write the result, once more where it was written before."""
        if task.payload.do == "finish-crash":
            os.kill(os.getpid(), signal.SIGKILL)
        with (Path(task.payload.folder) / f"{task.key}.done").open("a") as file:
            file.write("x")
        return {"finish_pid": os.getpid()}
