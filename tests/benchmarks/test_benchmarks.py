"""The benchmarks run end to end at a tiny size, and their statistics are right."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from audit.config import Clustering, Settings
from audit.demo import ASSETS
from benchmarks import clustering, extraction, membership, sampling, settings, tables, workspace_tables
from benchmarks.grid import SHIPPED, Job, available, interval, run_job

KEYS = {
    "set", "holdout", "tuning", "method", "clustering", "w", "k", "images", "evaluations", "as", "a_esr_07",
    "a_esr_06", "control_as", "ceiling", "seconds",
}  # fmt: skip


def run(main: object, *arguments: str) -> object:
    app = main if isinstance(main, typer.Typer) else typer.Typer()
    if app is not main:
        app.command()(main)  # type: ignore[type-var]
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def row(checkpoint: str, method: str, value: float, holdout: bool = False) -> dict[str, object]:
    return {
        "checkpoint": checkpoint, "set": checkpoint, "holdout": holdout, "tuning": "lora", "strength": "medium",
        "defence": "none", "method": method, "clustering": "default", "w": None, "as": value, "a_esr_07": value / 2,
        "a_esr_06": value, "control_as": 0.1, "control_a_esr_07": 0.0,
    }  # fmt: skip


def test_extraction_writes_every_key_and_draws_a_sheet(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    workspace = str(tmp_path / "workspace")
    arguments = [
        "--quick", "--only", "stamps-birds-dreambooth", "--steps", "6", "--sheets", str(tmp_path / "sheets"),
        "--json", str(written), "--workspace", workspace,
    ]  # fmt: skip
    done = run(extraction.main, *arguments)
    assert done.exit_code in (0, 1)
    rows = json.loads(written.read_text())
    assert {one["method"] for one in rows} == {"direct", "cfg", "model_guidance"}
    assert all(set(one) >= KEYS for one in rows)
    assert len({one["images"] for one in rows}) == 1
    for one in rows:
        assert one["evaluations"] == one["images"] * 6 * (1 if one["method"] == "direct" else 2)
        assert 0 < one["as"] <= 1
        assert one["a_esr_07"] <= one["a_esr_06"]
    assert (tmp_path / "sheets/stamps-birds-dreambooth.png").stat().st_size > 10_000
    assert "control" in tables.markdown(written)


def test_both_clusterings_are_scored_on_the_same_images(tmp_path: Path) -> None:
    chosen = Settings(steps=3, images_per_training_image=4)
    (recipe,) = available(SHIPPED, ["stamps-birds-dreambooth"])
    job = Job(recipe, (chosen,), SHIPPED, ASSETS / "base", tmp_path, tuple(Clustering), clique_limit=5)
    default, paper = run_job(job)
    assert (default["clustering"], paper["clustering"]) == ("default", "paper")
    assert default["audit_id"] == paper["audit_id"]
    for one in (default, paper):
        assert 0 <= one["ranking_average_precision"] <= 1
        assert 0 <= one["ranking_precision_at_n0"] <= 1
    assert paper["ranking_extractions"] >= 7


def test_clustering_and_sampling_print_and_write(tmp_path: Path) -> None:
    one = tmp_path / "clustering.json"
    tiny = ["--sizes", "40", "--give-up", "20", "--steps", "3", "--images-per-training-image", "5"]
    workspace = ["--workspace", str(tmp_path / "workspace")]
    assert run(clustering.main, *tiny, "--json", str(one), *workspace).exit_code == 0
    rows = json.loads(one.read_text())
    assert [r["algorithm"] for r in rows] == ["default", "paper"]
    assert {"n", "algorithm", "seconds", "clusters", "as", "a_esr_07", "timed_out"} <= set(rows[0])
    two = tmp_path / "sampling.json"
    small = ["--images", "5", "--steps", "2", "--rounds", "1", "--json", str(two)]
    assert run(sampling.main, *small).exit_code == 0
    figures = json.loads(two.read_text())
    assert figures["times_faster"] == pytest.approx(
        figures["images_per_second"] / figures["plain_loop_images_per_second"]
    )
    assert sum(figures["parts"].values()) == pytest.approx(1 / figures["images_per_second"])
    assert all(part >= 0 for part in figures["parts"].values())
    assert "times faster" in tables.markdown(two)
    assert "algorithm" in tables.markdown(one)


def test_the_summary_is_over_plain_checkpoints_and_the_gains_are_paired() -> None:
    rows = [
        row("a", "cfg", 0.4),
        row("b", "cfg", 0.8),
        row("a", "model_guidance", 0.5),
        row("b", "model_guidance", 0.9),
    ]
    rows += [row("c", "cfg", 0.0) | {"strength": "weak"}, row("h", "cfg", 0.3, holdout=True)]
    means = {(e["holdout"], e["method"]): e for e in extraction.summary(rows)}
    assert means[False, "cfg"]["as"][0] == pytest.approx(0.6)
    assert means[False, "cfg"]["sets"] == 2
    assert means[True, "cfg"]["as"][0] == pytest.approx(0.3)
    (gain,) = [e for e in extraction.gains(rows) if e["over"] == "cfg"]
    assert gain["as"] == pytest.approx((0.1, 0.1, 0.1))
    assert gain["a_esr_07"][0] == pytest.approx(0.05)


def test_the_interval_is_the_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 200).tolist()
    mean, low, high = interval(values)
    assert mean == pytest.approx(np.mean(values))
    spread = np.std(values) / np.sqrt(200)
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.03)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.03)
    assert interval([0.5]) == (0.5, 0.5, 0.5)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert [recipe.name for recipe in available(SHIPPED)]
    with pytest.raises(FileNotFoundError, match="nothing-lora"):
        available(SHIPPED, ["nothing-lora"])
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        available(tmp_path)


def test_settings_compare_to_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("a", "model_guidance", 0.5) | {"steps": 10}, row("a", "model_guidance", 0.6) | {"steps": 50}]
    settings.compare(rows, ("steps",), {"a": 0.6}, holdout=False)
    lines = capsys.readouterr().out.splitlines()
    assert "-0.100" in lines[0]
    assert "+0.000" in lines[1]
    seen = [one | {"judge": "sscd-int8", "sscd_native_as": 0.4, "sscd_native_a_esr": 0.25} for one in rows]
    settings.compare(seen, ("steps",), {"a": 0.6}, holdout=False)
    lines = capsys.readouterr().out.splitlines()
    assert "-0.100" in lines[0]
    assert lines[1].split() == ["by", "SSCD", "native", "AS", "0.400", "A-ESR", "0.250"]
    assert lines[2].split() == ["by", "SSCD", "288", "AS", "absent", "A-ESR", "absent"]


def test_precision_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import precision

    precision.main(images=1, json_file=tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())
    errors = {(row["strength"], row["weights"]): row["error"] for row in found["weights"]}
    for strength in precision.STRENGTHS:  # the weaker the fine-tune, the more of it rounding takes; bf16 takes more
        assert 0 == errors[strength, "fp32"] < errors[strength, "fp16"] < errors[strength, "bf16"] < 0.2
    assert errors[1.0, "bf16"] < errors[0.03, "bf16"]
    assert [row["decoder"] for row in found["decoder"]] == ["fp16", "bf16"]
    assert all(row["levels_most"] <= 3 for row in found["decoder"])
    assert "| 0.03 |" in capsys.readouterr().out


def test_commits_are_measured_beside_loose_files(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    done = run(workspace_tables.main, "--files", "40", "--json", str(written))
    assert done.exit_code == 0
    figures = json.loads(written.read_text())
    assert figures["files"] == 40
    assert figures["merged"] == 90  # with the fifty commits that were timed
    assert all(value > 0 for value in figures.values())


def test_without_the_testbed_a_benchmark_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "testbed"] + ["benchmarks.grid"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "testbed").is_dir()])
    with pytest.raises(SystemExit, match="testbed/, which is in the repository and not in the wheel"):
        importlib.import_module("benchmarks.grid")


def test_membership_is_told_from_chance_and_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "rows.json"
    arguments = ["--quick", "--only", "stamps-birds-dreambooth", "--json", str(written), "--cache", str(tmp_path / "c")]
    done = run(membership.main, *arguments)
    assert done.exit_code == 0, done.output
    ours = [one for one in json.loads(written.read_text()) if membership._is_ours(one) and one["group"] == "all"]
    assert [one["noises"] for one in ours] == [1, 2]
    assert all(one["auc"] >= 0.95 and one["tpr_at_fpr_1"] >= 0.8 for one in ours)
    assert "0 evaluations measured" in run(membership.main, *arguments).output
    monkeypatch.setattr(membership, "LEAST_AUC", 1.01)
    assert run(membership.main, *arguments).exit_code == 1


def test_figures_of_scores_are_right() -> None:
    members, others = np.array([0.9, 0.5]), np.array([0.1, 0.5, 0.6, 0.2])
    assert membership.auc(members, others) == (4 + 2.5) / 8
    assert membership.tpr(members, others) == 0.5
    assert membership.tpr(members, np.linspace(0, 0.91, 200), most=0.02) == 0.5
