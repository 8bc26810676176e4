"""Chaos: a run on a real Ray cluster of several nodes while workers, nodes and the driver are killed."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from audit.engine.state import read_runs
from audit.workspace import Workspace
from tests.engine.fleet import SMALL, environment, start
from tests.warm import Command


class Chaos:
    """Kills something every few seconds until the run is through; ``killed`` counts what.

    ``load``: that many processes spin beside it. ``kills``: after so many, of each kind one at least, it is left alone.
    """

    def __init__(
        self, workspace: Workspace, nodes: int = 3, every: tuple[float, float] = (10.0, 20.0), seed: int = 0,
        settings: tuple[str, ...] = SMALL, load: int = 0, kills: int | None = None,
    ) -> None:  # fmt: skip
        self.load, self.kills = load, kills
        self.workspace, self.every, self.settings = workspace, every, settings
        self.choose = random.Random(seed)
        self.killed: dict[str, int] = {"worker": 0, "node": 0, "driver": 0}
        os.environ |= environment()  # the nodes' workers, too, have one thread each
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.others = [self.cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
        self.driver: Command | None = None

    def run(self, most_seconds: float) -> dict[str, Any]:
        """Run to the end; the last driver's state. Raises TimeoutError."""
        deadline = time.monotonic() + most_seconds
        spin = [sys.executable, "-c", "while True: pass"]
        busy = [subprocess.Popen(spin) for _ in range(self.load)]
        try:
            while True:
                self._start()
                outcome = self._until_killed(deadline)
                if outcome is not None:
                    return outcome
        finally:
            for process in busy:
                process.kill()
                process.wait()
            if self.driver and self.driver.poll() is None:
                self.driver.kill()
            self.cluster.shutdown()

    def _start(self) -> None:
        for run in read_runs(self.workspace):  # a killed driver's lease: not to wait for its 60 s each time
            path = self.workspace.root / "runs" / f"{run.run_id}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"heartbeat_at": 0.0}))
        options = ("--engine", "ray", "--address", self.cluster.address, "--max-workers", "2", "--gpus-per-worker", "0",
                   "--cpus-per-worker", "0.5", "--json")  # fmt: skip
        self.driver = start(self.workspace.root, *options, settings=self.settings)

    def _until_killed(self, deadline: float) -> dict[str, Any] | None:
        assert self.driver is not None
        while True:
            enough = self.kills is not None and all(self.killed.values()) and sum(self.killed.values()) >= self.kills
            pause = math.inf if enough else time.monotonic() + self.choose.uniform(*self.every)
            while time.monotonic() < pause:
                if self.driver.poll() is not None:
                    out, errors = self.driver.communicate()
                    if self.driver.returncode not in (0, 10):
                        raise RuntimeError(f"the driver ended with {self.driver.returncode}: {errors[-2000:]}")
                    return dict(json.loads(out))
                if time.monotonic() > deadline:
                    raise TimeoutError("the run did not end")
                time.sleep(0.2)
            missing = [name for name, count in self.killed.items() if not count]  # each kind once, then by chance
            what = self.choose.choice(missing or ("worker", "worker", "node", "driver"))
            if not self._kill(what):
                continue
            self.killed[what] += 1
            if what == "driver":
                return None

    def _kill(self, what: str) -> bool:
        assert self.driver is not None
        if what == "driver":
            self.driver.send_signal(signal.SIGKILL)
            self.driver.communicate()
            return True
        if what == "node":
            node = self.others.pop(0)
            self.cluster.remove_node(node, allow_graceful=False)
            self.others.append(self.cluster.add_node(num_cpus=1))
            return True
        pids = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if _read(path).startswith(b"ray::Worker") and _is_ours(int(path.parent.name))
        ]
        if pids:
            os.kill(self.choose.choice(pids), signal.SIGKILL)
        return bool(pids)


def _is_ours(pid: int) -> bool:
    """Whether a process descends from this one: the machine may have other clusters."""
    while pid > 1:
        if pid == os.getpid():
            return True
        parent = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
        pid = int(parent[1]) if parent else 0
    return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
