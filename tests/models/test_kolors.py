"""Kolors: its tokenizer's file, variants, adapters that have the shapes of Stable Diffusion XL's, and an audit."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models import tokenizers
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.families.kolors import is_safe
from audit.models.families.registry import FAMILIES
from audit.models.pair import ModelPair
from audit.models.tuning import families_of, family_warnings
from tests.models import nano
from tests.models.files import audited, configured, lora

FAMILY = FAMILIES["kolors"]
PIECES = "tokenizer/tokenizer.model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kolors")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return nano.make("kolors", folder)


@pytest.fixture
def copy(base: BaseModel, folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "kolors", tmp_path / "m")
    return tmp_path / "m"


def test_without_sentencepiece_the_extra_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        CheckpointError, match=r"read by sentencepiece 0.2.1 or later: pip install 'lora-audit\[kolors\]'"
    ):
        locate_base(str(copy))
    assert [is_safe(release) for release in ("0.1.99", "0.2.0", "0.2.1", "0.2.3", "1.0")] == [False] * 2 + [True] * 3


def test_a_tokenizer_that_does_not_load_is_an_error_and_no_more(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded and used in a child process first."""
    good = (copy / PIECES).read_bytes()
    for bad in (b"", b"\x0a\xff\xff\xff\xff\x7f" * 40, good[:300], good[:-3]):
        (copy / PIECES).write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged"):
            locate_base(str(copy))
    (copy / PIECES).write_bytes(good)
    monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", len(good) - 1)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model is refused: it has {len(good)} bytes"):
        locate_base(str(copy))
    (copy / PIECES).unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer/tokenizer\.model"):
        locate_base(str(copy))


def test_a_configuration_names_no_other_tokenizer(copy: Path) -> None:
    """Of a file that nobody has tried."""
    file = copy / "tokenizer/tokenizer_config.json"
    (copy / "tokenizer/other.bin").write_bytes(b"x" * 100)
    said = {"vocab_file": str(copy / "tokenizer/other.bin"), "padding_side": "right"}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    made = load_base(locate_base(str(copy)))
    assert made.pipeline.tokenizer.vocab_size == 48 + 9
    assert made.pipeline.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"in_channels": 9}, "takes 9 channels, its latents have 4: inpainting"),
        ({"encoder_hid_dim": 32}, "takes text states of the width 32, its text encoder's have 16"),
        ({"encoder_hid_dim_type": None}, "takes text states of the width 16"),
        ({"projection_class_embeddings_input_dim": 80}, "takes 80 numbers of a caption and of sizes, where 64"),
    ],
)
def test_variants_are_refused_in_words(base: BaseModel, values: dict[str, Any], said: str) -> None:
    FAMILY.check(base.pipeline, "Kolors")
    with pytest.raises(CheckpointError, match=said):
        FAMILY.check(configured(base.pipeline, "unet", **values), "Kolors")


def test_a_text_encoder_that_asks_for_a_prefix_without_its_weights_is_refused(copy: Path) -> None:
    """They would be random."""
    file = copy / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_seq_len": 4}))
    with pytest.raises(CheckpointError, match=r"text_encoder holds \d+ numbers of the \d+"):
        load_base(locate_base(str(copy)))


def test_captions_are_padded_on_the_left_to_256_tokens(base: BaseModel) -> None:
    found = FAMILY.encode(base.pipeline, ["a photo of sks dog", "red", ""], torch.device("cpu"))
    assert found.states.shape == (3, 256, 16)
    assert found.pooled is not None
    assert found.pooled.shape == (3, 16)
    assert FAMILY.caption_tokens(base.pipeline) == 256
    assert not FAMILY.is_truncated(base.pipeline, " ".join(["a"] * 250))
    assert FAMILY.is_truncated(base.pipeline, " ".join(["a"] * 257))


