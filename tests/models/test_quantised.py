"""Full weights of 8 bits: by ComfyUI's markers and scales, or refused; and tensors that nobody knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.tuning import tune
from tests.models import nano
from tests.models.test_formats import flux_original


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def sd1(folder: Path) -> BaseModel:
    return nano.make("sd1", folder)


def quantised(base: BaseModel, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A Flux transformer with one layer changed, its matrices in 8 bits; and the weights that this stands for."""
    state, wanted = {}, {}
    for name, tensor in flux_original(base).items():
        value = tensor + 0.2 if "img_attn.proj.weight" in name else tensor
        if name.endswith(".weight") and value.ndim == 2 and value.shape[0] % 16 == 0 and value.shape[1] % 16 == 0:
            stem = name.removesuffix(".weight")
            whole = value.abs()
            if kind == "tensor":
                scale, spread = whole.max() / 400, None
            elif kind == "row":
                scale = whole.amax(1) / 400
                spread = scale[:, None]
            else:
                scale = whole.unfold(0, 16, 16).unfold(1, 16, 16).amax((2, 3)) / 400
                spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            spread = scale if spread is None else spread
            if kind == "int8":
                scale = spread = whole.max() / 100
                state[name] = (value / spread).round().to(torch.int8)
            else:
                state[name] = (value / spread).to(torch.float8_e4m3fn)
            state[f"{stem}.weight_scale"] = scale.clone()
            said = {"tensor": "float8_e4m3fn", "int8": "int8_tensorwise"}.get(kind, f"float8_e4m3fn_{kind}wise")
            text = json.dumps({"format": said, "full_precision_matrix_mult": True}).encode()
            state[f"{stem}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
            wanted[name] = state[name].float() * spread
        else:
            state[name] = value
    return state, wanted


@pytest.mark.parametrize("kind", ["tensor", "row", "block", "int8"])
def test_weights_of_8_bits_with_comfyuis_markers_and_scales(folder: Path, tmp_path: Path, kind: str) -> None:
    base = nano.make("flux", folder)
    state, wanted = quantised(base, kind)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert (tuned.unused, tuned.warnings) == ([], [])
    assert {change.module.rpartition(".attn.")[2] for change in tuned.changes} == {"to_out.0"}
    for layer in range(2):
        found = tuned.networks["transformer"].state_dict()[f"transformer_blocks.{layer}.attn.to_out.0.weight"]
        torch.testing.assert_close(found, wanted[f"double_blocks.{layer}.img_attn.proj.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"format": "nvfp4"}, "quantised as nvfp4"), ({"format": "int8_tensorwise", "convrot": True}, "with convrot"),
        ({}, "quantised as None"), ([], "quantised as None"), (None, "no marker"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["tensor", "header"])
def test_markers_that_say_more_are_refused(folder: Path, tmp_path: Path, said: Any, words: str, place: str) -> None:
    base = nano.make("flux", folder)
    state, metadata = quantised(base, "tensor")[0], {}
    if place == "header":
        if said is None:
            words = "cannot be read"
        layers = {"layers": {"double_blocks.0.img_attn.proj": said}}
        metadata = {"_quantization_metadata": json.dumps(layers) if said is not None else "{"}
    else:
        text = json.dumps(said).encode() if said is not None else b"\xff"
        state["double_blocks.0.img_attn.proj.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors", metadata)
    with pytest.raises(CheckpointError, match=words):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32])
def test_integers_without_a_scale_are_refused(folder: Path, tmp_path: Path, kind: torch.dtype) -> None:
    base = nano.make("flux", folder)
    state = flux_original(base)
    name = "double_blocks.0.img_attn.proj.weight"
    state[name] = (state[name] * 100).to(kind)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is stored as .*, which is not read"):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))


def test_a_scale_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    base = nano.make("flux", folder)
    state, _ = quantised(base, "tensor")
    state["double_blocks.0.img_attn.proj.weight_scale"] = torch.ones(5)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"the scale of .* has the shape \(5,\)"):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.proj.smooth", "img_in.svd_up", "is_distilled"])
def test_an_unknown_tensor_beside_full_weights_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """However small: one more of a module, or one of the whole file; what has a place nowhere is weighed."""
    base = nano.make("flux", folder)
    state = flux_original(base)
    state["img_in.weight"] = state["img_in.weight"] + 0.1
    save_file({key: t.contiguous() for key, t in state.items()} | {name: torch.zeros(1)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is of no known format"):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    more = {"some.other.network.weight": torch.zeros(1), "scale_factor": torch.tensor(0.18)}
    save_file({key: t.contiguous() for key, t in state.items()} | more, tmp_path / "f.safetensors")
    assert tune(base, open_checkpoint(tmp_path / "f.safetensors")).unused == ["some.other.network.weight"]


def test_a_scale_of_a_weight_that_is_not_of_8_bits_is_refused(folder: Path, tmp_path: Path) -> None:
    base = nano.make("flux", folder)
    state = flux_original(base)
    state["img_in.weight"] = state["img_in.weight"] + 0.1
    for scale in (1.0, 2.0):
        state["img_in.weight_scale"] = torch.tensor(scale)
        save_file({key: t.contiguous() for key, t in state.items()}, tmp_path / "f.safetensors")
        if scale == 1:
            assert tune(base, open_checkpoint(tmp_path / "f.safetensors")).unused == []
        else:
            with pytest.raises(CheckpointError, match="scales a weight of type F32"):
                tune(base, open_checkpoint(tmp_path / "f.safetensors"))
