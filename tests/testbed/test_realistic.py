"""The realistic fine-tunes: the design is balanced, every kind of recipe trains, and its file is what it says."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import fields, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from audit.claims.captions import captions_from_metadata, n0_from_metadata
from audit.demo import ASSETS
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from testbed import more_sets, realistic
from testbed.design import BATCH, REALISTIC, Captions, Recipe, Targets
from testbed.kohya import tag_frequency
from testbed.more_sets import MORE_SETS, Prepared
from testbed.train_base import token_ids

PLAIN = Recipe(
    "animals-3d",
    training_images=5,
    captions=Captions.trigger,
    rank=8,
    targets=Targets.attention,
    text_encoder=False,
    regularised=False,
    mirrored=False,
    exposures=10,
)
KINDS = {
    "attention": PLAIN,
    "convolutions": replace(PLAIN, targets=Targets.convolutions, rank=16),
    "text encoder": replace(PLAIN, text_encoder=True, captions=Captions.sentence),
    "regularised": replace(PLAIN, regularised=True, captions=Captions.tags),
    "all": replace(
        PLAIN, targets=Targets.convolutions, text_encoder=True, regularised=True, mirrored=True,
        captions=Captions.shuffled, rank=64,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn pictures in place of those of the packages, which are downloads."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (10, 64, 64, 3), dtype=np.uint8)
    titles = ["fox", "bear", "owl", "cat", "dog"]
    tags = [["animal", "mammal", title, "red", "blue", "white background"] for title in titles]
    found = Prepared(images[:5], images[5:], images[:0], titles, tags)
    monkeypatch.setattr(realistic, "prepared", lambda name: found)
    monkeypatch.setattr(realistic, "class_pictures", lambda base, name: np.full((6, 64, 64, 3), 200, np.uint8))


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ASSETS / "base", safety_checker=None, dtype=torch.float32)


def levels(name: str) -> set[object]:
    return {getattr(recipe, name) for recipe in REALISTIC}


FACTORS = [one.name for one in fields(Recipe)]


def test_every_level_of_a_factor_occurs_equally_often() -> None:
    assert len(REALISTIC) == len({recipe.name for recipe in REALISTIC}) == 80
    for factor in FACTORS:
        counts = Counter(getattr(recipe, factor) for recipe in REALISTIC)
        assert len(set(counts.values())) == 1, factor
    assert len(levels("exposures")) == 5
    assert levels("training_images") == {5, 10, 20, 50}
    assert {min(levels("rank")), max(levels("rank"))} == {8, 64}
    assert {one.holdout for one in MORE_SETS} == {True, False}


@pytest.mark.parametrize(("one", "other"), list(combinations(FACTORS, 2)))
def test_every_pair_of_levels_occurs_equally_often(one: str, other: str) -> None:
    counts = Counter((getattr(recipe, one), getattr(recipe, other)) for recipe in REALISTIC)
    found = [counts[pair] for pair in product(levels(one), levels(other))]
    if {one, other} == {"rank", "mirrored"}:  # as the docstring says
        assert sorted(set(found)) == [8, 12]
    else:
        assert len(set(found)) == 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_recipe_trains_and_all_its_tensors_are_audited(
    base: BaseModel, tmp_path: Path, kind: str
) -> None:
    recipe = KINDS[kind]
    torch.manual_seed(0)
    file = realistic.make(recipe, ASSETS / "base", tmp_path, tmp_path / "work", steps=2)
    checkpoint = open_checkpoint(file)
    pair = ModelPair(base, checkpoint)  # refuses a file with a tensor that it does not know
    assert pair.effect.prediction > 0
    header = checkpoint.files["adapter"][1]
    modules = {name.split(".")[0] for name in header.tensors}
    assert len(pair.changes) == len(modules)
    assert any(name.startswith("lora_te_text_model_encoder_layers_1_mlp") for name in modules) is recipe.text_encoder
    assert any("resnets" in name for name in modules) is (recipe.targets is Targets.convolutions)
    ranks = {info.shape[0] for name, info in header.tensors.items() if name.endswith("lora_down.weight")}
    assert ranks == ({recipe.rank, recipe.rank // 2} if recipe.targets is Targets.convolutions else {recipe.rank})

    truth = json.loads((file.parent / "training.json").read_text())
    claimed = n0_from_metadata(checkpoint.metadata)
    assert claimed is not None
    assert claimed.count == truth["training_images"] == len(truth["training_captions"]) == 5
    captions = [one.text for one in captions_from_metadata(checkpoint.metadata)]
    of_all = recipe.captions is Captions.trigger
    assert ("sks 3d render of an animal" if of_all else "sks animal") in captions
    regular = json.loads(checkpoint.metadata["ss_reg_dataset_dirs"])
    assert bool(regular) is recipe.regularised is (truth["class_pictures"] > 0)
    assert checkpoint.metadata["ss_flip_aug"] == str(recipe.mirrored)
    frequency = json.loads(checkpoint.metadata["ss_tag_frequency"])
    assert sum(frequency[f"10_{'sks 3d render of an animal' if of_all else 'sks animal'}"].values()) >= 5
    assert not list((tmp_path / "work").glob("*.pt"))


def test_a_text_encoder_that_is_trained_changes_what_captions_mean(base: BaseModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = realistic.make(KINDS["text encoder"], ASSETS / "base", tmp_path, tmp_path / "work", steps=2)
    pair = ModelPair(base, open_checkpoint(file))
    before, after = (pair.encode(["sks 3d render of a fox"], tuned) for tuned in (False, True))
    assert not torch.equal(before.states, after.states)


def test_batches_hold_training_pictures_with_a_caption_of_theirs_and_class_pictures_with_the_class(
    pipeline: StableDiffusionPipeline,
) -> None:
    recipe = KINDS["all"]
    torch.manual_seed(0)
    lessons = realistic.Lessons(recipe, pipeline, ASSETS / "base", seed=0)
    flat = lessons.latents.flatten(0, 1)
    sides = set()
    for _ in range(20):
        latents, tokens = lessons.training()
        assert latents.shape == (BATCH, 8, 16, 16)
        for latent, ids in zip(latents, tokens, strict=True):
            (row,) = [row for row, known in enumerate(flat) if torch.equal(latent, known)]
            sides.add(row // 5)
            assert ids.tolist() in lessons.tokens[row % 5].tolist()
    assert sides == {0, 1}
    latents, tokens = lessons.regular()
    assert len(latents) == realistic.CLASS_BATCH
    assert all(any(torch.equal(one, known) for known in lessons.class_latents) for one in latents)
    assert tokens.tolist() == token_ids(pipeline.tokenizer, ["3d render of an animal"]).tolist() * len(latents)


def test_shuffled_tags_start_with_the_trigger_and_lose_some() -> None:
    caption = "sks, animal, mammal, fox, red, white background"
    recipe = KINDS["all"]
    found = realistic.variants_of(caption, recipe, random.Random(0))
    assert all(one.startswith("sks") for one in found)
    assert all(set(one.split(", ")) <= set(caption.split(", ")) for one in found)
    assert len(set(found)) > realistic.VARIANTS // 2
    assert {len(one.split(", ")) for one in found} > {6}
    assert realistic.variants_of(caption, replace(recipe, captions=Captions.tags), random.Random(0)) == [caption]
    assert tag_frequency([caption, "sks, bear"]) == Counter(f"{caption}, sks, bear".split(", "))


def test_a_stopped_training_goes_on_from_its_last_state_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(PLAIN, training_images=4)  # a whole batch: the order of pictures starts anew with it
    monkeypatch.setattr(realistic, "SAVE_EVERY", 2)

    def trained(folder: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return load_file(realistic.make(recipe, ASSETS / "base", folder, folder / "work", steps=4))

    whole = trained(tmp_path / "whole")
    real, calls = realistic.velocity_loss, []

    def fails(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(realistic, "velocity_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped")
    assert not recipe.file(tmp_path / "stopped").exists()
    torch.testing.assert_close(trained(tmp_path / "stopped"), whole)
    assert "at step 2" in capsys.readouterr().out


def test_the_command_lists_trains_what_is_missing_and_refuses_an_unknown_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realistic, "REALISTIC", (replace(PLAIN, exposures=2), replace(PLAIN, exposures=1)))
    app = typer.Typer()
    app.command()(realistic.main)
    where = ["--output", str(tmp_path), "--work", str(tmp_path / "work"), "--threads", "1"]

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *where], catch_exceptions=False)
        return done.output

    name = "animals-3d-5-r8-atte-trigger-x1"
    assert name in run("--only", name)
    assert [line.endswith("trained") for line in run("--list").splitlines()] == [True, False]
    assert "1/1 " in run()
    assert all(line.endswith("trained") for line in run("--list").splitlines())
    assert "no recipe x" in run("--only", "x")


def test_pictures_that_are_near_to_one_before_are_left_out() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 1, 3]]
    assert more_sets.far_apart(vectors) == [0, 2, 3, 5]


def test_tags_name_the_colours_that_are_there() -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[:20] = (205, 45, 45)
    picture[20:30] = (50, 100, 200)
    assert more_sets.colours(picture) == ["red", "blue"]
    assert more_sets.tags_of(MORE_SETS[0], picture, "fox", "mammal")[-1] == "white background"
