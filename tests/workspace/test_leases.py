"""Who may work on a workspace: one run a shard, whatever is written where leases are."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from audit.config import load_config
from audit.engine.run import Run
from audit.engine.state import RunState, read_runs
from audit.errors import WorkspaceError
from audit.workspace import Workspace
from audit.workspace.leases import Holder, Leases, alive_runs, is_alive


def holder(run_id: str, shard: str = "0/1") -> Holder:
    return Holder(run_id, shard, "host", 1)


def beat(workspace: Workspace, run_id: str, heartbeat: Any = None, **other: Any) -> None:
    said = {"state": "running", "heartbeat_at": time.time() if heartbeat is None else heartbeat, **other}
    workspace.files.write(f"runs/{run_id}.json", json.dumps(said).encode())


def test_of_many_that_start_together_one_goes_on(either: Workspace) -> None:
    taken: list[str] = []
    refused: list[str] = []

    def start(run_id: str) -> None:
        beat(either, run_id)
        try:
            Leases(either.files).take(holder(run_id))
            taken.append(run_id)
        except WorkspaceError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(f"run-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert len(refused) == 5
    assert all(taken[0] in text for text in refused)
    assert Leases(either.files).held(taken[0])


def test_a_dead_runs_lease_is_taken_over_by_exactly_one(workspace: Workspace) -> None:
    for _ in range(5):
        dead = f"dead-{time.time_ns()}"
        beat(workspace, dead)
        Leases(workspace.files).take(holder(dead))
        beat(workspace, dead, time.time() - 61)
        taken: list[str] = []

        def start(run_id: str, taken: list[str] = taken) -> None:
            beat(workspace, run_id)
            try:
                Leases(workspace.files).take(holder(run_id))
                taken.append(run_id)
            except WorkspaceError:
                pass

        threads = [threading.Thread(target=start, args=(f"next-{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        assert not Leases(workspace.files).held(dead)
        beat(workspace, taken[0], 0.0)


def test_shards_stand_side_by_side_and_other_divisions_are_refused(workspace: Workspace) -> None:
    for run_id, shard in (("a", "0/2"), ("b", "1/2")):
        beat(workspace, run_id)
        Leases(workspace.files).take(holder(run_id, shard))
    beat(workspace, "c")
    with pytest.raises(WorkspaceError, match="shares the work"):
        Leases(workspace.files).take(holder("c", "0/3"))
    with pytest.raises(WorkspaceError, match="run b on host"):
        Leases(workspace.files).take(holder("c", "1/2"))
    assert [one.run_id for one in Leases(workspace.files).holders()] == ["a", "b"]


@pytest.mark.parametrize(
    "heartbeat", [10**18, 10**400, float("inf"), float("nan"), "now", None, [], {}, True, -1, 1e300]
)
def test_a_heartbeat_that_is_no_time_blocks_nobody(workspace: Workspace, heartbeat: Any) -> None:
    beat(workspace, "odd")
    Leases(workspace.files).take(holder("odd"))
    workspace.files.write("runs/odd.json", json.dumps({"state": "running", "heartbeat_at": heartbeat}).encode())
    assert not is_alive(workspace.files, "odd")
    beat(workspace, "mine")
    Leases(workspace.files).take(holder("mine"))
    assert read_runs(workspace) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"holders": 7}', b'{"holders": [7, {}]}', b"[" * 9999]
)
def test_a_damaged_lease_blocks_nobody_and_costs_no_run_its_work(workspace: Workspace, content: bytes) -> None:
    beat(workspace, "first")
    leases = Leases(workspace.files)
    leases.take(holder("first"))
    if b"[7" not in content:
        workspace.files.write("runs/leases/000000000002.json", content)
        assert leases.held("first")
        beat(workspace, "second")
        with pytest.raises(WorkspaceError, match="run first"):
            leases.take(holder("second"))
    workspace.files.write("runs/leases/000000000001.json", content)
    leases.take(holder("second"))
    assert leases.held("second")


def test_runs_of_other_versions_and_half_written_ones_stop_nothing(workspace: Workspace) -> None:
    now = time.time()
    good = RunState("good", "0/1", "host", 1, now, {}, heartbeat_at=now)
    from dataclasses import asdict

    workspace.files.write("runs/good.json", json.dumps(asdict(good)).encode())
    workspace.files.write("runs/newer.json", json.dumps(asdict(good) | {"run_id": "newer", "mood": "good"}).encode())
    workspace.files.write("runs/half.json", json.dumps(asdict(good)).encode()[:40])
    workspace.files.write("runs/typed.json", json.dumps(asdict(good) | {"finished": "many"}).encode())
    workspace.files.write("runs/empty.json", b"")
    assert [run.run_id for run in read_runs(workspace)] == ["good"]
    assert {one.run_id for one in alive_runs(workspace.files)} == {"good", "newer", "typed"}
    done = subprocess.run(
        [sys.executable, "-c", "from audit.cli import main; main()", "verify", "--json", "--workspace",
         str(workspace.root)], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    named = {one["where"] for one in json.loads(done.stdout)["problems"]}
    assert named == {"runs/newer.json", "runs/half.json", "runs/typed.json", "runs/empty.json"}


def run_of(workspace: Workspace) -> Run:
    return Run(load_config(None, {}, {"workspace": str(workspace.root), "descriptor": "nano", "bases.sd1": "x"}))


def test_a_refused_run_leaves_no_trace(workspace: Workspace) -> None:
    first, second = run_of(workspace), run_of(workspace)
    first._take_lease()
    with pytest.raises(WorkspaceError, match=first.state.run_id):
        second._take_lease()
    assert [run.run_id for run in read_runs(workspace)] == [first.state.run_id]


def test_a_run_that_lost_its_lease_stops(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.engine.run.HEARTBEAT", 0.05)
    lost = run_of(workspace)

    def work() -> None:
        lost._lock.acquire()  # it stands still
        beat(workspace, lost.state.run_id, time.time() - 100)
        run_of(workspace)._take_lease()
        lost._lock.release()
        assert lost.stop.wait(10)

    monkeypatch.setattr(lost, "_work", work)
    with pytest.raises(WorkspaceError, match="another one took its work over"):
        lost.run()
    [state] = [run.state for run in read_runs(workspace) if run.run_id == lost.state.run_id]
    assert state == "broken"


def test_two_processes_started_together_never_both_go_on(tmp_path: Path) -> None:
    script = """
import sys, time
from audit.config import load_config
from audit.engine.run import Run
run = Run(load_config(None, {}, {"workspace": sys.argv[1], "descriptor": "nano", "bases.sd1": "x"}))
print("ready", flush=True)
sys.stdin.readline()
run._work = lambda: time.sleep(2)
try:
    print(run.run().state)
except Exception as error:
    print("refused")
"""
    Workspace(tmp_path / "w")
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "w")], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]  # fmt: skip
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    said = sorted(one.communicate(timeout=60)[0].strip() for one in both)
    assert said == ["done", "refused", "refused"]
