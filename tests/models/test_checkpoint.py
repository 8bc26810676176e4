"""What a checkpoint is told to be, and how it is hashed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from audit.errors import CheckpointError
from audit.models.checkpoint import metadata_json, open_checkpoint
from audit.models.formats.detect import Format
from tests.conftest import DREAMBOOTH, KOHYA, PEFT


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (KOHYA, Format.lora_kohya),
        (PEFT, Format.lora_peft),
        (DREAMBOOTH, Format.diffusers_folder),
        (DREAMBOOTH / "unet/diffusion_pytorch_model.safetensors", Format.unet),
    ],
)
def test_the_shipped_checkpoints_are_told_apart_by_their_tensors(path: Path, kind: Format) -> None:
    assert open_checkpoint(path).format is kind


def test_a_rewritten_header_changes_the_file_hash_but_not_the_tensor_hash(tmp_path: Path) -> None:
    original = open_checkpoint(KOHYA)
    save_file(load_file(KOHYA), tmp_path / "again.safetensors", {"title": "renamed by the platform"})
    again = open_checkpoint(tmp_path / "again.safetensors")
    assert again.sha256 != original.sha256
    assert again.tensors_sha256 == original.tensors_sha256
    assert again.identity == original.identity


def test_the_same_bytes_under_other_names_are_another_checkpoint(tmp_path: Path) -> None:
    for file, names in (("a", ("p", "q")), ("b", ("q", "p"))):
        prefix = "lora_unet_{}.lora_down.weight"
        save_file({prefix.format(names[0]): torch.zeros(2), prefix.format(names[1]): torch.ones(2)}, tmp_path / file)
    first, second = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert first.identity != second.identity


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["encoder.layer.0.weight", "pooler.bias"], "neither an adapter nor"),
        (["lora_unet_x.alpha", "lora_unet_x.weight"], "neither an adapter nor"),
    ],
)
def test_what_cannot_be_audited_is_refused(tmp_path: Path, names: list[str], words: str) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "f.safetensors")


def test_a_folder_with_only_pickled_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    torch.save({}, tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none of unet/"):
        open_checkpoint(tmp_path)


def test_metadata_is_bounded_when_it_is_stored(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "f", {f"k{i}": "x" * 50_000 for i in range(100)})
    assert len(metadata_json(open_checkpoint(tmp_path / "f").metadata)) < 150_000
