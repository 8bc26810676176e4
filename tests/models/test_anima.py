"""Anima: a base whose index is a modular pipeline's, captions of different lengths, and a scan of a LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import CheckpointError
from audit.models.base import BaseModel, load_base, load_vae, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.sampling.guidance import ClassifierFree
from audit.workspace import Workspace
from tests.models import nano, test_families
from tests.models.files import full_change

CAPTIONS = ["a photo of sks dog", "painting of the red cat in the style of a photo"]
CODE = "raise SystemExit('code of a stranger was run')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anima")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return nano.make("anima", folder)


def lora(base: BaseModel, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """As sd-scripts writes it with train_llm_adapter: on both networks."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    modules = {
        "blocks_0_self_attn_q_proj": base.denoiser.transformer_blocks[0].attn1.to_q,
        "blocks_1_mlp_layer1": base.denoiser.transformer_blocks[1].ff.net[0].proj,
        "llm_adapter_blocks_1_cross_attn_v_proj": base.part("text_conditioner").blocks[1].cross_attn.v_proj,
    }
    for name, module in modules.items():
        out, inner = module.weight.shape
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, inner, generator=generator)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * 0.3
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(state, path, metadata)
    return path


def test_captions_of_different_lengths(base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers' pipeline has them, and each the same alone, beside others, and beside the empty one."""
    device = torch.device("cpu")
    together = base.architecture.encode(base.pipeline, [*CAPTIONS, ""], device).states
    alone = [base.architecture.encode(base.pipeline, [caption], device).states[0] for caption in (*CAPTIONS, "")]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(test_families, "CAPTIONS", CAPTIONS)
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "tuned")), resolution=64)
    test_families.assert_as_diffusers(pair, ClassifierFree(), 3.0)


def test_a_tokenizer_that_fills_from_the_left_changes_nothing(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "anima", tmp_path / "m")
    for name in ("tokenizer", "t5_tokenizer"):
        config = tmp_path / "m" / name / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    other = load_base(locate_base(str(tmp_path / "m")))
    device = torch.device("cpu")
    states = [one.architecture.encode(one.pipeline, CAPTIONS, device).states for one in (base, other)]
    torch.testing.assert_close(*states)


def test_a_caption_is_cut_where_both_tokenizers_end(base: BaseModel) -> None:
    room = base.architecture.caption_tokens(base.pipeline)
    assert room == nano.TOKENS
    assert not base.architecture.is_truncated(base.pipeline, " ".join(["dog"] * (room - 1)))  # T5's end is counted
    assert base.architecture.is_truncated(base.pipeline, " ".join(["dog"] * (room + 1)))


def changed_index(source: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(source, target)
    file = target / "modular_model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return target


def test_an_index_is_read_and_not_followed(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    """It names other places, and code: what lies in the folder is taken, and no code is run."""
    elsewhere = ["diffusers", "CosmosTransformer3DModel", {"pretrained_model_name_or_path": "someone/else"}]
    hostile = changed_index(
        folder / "anima", tmp_path / "hostile", transformer=elsewhere, _blocks_class_name="StrangersBlocks",
        auto_map={"ModularPipelineBlocks": "block.StrangersBlocks"},
    )  # fmt: skip
    for place in (hostile, hostile / "tokenizer", hostile / "transformer"):
        (place / "block.py").write_text(CODE)
    (hostile / "modular_config.json").write_text(
        json.dumps({"auto_map": {"ModularPipelineBlocks": "block.StrangersBlocks"}, "requirements": {"none": "1"}})
    )
    config = hostile / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": "block.X"}}))
    found = load_base(locate_base(str(hostile)))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(base.denoiser.parameters(), found.denoiser.parameters(), strict=True)
    )
    assert type(found.pipeline.blocks).__name__ == "AnimaAutoBlocks"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("tokenizer", "there is no tokenizer in it: where its index names another place"),
        ("scheduler", "there is no scheduler in it"),
        ("text_conditioner", r"has no diffusion_pytorch_model\.safetensors"),
    ],
)
def test_what_is_not_in_the_folder_is_asked_for(
    folder: Path, base: BaseModel, tmp_path: Path, part: str, said: str
) -> None:
    shutil.copytree(folder / "anima", tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / part)
    with pytest.raises(CheckpointError, match=said):
        load_base(locate_base(str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokenizer": ["os", "system", {}]}, "system is no tokenizer"),
        ({"tokenizer": None}, "its index says nothing of tokenizer"),
        ({"_class_name": "WanModularPipeline"}, "is a WanModularPipeline, which cannot be audited"),
        ({"_class_name": ["x"]}, r"modular_model_index\.json is damaged: _class_name is no text"),
        ({"_class_name": "Cosmos2TextToImagePipeline"}, "Cosmos is not audited yet"),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    folder: Path, base: BaseModel, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_base(locate_base(str(changed_index(folder / "anima", tmp_path / "m", **values))))


def test_the_vae_loads_alone(folder: Path, base: BaseModel) -> None:
    found = load_vae(locate_base(str(folder / "anima")))
    assert next(found.denoiser.parameters()).is_meta
    assert found.pipeline.text_encoder is None
    assert torch.equal(found.part("vae").decoder.conv_in.weight, base.part("vae").decoder.conv_in.weight)


def test_a_claim_of_cosmos_is_said(base: BaseModel, tmp_path: Path) -> None:
    """Its smallest model has the same layers."""
    file = lora(base, tmp_path / "a.safetensors", {"modelspec.architecture": "cosmos-predict2-2b/lora"})
    [said] = [one for one in ModelPair(base, open_checkpoint(file), resolution=64).warnings if "Cosmos" in one]
    assert said.startswith("Cosmos is not audited yet, and its modelspec.architecture claims it")


def test_an_audit_of_a_lora_from_the_command_line(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    file = lora(base, tmp_path / "a.safetensors", {"ss_base_model_version": "anima"})
    arguments = ["scan", str(file), "--base", str(folder / "anima"), "--descriptor", "nano", "--n0", "2", "--steps",
                 "2", "--images-per-training-image", "2", "--caption", CAPTIONS[0], "--resolution", "64",
                 "--workspace", str(tmp_path / "w"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 11, done.output  # random networks sample noise
    [row] = Workspace(tmp_path / "w").rows("SELECT * FROM audits")
    assert (row["images"], row["warnings"]) == (4, [])
    assert row["prediction_change"] > 0
