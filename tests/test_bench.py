"""The bench opens, locates and loads each thing once, whoever asks, and keeps no more than it says."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from audit import bench as bench_module
from audit.bench import KEPT_CHECKPOINTS, Bench
from audit.errors import CheckpointError
from audit.job import Job, Request, resolve
from audit.workspace import Workspace
from tests.conftest import BASE, KOHYA

COUNTED = ("locate_base", "load_descriptor", "open_checkpoint", "load_base")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the real thing was called; each call takes its time, so that others come in between."""
    found: Counter[str] = Counter()

    def slowly(name: str) -> Callable[..., Any]:
        inner = getattr(bench_module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            found[name] += 1
            time.sleep(0.02)
            return inner(*arguments, **named)

        return call

    for name in COUNTED:
        monkeypatch.setattr(bench_module, name, slowly(name))
    return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Jobs of checkpoints that differ in strength."""
    folder, bench = tmp_path_factory.mktemp("jobs"), Bench()
    tensors, made = load_file(KOHYA), []
    for number in range(KEPT_CHECKPOINTS + 2):
        scaled = {name: tensor * (1 + 0.01 * number) for name, tensor in tensors.items()}
        save_file(scaled, folder / f"{number}.safetensors")
        made.append(resolve(Request(folder / f"{number}.safetensors", str(BASE)), "nano", bench))
    return made


def test_each_thing_is_made_once_for_all_threads(workspace: Workspace, jobs: list[Job], calls: Counter[str]) -> None:
    bench, start = Bench(), threading.Barrier(8)

    def ask(number: int) -> tuple[int, ...]:
        start.wait()
        return tuple(
            id(one)
            for one in (bench.location(jobs[0]), bench.descriptor(jobs[0]), bench.checkpoint(jobs[0], workspace),
                        bench.base(jobs[0]))
        )  # fmt: skip

    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(ask, range(8)))
    assert len(found) == 1
    assert calls == dict.fromkeys(COUNTED, 1)


def test_the_checkpoint_of_a_job_is_opened_once_from_asking_to_auditing(
    workspace: Workspace, calls: Counter[str]
) -> None:
    bench = Bench()
    job = resolve(Request(KOHYA, str(BASE)), "nano", bench)
    bench.checkpoint(job, workspace)
    bench.pair(job, workspace)
    assert calls == dict.fromkeys(COUNTED, 1)


def test_only_the_last_checkpoints_are_kept(workspace: Workspace, jobs: list[Job], calls: Counter[str]) -> None:
    bench = Bench()
    for job in jobs:
        bench.checkpoint(job, workspace)
    assert len(bench._opened) == KEPT_CHECKPOINTS
    bench.checkpoint(jobs[-1], workspace)
    assert calls["open_checkpoint"] == len(jobs)
    bench.checkpoint(jobs[0], workspace)
    assert calls["open_checkpoint"] == len(jobs) + 1


def test_what_failed_ahead_is_tried_again(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(KOHYA.read_bytes())
    job = resolve(Request(path, str(BASE)), "nano", Bench())
    path.unlink()
    bench = Bench()
    bench.ahead(job, workspace)
    with pytest.raises(CheckpointError, match="does not exist"):
        bench.checkpoint(job, workspace)
    path.write_bytes(KOHYA.read_bytes())
    assert bench.checkpoint(job, workspace).identity == job.checkpoint.identity


def test_another_base_takes_the_place_of_the_last(workspace: Workspace, jobs: list[Job], tmp_path: Path) -> None:
    import shutil
    from dataclasses import replace

    bench = Bench()
    first = bench.base(jobs[0])
    shutil.copytree(BASE, tmp_path / "other")
    config = tmp_path / "other/model_index.json"
    config.write_text(config.read_text() + "\n")
    location = bench.locate(str(tmp_path / "other"))
    other = replace(jobs[0].base, source=str(tmp_path / "other"), revision=location.revision)
    assert location.revision != jobs[0].base.revision
    assert bench.base(replace(jobs[0], base=other)) is not first
    assert bench.loaded_base() is not first
