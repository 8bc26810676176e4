"""The GPU benchmark at toy size on a CPU: its parts, bounds and exit codes, and what is left of a cut-off run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from benchmarks.gpu import show
from benchmarks.gpu.facts import Record, State
from benchmarks.gpu.families import BOUNDS
from benchmarks.gpu.match import best_matches
from benchmarks.gpu.measure import tera_operations
from benchmarks.gpu.models import Kind, make_unet

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
# What a rented machine does not have, and the kit does not bring.
ABSENT = ("ray", "lycoris", "moto", "hypothesis", "pytest_httpserver", "boto3")


def run(file: Path, *options: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    hide = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    code = f"{hide}; import runpy; runpy.run_module('benchmarks.gpu', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, "--device", "cpu", "--tiny", "--json", str(file), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560, check=False
    )  # fmt: skip


def run_here(file: Path, *options: str) -> Result:
    """The same in this process, which has imported most of it."""
    with patch.dict(os.environ):
        from benchmarks.gpu.__main__ import main

        app = typer.Typer()
        app.command()(main)
        return CliRunner().invoke(app, ["--device", "cpu", "--tiny", "--json", str(file), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Every part, with no more packages than a rented machine has."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return run(file, "--seconds", "10000", absent=ABSENT), file


def figures(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(fact["part"], fact["name"]): fact["figures"] for fact in json.loads(file.read_text())["facts"]}


def test_every_part_runs_on_a_cpu(whole: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, file = whole
    results = show.read(file)
    assert results.ended
    assert [fact for fact in results.facts if fact.state is not State.measured] == [], done.stdout + done.stderr
    parts = list(dict.fromkeys(fact.part for fact in results.facts if fact.part))
    assert parts == ["card", "nano", "families", "memory", "sd15", "variants", "sdxl", "flow", "match", "end"]
    assert all(fact.line() in done.stdout for fact in results.facts)


def test_the_facts_are_those_of_a_cpu(whole: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    found = figures(whole[1])
    audit = found["nano", "audit"]
    assert audit["images"] == 20
    assert audit["matches"] == audit["matches_on_cpu"] > 0
    assert audit["cosine_least"] > 0.999
    assert found["nano", "batches"]["again_identical"] is True
    for name in BOUNDS:
        assert 1e-5 < found["families", name]["error"] < 0.1  # in half precision, and not in float32
    assert found["memory", "a cap on memory"]["largest_batch"] <= 2  # more are refused
    assert found["memory", "sticky error"]["assert_taken_for_memory"] is False
    assert found["sd15", "extraction"]["samplings_an_image"] == 1
    assert 0 < found["sd15", "extraction"]["not_evaluation_share"] < 1
    compiled = found["variants", "compiled blocks, UNet"]
    assert compiled["checkpoint_1_graphs"] > 0
    precisions = found["variants", "precisions, decoder"]
    assert 0 < precisions["fp16_levels_mean"] < precisions["bf16_levels_mean"]
    assert found["match", "100 x 2,000"]["copies_first"] == 1


def test_the_bounds_hold_and_decide_the_exit_code(whole: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, file = whole
    results = show.read(file)
    names = [bound.name for bound in results.bounds]
    assert {"same matches as on a CPU", "samplings of images kept", "samplings of images kept under a cap"} <= {*names}
    assert sum("in half precision" in name for name in names) == len(BOUNDS)
    speed = [bound for bound in results.bounds if not bound.counted]
    assert {bound.name for bound in speed} == {
        "share that is not network evaluation",
        "times diffusers' images a second",
    }
    assert results.broken == []
    assert done.returncode == 0


def test_decoding_short_of_memory_samples_nothing_twice(
    whole: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    assert figures(whole[1])["memory", "decoding alone"]["samplings_an_image"] == 1


def test_a_results_file_is_shown_as_a_table(whole: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.show", str(whole[1])]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "| families | flux | dtype bfloat16" in shown
    assert "| nano | same matches as on a CPU | True | True | yes |" in shown
    assert "(not counted)" in shown
    assert "CUT OFF" not in shown


def test_a_part_that_fails_is_a_fact_and_the_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run_here(file, "--parts", "nano,match", "--golden", str(tmp_path / "nowhere.npz"))
    assert done.exit_code == 1
    results = show.read(file)
    (failed,) = results.failed
    assert failed.part == "nano"
    assert "--make-golden" in str(failed.figures["text"])
    assert results.facts[-2].part == "match"
    assert results.facts[-2].state is State.measured
    assert "FAILED nano" in done.stdout
    assert "**failed**" in show.markdown(results)


def test_what_does_not_fit_into_the_time_is_skipped_and_said(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run_here(file, "--seconds", "0")
    assert done.exit_code == 0, done.stdout
    results = show.read(file)
    skipped = [fact.part for fact in results.facts if fact.state is State.skipped]
    assert skipped == ["card", "nano", "families", "memory", "sd15", "variants", "sdxl", "flow", "match"]
    assert "match: the part: SKIPPED needs_s 1, left_s 0" in done.stdout


def test_an_unknown_part_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = run_here(tmp_path / "gpu.json", "--parts", "card,nanno")
    assert done.exit_code == 2
    assert "nanno" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record({"device": "cpu"}, 100, tmp_path / "gpu.json", tiny=False, speed_counts=True)


def test_a_run_that_is_cut_off_keeps_its_facts(record: Record) -> None:
    record.step("first", 1, lambda: {"ms": 2.0})
    results = show.read(record.file)
    assert not results.ended
    assert results.facts[0].figures["ms"] == 2.0
    assert "CUT OFF" in show.markdown(results)


def test_a_step_is_begun_only_where_its_estimate_fits(record: Record) -> None:
    assert record.step("short", 50, dict)
    assert not record.step("long", 150, lambda: pytest.fail("it was begun"))
    assert record.results.facts[-1].state is State.skipped
    assert record.end() == 0


def test_a_bound_is_broken_by_what_is_beyond_it_or_no_number(record: Record) -> None:
    record.bound("held", 0.04, at_most=0.05)
    record.bound("at its edge", 1.5, at_least=1.5)
    assert record.results.broken == []
    record.bound("beyond", 0.06, at_most=0.05, speed=True)
    record.bound("no number", math.nan, at_most=0.05)
    record.bound("none", None, at_least=1.5)
    record.bound("another", 1.5, equal=1.0)
    assert [bound.name for bound in record.results.broken] == ["beyond", "no number", "none", "another"]
    assert record.end() == 1


def test_bounds_on_speed_do_not_count_at_toy_size(tmp_path: Path) -> None:
    record = Record({}, 100, tmp_path / "gpu.json", tiny=True, speed_counts=False)
    record.bound("slow", 0.1, at_least=1.5, speed=True)
    assert record.end() == 0
    record.bound("wrong", 2.0, equal=1.0)
    assert record.end() == 1


def test_an_error_in_a_part_leaves_the_next_part_alone(record: Record) -> None:
    with record.within("one"):
        raise ZeroDivisionError("of no use")
    with record.within("two"):
        record.step("after it", 1, lambda: {"ms": 1})
    one, two = record.results.facts
    assert (one.state, one.figures["error"]) == (State.failed, "ZeroDivisionError")
    assert str(one.figures["where"]).startswith("test_gpu.py:")
    assert two.state is State.measured
    assert record.end() == 1


def test_another_file_is_not_shown(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('[{"name": "lora-audit"}]')
    with pytest.raises(ValueError, match=r"other\.json is no results file"):
        show.read(other)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_the_best_matches_are_those_of_the_whole_product(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, references = (torch.randn(n, 16, generator=generator) for n in (5, 300))
    expected = (queries @ references.T).topk(3, dim=1).indices
    assert torch.equal(best_matches(queries, references, 3, block), expected)


def test_operations_are_counted_as_published() -> None:
    """An evaluation of Stable Diffusion 1.5's UNet at 512 pixels: 0.80 10^12 (two for a multiply and an add)."""
    unet = make_unet(Kind.sd15, "meta")
    with torch.inference_mode(), torch.device("meta"):
        inputs = torch.empty(1, 4, 64, 64), torch.empty(()), torch.empty(1, 77, 768)
        assert tera_operations(lambda: unet(*inputs)) == pytest.approx(0.803, abs=0.001)
