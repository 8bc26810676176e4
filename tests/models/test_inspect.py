"""`lora-audit inspect`: what it says of files of known content."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.models.inspect import block_of, inspect
from tests.conftest import BASE, DREAMBOOTH, KOHYA, PEFT
from tests.models import nano
from tests.models.test_formats import LYCORIS, lycoris_network
from tests.models.test_pair import kohya_deltas


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == code, result.output
    return result.output


def test_it_ends_with_the_command_that_audits_the_file(tmp_path: Path) -> None:
    command = run(KOHYA).splitlines()[-1]
    assert command == f"    lora-audit scan {KOHYA} --base nano --descriptor nano --references FOLDER"
    assert json.loads(run(KOHYA, "--json"))["scan"] == command.strip()
    assert f"--base {BASE} --references" in run(KOHYA, "--base", BASE).splitlines()[-1]
    name = tmp_path / "two words.safetensors"
    save_file({"clip_l": torch.ones(3, 768), "clip_g": torch.ones(3, 1280)}, name)
    assert run(name).splitlines()[-1].startswith(f"    lora-audit scan '{name}' --base ")
    claims = {"ss_base_model_version": "sdxl_base_v1-0"}
    save_file(load_file(KOHYA), tmp_path / "xl.safetensors", metadata=claims)
    assert "--base sdxl " in run(tmp_path / "xl.safetensors").splitlines()[-1]
    save_file(load_file(KOHYA), tmp_path / "flux.safetensors", metadata={"ss_base_model_version": "flux1"})
    assert "--base OWNER/NAME@COMMIT " in run(tmp_path / "flux.safetensors").splitlines()[-1]
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" + bytes(50))
    assert "lora-audit scan" not in run(tmp_path / "model.ckpt", code=2)


def test_a_kohya_lora(base: Any) -> None:
    found = inspect(KOHYA)
    assert (found.format, found.algorithms, found.ranks, found.alphas) == (
        "lora-kohya", {"lora": 106}, {24: 106}, {24.0: 106},
    )  # fmt: skip
    assert found.parts == {"denoiser": 106}
    assert found.claimed_family == "sd1"
    assert found.claims["ss_network_dim"] == "24"
    assert found.unmeasured == 0
    deltas = kohya_deltas(KOHYA, base)
    for block in found.blocks:
        wanted = sum(float(d.square().sum()) for name, d in deltas.items() if block_of(name) == block.name) ** 0.5
        assert block.norm == pytest.approx(wanted, rel=1e-4)
    assert sum(block.modules for block in found.blocks) == 106


def test_with_a_base_the_norms_are_the_same_and_relative_ones_are_there(base: Any) -> None:
    alone, applied = inspect(PEFT), inspect(PEFT, base)
    assert applied.problem is None
    assert applied.unused == []
    by_name = {block.name: block for block in applied.blocks}
    for block in alone.blocks:
        assert by_name[block.name].norm == pytest.approx(block.norm, rel=1e-3)
        assert by_name[block.name].base_norm > 0


@pytest.mark.parametrize("name", ["loha", "lokr", "locon-cp", "dora", "oft", "norm"])
def test_lycoris_files(tmp_path: Path, name: str) -> None:
    base = nano.make("sd1", tmp_path)
    network = lycoris_network(copy.deepcopy(base.denoiser), dict(LYCORIS[name]))
    state = {k.replace("lycoris_", "lora_unet_", 1): t.detach().contiguous() for k, t in network.state_dict().items()}
    save_file(state, tmp_path / "f.safetensors")
    alone, applied = inspect(tmp_path / "f.safetensors"), inspect(tmp_path / "f.safetensors", base)
    assert alone.decomposed == (name == "dora")
    depends = name in ("dora", "oft", "locon-cp")  # on the base's weights, or on more than two factors
    assert (alone.unmeasured > 0) == depends
    if not depends:
        total, with_base = (sum(block.norm**2 for block in found.blocks) for found in (alone, applied))
        assert total == pytest.approx(with_base, rel=1e-3)
    assert applied.unmeasured == 0
    assert sum(block.norm for block in applied.blocks) > 0


def test_a_folder_and_its_table() -> None:
    text = run(DREAMBOOTH, "--base", BASE)
    assert "diffusers-folder" in text
    assert "every tensor has its place" in text
    assert "█" in text
    assert "mid_block" in text


def test_json_is_complete_and_has_the_identity_of_the_audit() -> None:
    from audit.models.checkpoint import open_checkpoint

    found = json.loads(run(KOHYA, "--json"))
    assert found["identity"] == open_checkpoint(KOHYA).identity
    assert found["problem"] is None
    assert len(found["blocks"]) == 7


def test_what_cannot_be_audited_and_why(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert "zip archive" in run(tmp_path / "model.ckpt", code=2)
    moved = {name.replace("down_blocks_1", "down_blocks_7"): tensor for name, tensor in load_file(KOHYA).items()}
    save_file(moved, tmp_path / "moved.safetensors")
    assert "no place in base" in run(tmp_path / "moved.safetensors", "--base", BASE, code=2)
    assert json.loads(run(tmp_path / "model.ckpt", "--json", code=2))["problem"]


def test_a_contradiction_of_families_is_said(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 2048), f"{stem}.lora_up.weight": torch.ones(640, 4)}
    save_file(tensors, tmp_path / "f.safetensors", {"ss_base_model_version": "sd_v1"})
    text = run(tmp_path / "f.safetensors")
    assert "sdxl, claimed sd1" in text
    assert "its shapes are those of family sdxl, its metadata claims sd1" in text


def test_markup_of_strangers_is_not_interpreted(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(1, 1), "lora_unet_x.lora_up.weight": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "f.safetensors", {"modelspec.title": "[bold red]x[/bold red]"})
    assert "[bold red]x[/bold red]" in run(tmp_path / "f.safetensors")


def test_embeddings_and_adapters_are_listed(tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(3, 768), "clip_g": torch.ones(3, 1280)}, tmp_path / "token.safetensors")
    assert "token (te1 (3), te2 (3))" in run(tmp_path / "token.safetensors")
    names = {f"a.to_q.lora_{side}.{name}.weight": torch.ones(2, 2) for side in "AB" for name in ("one", "two")}
    save_file(names, tmp_path / "two.safetensors")
    assert "one, two" in run(tmp_path / "two.safetensors")


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("down_blocks_1_attentions_0_proj_in", "down_blocks.1"), ("mid_block.resnets.0.conv1", "mid_block"),
        ("double_blocks_12_img_attn_qkv", "double_blocks.12"), ("conv_in", "other"),
        ("single_transformer_blocks.3.proj_out", "single_transformer_blocks.3"),
        ("blocks_39_self_attn_q", "blocks.39"), ("blocks.0.ffn.net.2", "blocks.0"),
        ("text_model_encoder_layers_4_mlp_fc1", "encoder.layers.4"), ("encoder.layers.4.mlp.fc1", "encoder.layers.4"),
    ],
)  # fmt: skip
def test_blocks(module: str, block: str) -> None:
    assert block_of(module) == block
