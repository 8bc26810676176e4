"""The short form of ``python -m tests.fuzz``, and that it finds what there is to find."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from audit.errors import AuditError
from tests.fuzz import worker
from tests.fuzz.__main__ import shares
from tests.fuzz.kind import Kind
from tests.fuzz.supervise import Supervisor, replay
from tests.fuzz.worker import KINDS, input_of, verdict

# inputs of a kind, of a seed that the long run does not have
SHORT = {
    "safetensors": 1200, "gguf": 1200, "texts": 400, "peft": 600, "civitai": 300, "huggingface": 300, "cards": 200,
    "pictures": 1000, "archives": 100, "inspected": 60, "sidecars": 10, "bases": 1, "workspaces": 2,
    "tars": 500, "lists": 500, "tables": 40,
}  # fmt: skip


@pytest.fixture
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_kind_is_in_the_short_form() -> None:
    assert set(SHORT) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("_silent")
def test_inputs_of_a_fixed_seed_are_read_or_refused(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    for index in range(SHORT[name]):
        begun = time.monotonic()
        found, error = verdict(kind, input_of(kind, 7, index))
        assert error is None, f"python -m tests.fuzz --kinds {name} --seed 7, input {index}"
        assert found in ("accepted", "refused")
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("name", ["safetensors", "pictures", "peft", "cards"])
def test_an_input_is_the_same_for_the_same_seed(name: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = KINDS[name](tmp_path / "one"), KINDS[name](tmp_path / "two")
    backwards = [input_of(two, 3, index) for index in reversed(range(60))]
    assert [input_of(one, 3, index) for index in range(60)] == backwards[::-1]
    assert input_of(one, 3, 1) != input_of(one, 4, 1)


def test_the_shares_make_a_million() -> None:
    counts = shares(list(KINDS), 1_000_000)
    assert abs(sum(counts.values()) - 1_000_000) <= len(counts)
    assert min(shares(list(KINDS), 10).values()) == 1


class Faulty(Kind):
    """Does with input 1 to 4 what nothing may do."""

    name, share, memory = "faulty", 1, 64

    def make(self, choose: Random) -> bytes:
        return bytes([choose.randrange(256)])

    def check(self, data: bytes) -> None:
        number = len(list(self.place.parent.glob("count-*")))
        (self.place.parent / f"count-{number}").touch()
        if number == 1:
            raise KeyError("nobody foresaw it")
        if number == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 3:
            time.sleep(60)
        if number == 4:
            self.kept = b"x" * (200 << 20)
        if number == 5:
            raise AuditError("refused in words")


def _work_with_faults(*arguments: object) -> None:
    worker.KINDS["faulty"] = Faulty
    worker.work(*arguments)  # type: ignore[arg-type]


def test_a_crash_a_hang_and_memory_are_found_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(worker.KINDS, "faulty", Faulty)
    monkeypatch.setattr("tests.fuzz.supervise.work", _work_with_faults)
    told: list[str] = []
    result = Supervisor(1, tmp_path, told.append, hang=4.0, start="fork").run("faulty", 7, time.monotonic() + 120)
    assert (result.crashes, result.hangs, result.memory) == (2, 1, 1)
    assert (result.inputs, result.refused, result.accepted) == (7, 1, 3)
    found = {path.name.split("-")[-1]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"crash.json", "hang.json", "memory.json"}
    places = [json.loads(path.read_text())["where"] for path in tmp_path.glob("*-crash.json")]
    assert any("SIGSEGV" in where for where in places)
    assert any("KeyError" in where for where in places)
    monkeypatch.setattr(Faulty, "check", lambda self, data: None)
    replay(next(tmp_path.glob("*-crash.json")))
    assert "accepted" in capsys.readouterr().out
