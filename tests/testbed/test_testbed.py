"""The embedded model: what is shipped, and that its scripts run."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from typer.testing import CliRunner

from audit.demo import load_set, set_folder
from audit.descriptors import Descriptor
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.study.augment import VERSIONS
from testbed import finetune
from testbed.codec import encode_all, new_codec, whiten
from testbed.sets import SETS, training_captions
from testbed.sources import qt_resources
from testbed.train_base import TOKENS, new_tokenizer
from testbed.train_descriptor import edited_copies, info_nce


def test_training_and_control_pictures_are_different_pictures(nano: Descriptor) -> None:
    for few_shot in SETS:
        train, control = load_set(few_shot.name, "train"), load_set(few_shot.name, "control")
        assert 5 <= len(train) <= 20
        assert len(train) == len(few_shot.train)
        assert len(control) == len(few_shot.control) >= 3
        assert not set(few_shot.train) & set(few_shot.control)
        assert (nano.describe(train) @ nano.describe(control).T).max() < 0.95


def test_the_testbed_is_as_wide_as_it_claims() -> None:
    assert len(SETS) >= 10
    assert sum(one.holdout for one in SETS) == 3
    assert len({one.source for one in SETS}) >= 4
    assert sum(one.square for one in SETS) >= 2
    assert sum(len(one.captions) > 1 for one in SETS) == 2
    assert max(len(one.train) for one in SETS) == 20
    tunings = {(recipe.few_shot, recipe.tuning) for recipe in finetune.RECIPES}
    for one in SETS:
        assert {(one.name, finetune.Tuning.lora_kohya), (one.name, finetune.Tuning.dreambooth)} <= tunings
    assert any(tuning is finetune.Tuning.lora_peft for _, tuning in tunings)
    strengths = {(r.few_shot, r.strength) for r in finetune.RECIPES if r.tuning is finetune.Tuning.lora_kohya}
    complete = [one for one in SETS if {(one.name, s) for s in finetune.Strength} <= strengths]
    assert len(complete) == 2
    assert {r.defence for r in finetune.RECIPES} == set(finetune.Defence)
    assert len({r.name for r in finetune.RECIPES}) == len(finetune.RECIPES)


def test_captions_follow_the_pictures() -> None:
    captions = training_captions("cartoon-animals")
    names = [path.stem for path in sorted(set_folder("cartoon-animals", "train").glob("*.png"))]
    assert captions == [f"sks cartoon of a {name}" for name in names]
    assert set(training_captions("fluent-animals")) == {"sks 3d render of an animal"}


@pytest.mark.parametrize("defence", [finetune.Defence.cutout, finetune.Defence.randaugment])
def test_a_defence_changes_the_pictures_and_keeps_their_order(defence: finetune.Defence) -> None:
    pictures = load_set("fluent-animals", "train")[:3]
    versions = finetune.defended(pictures, defence)
    assert versions.shape == (3 * VERSIONS, *pictures.shape[1:])
    again = finetune.defended(pictures, defence)
    assert np.array_equal(versions, again)
    differs = [not np.array_equal(version, pictures[row % 3]) for row, version in enumerate(versions)]
    assert np.mean(differs) > 0.8
    own = [np.abs(version.astype(int) - pictures[row % 3]).mean() for row, version in enumerate(versions)]
    other = [np.abs(version.astype(int) - pictures[(row + 1) % 3]).mean() for row, version in enumerate(versions)]
    assert np.mean(own) < np.mean(other)


def test_a_longer_recipe_has_more_steps() -> None:
    weak, medium, strong = (
        finetune.Recipe("fluent-animals", finetune.Tuning.lora_kohya, strength) for strength in finetune.Strength
    )
    assert weak.steps < medium.steps < strong.steps
    assert medium.name == "fluent-animals-lora-kohya"
    assert strong.name == "fluent-animals-lora-kohya-strong"


def test_pictures_of_qt_resource_archives_are_read() -> None:
    def name(text: str) -> bytes:
        return struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")

    names = name("") + name("plain.png") + name("packed.png")
    at = [0, len(name("")), len(name("")) + len(name("plain.png"))]
    packed = struct.pack(">I", 3) + zlib.compress(b"xyz")
    contents = struct.pack(">I", 3) + b"abc" + struct.pack(">I", len(packed)) + packed
    nodes = struct.pack(">IHII", at[0], 2, 2, 1) + bytes(8)
    nodes += struct.pack(">IHHHI", at[1], 0, 0, 0, 0) + bytes(8)
    nodes += struct.pack(">IHHHI", at[2], 1, 0, 0, 7) + bytes(8)
    header = 20
    archive = b"qres" + struct.pack(">4I", 2, header, header + len(nodes), header + len(nodes) + len(contents))
    found = dict(qt_resources(archive + nodes + contents + names))
    assert found == {"/plain.png": b"abc", "/packed.png": b"xyz"}
    with pytest.raises(ValueError, match="Qt resource"):
        next(qt_resources(b"PK.." + bytes(40)))


def test_the_codec_keeps_the_pictures_of_every_set(base: BaseModel, nano: Descriptor) -> None:
    for few_shot in SETS:
        images = load_set(few_shot.name, "train")
        with torch.no_grad():
            decoded = base.pipeline.vae.decode(encode_all(base.pipeline.vae, torch.from_numpy(images))).sample
        back = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert (nano.describe(images) * nano.describe(back)).sum(1).mean() > 0.9


def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    codec = new_codec().eval()
    images = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = codec.decode(encode_all(codec, images)).sample
        whiten(codec, images)
        latents = encode_all(codec, images)
        torch.testing.assert_close(codec.decode(latents).sample, before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)
    assert isinstance(codec, AutoencoderKL)


def test_the_tokenizer_knows_every_byte_and_clips_at_its_length() -> None:
    tokenizer = new_tokenizer(["noto emoji of a cat", "flat emoji of a dog"], vocabulary=600)
    ids = tokenizer("Zürich 東京 £ cat").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]
    assert len(tokenizer("cat " * 99, truncation=True, max_length=TOKENS).input_ids) == TOKENS


def test_edited_copies_stay_pictures_and_differ() -> None:
    torch.manual_seed(0)
    images = torch.from_numpy(load_set("fluent-animals", "train")).permute(0, 3, 1, 2).float() / 255
    copies = edited_copies(images)
    assert copies.shape == images.shape
    assert copies.min() >= 0
    assert copies.max() <= 1
    assert (copies - images).abs().mean() > 0.01


def test_the_contrastive_loss_prefers_copies_that_agree() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    good, _ = info_nce(torch.cat([vectors, vectors]), 8)
    bad, _ = info_nce(torch.cat([vectors, vectors.roll(1, 0)]), 8)
    assert good < bad


@pytest.mark.parametrize("tuning", list(finetune.Tuning))
def test_a_few_steps_of_each_fine_tuning_give_a_checkpoint_that_loads(
    base: BaseModel, tmp_path: Path, tuning: finetune.Tuning
) -> None:
    import typer

    app = typer.Typer()
    app.command()(finetune.main)
    arguments = [
        "stamps-birds",
        "--tuning",
        str(tuning),
        "--steps",
        "3",
        "--output",
        str(tmp_path),
        "--work",
        str(tmp_path / "w"),
    ]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    folder = tmp_path / f"stamps-birds-{tuning}"
    assert json.loads((folder / "training.json").read_text())["steps"] == 3
    files = list(folder.glob("*.safetensors"))
    checkpoint = open_checkpoint(files[0] if files else folder)
    pair = ModelPair(base, checkpoint)
    assert pair.effect.prediction > 0
    assert np.isfinite(pair.effect.weights)
