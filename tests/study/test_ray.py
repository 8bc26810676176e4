"""A study on a real Ray, its workspace on object storage: the rows of the local engine on a disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from audit.config import EngineName, RunSettings
from audit.study.kept import KeptState, fetch_checkpoint, keep_checkpoint
from audit.study.plan import plan_of, study_of
from audit.study.results import long_table
from audit.study.run import run_study
from audit.workspace import Workspace
from tests.test_files import s3

__all__ = ["s3"]
STUDY: dict[str, Any] = {
    "study": "tiny", "base": "nano", "descriptor": "nano", "sets": "demo", "only": ["stamps-fruit"],
    "factors": {"n0": 2, "images": 2, "steps": 1, "batch": 2, "extraction": "direct"},
    "cells": [{"rank": 2, "lr": 1e-3}],
    "settings": {"steps": 2, "control_share": 0.0},
}  # fmt: skip
OF_A_RUN = ("seconds", "device", "finished_at")


@pytest.fixture
def cluster(s3: str) -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def rows(workspace: Workspace) -> list[dict[str, Any]]:
    found = long_table(workspace, "tiny").to_pylist()
    return [{name: one[name] for name in one if not any(word in name for word in OF_A_RUN)} for one in found]


def test_a_study_on_ray_and_object_storage_has_the_rows_of_the_local_engine(
    cluster: None, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(study_of(STUDY), tmp_path)
    here, there = Workspace(tmp_path / "w"), Workspace(f"s3://bucket/{tmp_path.name}?{s3}")
    settings = RunSettings(engine=EngineName.ray, gpus_per_worker=0.0, cpus_per_worker=1.0, max_workers=1)
    told: list[int] = []
    done = run_study(plan, there, tmp_path, run=settings, tell=lambda what, number, total: told.append(number))
    assert (done.fine_tunes, done.audits, done.failed, told) == (1, 1, [], [1])
    local = run_study(plan, here, tmp_path)
    assert (local.fine_tunes, local.audits, local.failed) == (1, 1, [])
    assert rows(there) == rows(here)
    [kept] = there.rows("SELECT file FROM fine_tunes")
    assert there.files.exists(kept["file"])
    assert not list(there.files.list("studies/states"))


def test_checkpoints_and_states_are_found_on_another_machine(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Workspace(f"s3://bucket/{tmp_path.name}?{s3}").files

    def write(folder: Path) -> None:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet/a.safetensors").write_bytes(b"weights")

    whole = keep_checkpoint(files, "one", write, None)
    single = keep_checkpoint(files, "two", write, "unet/a.safetensors")
    state = KeptState(files, "three")
    state.find().parent.mkdir(parents=True, exist_ok=True)
    state.path.write_bytes(b"half-way")
    state.saved()
    assert files.read(state.key) is None  # states are large: not every one is sent
    monkeypatch.setattr("audit.study.kept.SEND_EVERY", -1.0)
    state.saved()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert (fetch_checkpoint(files, whole) / "unet/a.safetensors").read_bytes() == b"weights"
    assert fetch_checkpoint(files, single).read_bytes() == b"weights"
    other = KeptState(files, "three")
    assert other.find().read_bytes() == b"half-way"
    other.remove()
    assert files.read(state.key) is None
    with pytest.raises(FileNotFoundError):
        fetch_checkpoint(files, "studies/fine-tunes/none")
