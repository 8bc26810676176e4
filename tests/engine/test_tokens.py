"""Workers parse strangers' files: their environment holds no token of a source."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest
import ray

from audit.engine.ray import RayEngine, RayOptions, connect
from audit.engine.work import Place
from audit.states import Needs
from audit.tokens import TOKENS, emptied, put_away

CANARY = "canary-of-a-token-0123456789"


@dataclass(frozen=True)
class Piece:
    """A job that says where its stages are to write."""

    id: str
    group: str
    folder: str


class Look:
    """A stage that tells what its process holds, and those above it. Sent to workers by value."""

    def __init__(self, needs: Needs) -> None:
        self.needs, self.name = needs, f"look-{needs}"

    def done(self, job: Piece, workspace: None) -> bool:
        """Never."""
        return False

    def run(self, job: Piece, workspace: None, bench: None, tell: Any = None) -> None:
        """Every variable of this process, now and at its start, and of all processes that are started for Ray."""
        raw = {"own": Path("/proc/self/environ").read_bytes(), "now": repr(dict(os.environ)).encode()}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes()
                if b"ray" in command and b"pytest" not in command:
                    raw[str(path)] = path.with_name("environ").read_bytes() + command
            except OSError:
                continue
        said = b"\n".join(name.encode() + b": " + text for name, text in raw.items())
        Path(job.folder, f"{self.name}-{os.getpid()}").write_bytes(said)


def nowhere(needs: Needs) -> Place:
    """These stages need no place."""
    return Place(None, None)


def looked(folder: Path) -> list[str]:
    """What happened to a job that looks on a worker with a GPU and beside it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    engine = RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=1))
    stages = [Look(Needs.gpu), Look(Needs.cpu)]
    return [event.what for event in engine.run(iter([Piece("t", "g", str(folder))]), stages, nowhere, Flag(), {})]


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOKENS:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def no_ray() -> Iterator[None]:
    ray.shutdown()  # another test's
    yield
    ray.shutdown()


@pytest.mark.usefixtures("tokens", "no_ray")
def test_no_process_of_a_ray_that_starts_here_holds_a_token(tmp_path: Path) -> None:
    connect(RayOptions(), num_cpus=2, num_gpus=0)
    assert os.environ["HF_TOKEN"] == f"{CANARY}-HF_TOKEN"  # the driver, which fetches base models, keeps it
    assert looked(tmp_path) == ["started", "passed", "passed", "finished"]
    seen = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(seen) == 2
    assert all(b"raylet" in text for text in seen)
    assert not any(CANARY.encode() in text for text in seen)


@pytest.mark.usefixtures("tokens", "no_ray")
def test_a_worker_holds_no_token_where_its_machine_does(tmp_path: Path) -> None:
    """As on a cluster whose machines were started with tokens in their environment."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    held = ray.remote(lambda: os.environ.get("HF_TOKEN"))
    assert ray.get(held.remote()) == f"{CANARY}-HF_TOKEN"  # an ordinary task sees it
    assert looked(tmp_path)[-1] == "finished"
    seen = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(seen) == 2
    for text in seen:
        own = text[: text.index(b"/proc/")]
        assert b"own: " in own
        assert CANARY.encode() not in own


def test_tokens_are_put_away_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with put_away():
        assert not set(TOKENS) & set(os.environ)
    assert os.environ["CIVITAI_TOKEN"] == CANARY
    assert "HF_TOKEN" not in os.environ
    assert set(emptied().values()) == {""}
