"""Storage that fills up under a run: a real file system without space, and an object store that overflows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.workspace import Workspace
from tests.engine.fleet import environment, make_uploads, make_workspace, start, tables
from tests.engine.test_run import finished


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take all space of a file system but ``leave`` bytes."""
    room = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(bytes(room.f_bavail * room.f_frsize - leave))
    return filler


def test_a_full_disk_ends_the_run_and_costs_nothing(small_disk: Path, tmp_path: Path) -> None:
    make_uploads(tmp_path / "uploads", 2)
    undisturbed = make_workspace(tmp_path / "undisturbed", tmp_path / "uploads")
    finished(start(undisturbed.root, "--json"))
    workspace = make_workspace(small_disk / "w", tmp_path / "uploads")
    filler = fill(small_disk, leave=60_000)
    options = ("--engine", "ray", "--max-workers", "1")
    ended = start(workspace.root, *options)
    _, errors = ended.communicate(timeout=200)
    assert ended.returncode not in (0, 10), errors
    assert "no disk space" in errors
    filler.unlink()
    again = Workspace(small_disk / "w")
    assert not again.rows("SELECT 1 FROM failures WHERE state = 'quarantined'")
    finished(start(workspace.root, "--json", *options))
    assert tables(again) == tables(undisturbed)


SCRIPT = """
import threading
from pathlib import Path
import numpy as np, ray, sys
ray.init(num_cpus=4, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
from tests.engine import work
ray.cloudpickle.register_pickle_by_value(work)
held = [ray.put(np.full(2**20, number % 256, np.uint8)) for number in range(200)]
from audit.engine.ray import RayEngine, RayOptions
engine = RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=2))
folder = Path(sys.argv[1])
events = list(engine.run(work.jobs(folder, *["ok"] * 30), work.stages(), work.nowhere, threading.Event(), {}))
print("finished", sum(event.what == "finished" for event in events), "kept", ray.get(held[0])[0], len(held))
"""


def test_an_overflowing_object_store_stops_nothing(tmp_path: Path) -> None:
    """Pictures go from a worker to the workspace, never through the object store: only small answers travel."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished 30 kept 0 200" in done.stdout
