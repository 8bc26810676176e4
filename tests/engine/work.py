"""Stages that need no model: they sleep, crash, hang or fail as their job says. Sent to Ray's workers by value."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.engine.work import Place
from audit.errors import CheckpointError, WorkspaceError
from audit.states import Needs


@dataclass(frozen=True)
class Piece:
    """A job that says what is to happen: the name of a behaviour, how long it takes, and where it leaves traces."""

    id: str
    group: str
    do: str
    seconds: float
    folder: str
    item_id: str = "item"
    name: str = "name"


@dataclass(frozen=True)
class Seen:
    """What the first stage measured: where it ran."""

    pid: int
    gpus: list[str]
    visible: str | None
    switches: int


def jobs(folder: Path, *behaviours: str, seconds: float = 0.0, groups: int = 1) -> Iterator[Piece]:
    """A job a behaviour."""
    for number, do in enumerate(behaviours):
        yield Piece(f"t{number:04d}", f"g{number % groups}", do, seconds, str(folder))


def nowhere(needs: Needs) -> Place:
    """These stages need no place."""
    return Place(None, None)


class Extract:
    """The first stage."""

    name = "sample"
    needs = Needs.gpu

    def __init__(self) -> None:
        self.groups: list[str] = []
        self.poisoned = False

    def done(self, job: Piece, workspace: None) -> bool:
        """Never."""
        return False

    def prepare(self, job: Piece, workspace: None, bench: None) -> None:
        """Leave a trace."""
        (Path(job.folder) / f"{job.id}.prepared").touch()

    def run(self, job: Piece, workspace: None, bench: None, tell: Any = None) -> Seen:
        """Behave."""
        tries = Path(job.folder) / f"{job.id}.tries"
        with tries.open("a") as file:
            file.write(f"{os.getpid()}\n")
        first = len(tries.read_text().splitlines()) == 1
        time.sleep(job.seconds)
        self.groups.append(job.group)
        switches = sum(a != b for a, b in zip(self.groups, self.groups[1:], strict=False))
        if job.do == "crash" or (job.do == "crash-once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.do == "hang" or (job.do == "hang-once" and first):
            time.sleep(3600)
        if job.do == "input":
            raise CheckpointError("the file is at fault")
        if job.do == "error" or (job.do == "error-once" and first):
            raise RuntimeError("something broke")
        if job.do == "memory-once" and first:
            raise MemoryError("full")
        if job.do == "assert" or (job.do == "assert-once" and first):
            self.poisoned = True
        if self.poisoned:  # as with CUDA: from its first error on, every call in this process fails
            raise RuntimeError("CUDA error: device-side assert triggered")
        if job.do == "storage" or (job.do == "storage-once" and first):
            raise WorkspaceError("the storage was away")
        import ray

        gpus = [str(gpu) for gpu in ray.get_gpu_ids()] if ray.is_initialized() else []
        return Seen(os.getpid(), gpus, os.environ.get("CUDA_VISIBLE_DEVICES"), switches)


class Finish:
    """The second stage."""

    name = "finish"
    needs = Needs.cpu

    def done(self, job: Piece, workspace: None) -> bool:
        """Never."""
        return False

    def run(self, job: Piece, workspace: None, bench: None, tell: Any = None) -> int:
        """Write the result, once more where it was written before."""
        if job.do == "finish-crash":
            os.kill(os.getpid(), signal.SIGKILL)
        with (Path(job.folder) / f"{job.id}.done").open("a") as file:
            file.write("x")
        return os.getpid()


def stages() -> list[Any]:
    """Both stages, new ones."""
    return [Extract(), Finish()]
