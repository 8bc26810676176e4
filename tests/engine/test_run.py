"""`lora-audit run` as an operator uses it: resumed, killed, drained, shared, on this machine and on Ray."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from audit.config import load_config
from audit.demo import ASSETS
from audit.engine.due import Due, Skipped
from audit.engine.state import read_runs
from audit.errors import ConfigError
from audit.workspace import Workspace
from tests import warm
from tests.engine.fleet import environment, make_uploads, make_workspace, start, tables
from tests.warm import Command

AUDITS = 4


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet") / "uploads"
    make_uploads(folder, AUDITS, broken=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(uploads: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace after a run that nobody disturbed."""
    workspace = make_workspace(tmp_path_factory.mktemp("undisturbed") / "w", uploads)
    done = finished(start(workspace.root, "--json"))
    assert (done["state"], done["finished"], done["failed"]) == ("done", AUDITS, 1)
    return workspace


@pytest.fixture
def fresh(uploads: Path, tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w", uploads)


def finished(process: Command, codes: tuple[int, ...] = (0, 10)) -> dict[str, Any]:
    out, errors = process.communicate(timeout=200)
    assert process.returncode in codes, errors
    return json.loads(out) if out.strip() else {"stderr": errors}


def cli(*arguments: object) -> Any:
    done = warm.run(*arguments, "--json", env=environment(), timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for(workspace: Workspace, pattern: str, count: int = 1, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while len(list(workspace.root.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern} did not come"
        time.sleep(0.003)  # an audit of these settings is in the spool for a tenth of a second


def test_a_run_audits_everything_once_and_reports(undisturbed: Workspace) -> None:
    found = tables(undisturbed)
    assert len(found["audits"]) == AUDITS
    assert len(found["generations"]) == AUDITS * 12
    assert len(found["control_generations"]) == AUDITS
    assert found["matches"]
    assert len(list((undisturbed.root / "reports").glob("*.html"))) == AUDITS
    assert not list(undisturbed.root.glob("spool/*/*"))
    [failure] = undisturbed.rows("SELECT kind, state, stage, name FROM failures")
    assert failure == {"kind": "input", "state": "failed", "stage": "sample", "name": "broken-000.safetensors"}


def test_a_second_run_has_nothing_to_do_until_failures_are_forgiven(undisturbed: Workspace) -> None:
    before = tables(undisturbed)
    again = finished(start(undisturbed.root, "--json"))
    assert (again["finished"], again["failed"]) == (0, 0)
    groups = cli("failures", "--workspace", undisturbed.root)["groups"]
    assert [(group["kind"], group["audits"]) for group in groups] == [("input", 1)]
    assert cli("failures", "--retry", "--workspace", undisturbed.root)["forgiven"] == 1
    third = finished(start(undisturbed.root, "--json"), codes=(3,))  # every audit that was due failed
    assert (third["finished"], third["failed"]) == (0, 1)
    assert tables(undisturbed) == before
    status = cli("status", "--workspace", undisturbed.root)
    assert (status["audits"], status["failures"]) == (AUDITS, [{"state": "failed", "audits": 1}])
    assert len(status["runs"]) >= 3
    assert cli("verify", "--workspace", undisturbed.root) == {"problems": []}


def test_a_killed_driver_is_resumed_to_the_same_tables(fresh: Workspace, undisturbed: Workspace) -> None:
    killed = start(fresh.root)
    wait_for(fresh, "tables/audits/*/*.parquet")
    wait_for(fresh, "spool/*/*.parquet")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    [lost] = read_runs(fresh)
    refused = start(fresh.root)
    _, errors = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert lost.run_id in errors
    assert "counts as gone" in errors
    _age(fresh, lost.run_id)
    finished(start(fresh.root, "--json"))
    assert tables(fresh) == tables(undisturbed)


def _age(workspace: Workspace, run_id: str) -> None:
    """Let a run's last sign of life be long ago."""
    path = workspace.root / "runs" / f"{run_id}.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"heartbeat_at": time.time() - 1000}))


def test_sigterm_drains_and_exits_with_0(fresh: Workspace, undisturbed: Workspace) -> None:
    draining = start(fresh.root, "--json")
    wait_for(fresh, "spool/*/*.parquet")
    draining.send_signal(signal.SIGTERM)
    state = finished(draining)
    assert state["state"] == "stopped"
    assert 1 <= state["finished"] < AUDITS
    finished(start(fresh.root, "--json"))
    assert tables(fresh) == tables(undisturbed)


def test_a_budget_of_gpu_hours_ends_the_run(fresh: Workspace) -> None:
    state = finished(start(fresh.root, "--json", "--max-gpu-hours", "0.000001"))
    assert (state["state"], state["finished"]) == ("stopped", 1)
    assert state["waiting"] == AUDITS


def test_shards_share_the_work(fresh: Workspace, undisturbed: Workspace) -> None:
    both = [start(fresh.root, "--json", "--shard", f"{number}/2") for number in range(2)]
    states = [finished(one) for one in both]
    assert sum(state["finished"] for state in states) == AUDITS
    assert tables(fresh) == tables(undisturbed)


def test_ray_gives_the_same_tables_and_metrics(fresh: Workspace, undisturbed: Workspace) -> None:
    running = start(fresh.root, "--json", "--engine", "ray", "--max-workers", "2", "--metrics-port", "0")
    port = int(running.stderr.readline().split()[-1])
    seen = ""
    while running.poll() is None:
        with suppress(OSError, HTTPException):  # a busy driver answers late, one that ends not at all, or in part
            seen = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode() or seen
        time.sleep(0.2)
    state = finished(running)
    assert (state["finished"], state["failed"]) == (AUDITS, 1)
    assert tables(fresh) == tables(undisturbed)
    assert "lora_audit_audits_total" in seen
    assert state["images"] == AUDITS * 12


def test_a_worker_killed_in_the_middle_costs_nothing(fresh: Workspace, undisturbed: Workspace) -> None:
    running = start(fresh.root, "--json", "--engine", "ray", "--max-workers", "1")
    wait_for(fresh, "spool/*/*.parquet")
    for pid in _workers(running.pid):
        os.kill(pid, signal.SIGKILL)
    state = finished(running)
    assert (state["finished"], state["failed"], state["quarantined"]) == (AUDITS, 1, 0)
    assert state["retries"] >= 1
    assert tables(fresh) == tables(undisturbed)
    assert fresh.rows("SELECT DISTINCT kind, state FROM failures WHERE state = 'retry'")[0]["kind"] == "worker-died"


def _workers(driver: int) -> list[int]:
    """The extracting workers that a driver's own Ray has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::Worker" in path.read_bytes() and _descends(int(path.parent.name), driver):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def test_what_is_due(fresh: Workspace) -> None:
    bases = {"bases.sd1": str(ASSETS / "base")}

    def due(**overrides: object) -> tuple[int, dict[str, int]]:
        named = {name.replace("__", "."): value for name, value in overrides.items()}
        config = load_config(None, {}, {"workspace": str(fresh.root), "descriptor": "nano", **bases, **named})
        skipped = Skipped({})
        return len(list(Due(fresh, config, skipped))), skipped.counts

    assert due() == (AUDITS + 1, {})
    assert due(run__limit=2)[0] == 2
    assert due(run__where="name LIKE 'broken%'")[0] == 1
    assert due(run__shard="0/2")[0] + due(run__shard="1/2")[0] == AUDITS + 1
    config = load_config(None, {}, {"workspace": str(fresh.root), "descriptor": "nano", "bases.sdxl": "x"})
    skipped = Skipped({})
    assert list(Due(fresh, config, skipped)) == []
    assert skipped.counts == {"no base model is configured for family sd1": AUDITS + 1}
    for wrong in ({"run__where": "no_column = 1"}, {"run__shard": "2/2"}, {"run__shard": "x"}):
        with pytest.raises(ConfigError):
            due(**wrong)


def test_verify_finds_damage(fresh: Workspace) -> None:
    stored = sorted((fresh.root / "checkpoints").glob("*.safetensors"))
    content = bytearray(stored[0].read_bytes())
    content[-1] ^= 1
    stored[0].write_bytes(content)
    stored[1].unlink()
    done = warm.run("verify", "--json", "--workspace", fresh.root, env=environment(), timeout=100)
    assert done.returncode == 1
    problems = {one["where"].rpartition("/")[2]: one["problem"] for one in json.loads(done.stdout)["problems"]}
    assert problems == {
        stored[0].name: "its tensors are not those that were recorded", stored[1].name: "the file is missing",
    }  # fmt: skip