def test_what_shows_no_shapes_is_told_by_its_claims_alone(folder: Path, tmp_path: Path) -> None:
    stem = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2": torch.ones(8, 16)}
    save_file(factors, tmp_path / "a.safetensors", {"modelspec.architecture": "kolors/lokr"})
    file = open_checkpoint(tmp_path / "a.safetensors")
    assert families_of(file) == (None, "kolors")
    [said] = family_warnings(file, nano.make("sdxl", folder))
    assert "it claims to be of family kolors, the base is of family sdxl" in said
    assert family_warnings(file, nano.make("kolors", folder)) == []


def attention(path: Path, width: int, **metadata: str) -> Path:
    """An adapter of a UNet's cross attention, which takes text states of ``width``."""
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{stem}.lora_down.weight": torch.ones(1, width), f"{stem}.lora_up.weight": torch.ones(640, 1)}
    save_file(factors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("family", "metadata", "said"),
    [
        ("kolors", {}, "its shapes are those of family sdxl, which kolors has too, and nothing that is claimed says"),
        ("kolors", {"modelspec.architecture": "kolors/lora"}, None),
        ("kolors", {"ss_sd_model_name": "Kolors-diffusers", "ss_base_model_version": "sdxl_base_v1-0"}, None),
        (
            "kolors",
            {"ss_sd_model_name": "sd_xl_base_1.0.safetensors"},
            "which kolors has too, and nothing that is claimed",
        ),
        ("sdxl", {}, None),
        (
            "sdxl",
            {"modelspec.architecture": "kolors/lora"},
            "it claims to be of family kolors, the base is of family sdxl",
        ),
        (
            "sdxl",
            {"ss_sd_model_name": "Kolors-diffusers"},
            "it claims to be of family kolors, the base is of family sdxl",
        ),
        ("alt", {}, "its shapes are those of family sd1, which altdiffusion has too"),
    ],
)
def test_of_the_same_shapes_what_is_claimed_is_said(
    folder: Path, tmp_path: Path, family: str, metadata: dict[str, str], said: str | None
) -> None:
    """The base that is given holds."""
    file = open_checkpoint(attention(tmp_path / "a.safetensors", 768 if family == "alt" else 2048, **metadata))
    warnings = [one for one in family_warnings(file, nano.make(family, folder)) if "shapes" in one]
    assert [said in one for one in warnings if said] == ([True] if said else [])
    assert len(warnings) == bool(said)


def test_what_a_catalog_claims_counts_as_what_metadata_does(folder: Path, tmp_path: Path) -> None:
    """As Civitai's baseModel, of an adapter that says nothing itself."""
    silent = open_checkpoint(attention(tmp_path / "a.safetensors", 2048))
    file = replace(silent, claimed_bases=(("Kolors", "baseModel"),))
    assert family_warnings(file, nano.make("kolors", folder)) == []
    [said] = family_warnings(file, nano.make("sdxl", folder))
    assert "it claims to be of family kolors, the base is of family sdxl" in said


def test_an_adapter_of_chatglm_changes_what_captions_are(base: BaseModel, tmp_path: Path) -> None:
    stem = "lora_te1_encoder_layers_1_self_attention_query_key_value"
    factors = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(32, 2)}
    save_file(factors, tmp_path / "f.safetensors")
    pair = ModelPair(base, open_checkpoint(tmp_path / "f.safetensors"), resolution=64)
    assert pair.tuned.unet is pair.base.unet
    before, after = (pair.encode(["a photo of sks dog"], tuned=tuned) for tuned in (False, True))
    assert not torch.allclose(before.states, after.states, atol=1e-3)


def test_an_audit_of_a_lora_from_a_file_to_a_page(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    """Sampled with model guidance, and its references measured under noise."""
    file = lora(base, tmp_path / "cat.safetensors", "lora_unet_", only="attn")
    row, found = audited(folder / "kolors", file, tmp_path)
    assert row["prediction_change"] > 0
    assert row["warnings"] == []
    assert found["membership"] > 0
