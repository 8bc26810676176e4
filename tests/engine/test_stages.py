"""Engines run lists of stages: what needs a GPU on a worker, the rest beside it, in the order of the list."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from audit.engine.local import LocalEngine
from audit.engine.ray import RayEngine, RayOptions
from audit.engine.work import Event, Place, segments_of
from audit.states import Needs
from tests.engine import test_stages as this_module

ORDERS = ["gpu", "cpu", "gpu cpu", "cpu gpu", "gpu gpu cpu cpu", "cpu gpu cpu gpu"]


@dataclass(frozen=True)
class Toy:
    id: str
    folder: str
    group: str = "one"


@dataclass(frozen=True)
class Trace:
    """Where a stage ran."""

    stage: str
    pid: int
    on_worker: bool


class Toys:
    """A whole stage: writes its name behind those of the stages before it."""

    def __init__(self, name: str, needs: Needs) -> None:
        self.name, self.needs = name, needs

    def done(self, job: Toy, workspace: str) -> bool:
        return (Path(job.folder) / f"{job.id}.{self.name}.done").exists()

    def run(self, job: Toy, workspace: str, bench: str, tell: Any = None) -> Trace:
        assert (workspace, bench) == ("workspace", "bench")
        with (Path(job.folder) / f"{job.id}.order").open("a") as file:
            file.write(f"{self.name} ")
        actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        return Trace(self.name, os.getpid(), bool(actor))


def toys(order: str) -> list[Toys]:
    return [Toys(f"{needs}{number}", Needs(needs)) for number, needs in enumerate(order.split())]


def place(needs: Needs) -> Place:
    return Place("workspace", "bench")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.cloudpickle.register_pickle_by_value(this_module)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def run(engine: Any, order: str, folder: Path, jobs: int = 3) -> list[Event]:
    work = (Toy(f"job{number}", str(folder)) for number in range(jobs))
    return list(engine.run(work, toys(order), place, threading.Event(), {}))


def check(events: list[Event], order: str, folder: Path) -> None:
    names = [toy.name for toy in toys(order)]
    finished = {event.job.id: event for event in events if event.what == "finished"}
    assert sorted(finished) == ["job0", "job1", "job2"]
    for job, event in finished.items():
        assert (folder / f"{job}.order").read_text().split() == names
        assert [record.stage for record in event.records] == names
        passed = [one.stage for one in events if one.what == "passed" and one.job.id == job]
        assert ", ".join(passed).split(", ") == names
        assert next(one.what for one in events if one.job.id == job) == "started"


@pytest.mark.parametrize("order", ORDERS)
def test_stages_run_in_order_in_this_process(order: str, tmp_path: Path) -> None:
    check(run(LocalEngine(), order, tmp_path), order, tmp_path)


@pytest.mark.parametrize("order", ORDERS)
def test_stages_run_in_order_on_ray_each_where_it_belongs(cluster: None, order: str, tmp_path: Path) -> None:
    engine = RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=2))
    events = run(engine, order, tmp_path)
    check(events, order, tmp_path)
    for event in events:
        for record in event.records:
            assert record.on_worker == record.stage.startswith("gpu")


def test_consecutive_stages_of_a_kind_share_a_worker() -> None:
    assert [segment.name for segment in segments_of(toys("gpu gpu cpu gpu"))] == ["gpu0, gpu1", "cpu2", "gpu3"]


def test_a_stage_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "job0.gpu0.done").touch()
    events = run(LocalEngine(), "gpu cpu", tmp_path, jobs=1)
    assert (tmp_path / "job0.order").read_text().split() == ["cpu1"]
    assert [record.stage for record in events[-1].records] == ["cpu1"]


def test_the_stages_of_an_audit_load_no_library() -> None:
    probe = "import sys, audit.stages; print({'torch', 'duckdb', 'pyarrow', 'ray', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "set()\n"


def test_the_engines_know_nothing_of_diffusion() -> None:
    probe = "import sys, audit.engine.local, audit.engine.ray; print({'torch', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "set()\n"
