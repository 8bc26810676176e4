"""A short chaos run; benchmarks/chaos.py runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.workspace import Workspace
from tests.engine.chaos import Chaos
from tests.engine.fleet import make_uploads, make_workspace, start, tables

AUDITS = 15
EVERY = (12.0, 18.0)  # s between kills: a worker must get to its work before
KILLS = 3  # a worker, a node, the driver
SETTINGS = ("settings.steps=10", "settings.images_per_training_image=8")


@pytest.mark.timeout(900)
def test_whatever_is_killed_the_tables_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    make_uploads(tmp_path / "uploads", AUDITS)
    quiet = make_workspace(tmp_path / "quiet", tmp_path / "uploads")
    start(quiet.root, settings=SETTINGS).communicate(timeout=200)
    workspace: Workspace = make_workspace(tmp_path / "chaos", tmp_path / "uploads")
    chaos = Chaos(workspace, every=EVERY, seed=3, settings=SETTINGS, kills=KILLS)
    state = chaos.run(most_seconds=700)
    assert state["state"] == "done"
    assert all(chaos.killed.values()), chaos.killed
    found = tables(workspace)
    assert len(found["audits"]) == AUDITS
    assert found == tables(quiet)
