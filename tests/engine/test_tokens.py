"""Workers parse strangers' files: their environment holds no token of a source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest
import ray

from audit.engine.ray import RayEngine, RayOptions, connect
from audit.engine.work import Stage, Task
from audit.tokens import TOKENS, emptied, put_away

CANARY = "canary-of-a-token-0123456789"


def looking(folder: str) -> Callable[[], Stage]:
    """A factory of stages that tell what their process holds, and those above it. Sent to workers by value."""

    class Look:
        def prepare(self, task: Any) -> None:
            """Nothing."""

        def process(self, task: Any) -> dict[str, Any]:
            """Every variable of this process, now and at its start, and of all processes that are started for Ray."""
            import os
            from pathlib import Path

            raw = {"own": Path("/proc/self/environ").read_bytes(), "now": repr(dict(os.environ)).encode()}
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    command = path.read_bytes()
                    if b"ray" in command and b"pytest" not in command:
                        raw[str(path)] = path.with_name("environ").read_bytes() + command
                except OSError:
                    continue
            said = b"\n".join(name.encode() + b": " + text for name, text in raw.items())
            Path(folder, str(os.getpid())).write_bytes(said)
            return {}

    return Look


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
    engine = RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=1))
    stage = looking(str(tmp_path))
    events = list(engine.run(iter([Task("t", "g", None)]), stage, stage, Flag(), {}))
    assert [event.what for event in events] == ["started", "extracted", "finished"]
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
    engine = RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=1))
    stage = looking(str(tmp_path))
    list(engine.run(iter([Task("t", "g", None)]), stage, stage, Flag(), {}))
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
