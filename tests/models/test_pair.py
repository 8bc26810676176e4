"""What a checkpoint puts into effect, and the refusal of one that changes nothing or does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from audit.demo import FLOW_CHECKPOINTS
from audit.errors import CheckpointError, NoEffectError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import Checkpoint, open_checkpoint
from audit.models.pair import ModelPair
from audit.models.tuning import tune
from tests.conftest import BASE, DREAMBOOTH, KOHYA, PEFT
from tests.models.ldm import unet_to_ldm

FLOW_LORA = FLOW_CHECKPOINTS / "fluent-vehicles-lora-kohya/fluent-vehicles.safetensors"


def tuned_networks(base: BaseModel, checkpoint: Checkpoint, strength: float = 1.0) -> tuple[Any, Any]:
    """UNet and text encoder; the base's own where the checkpoint leaves them alone."""
    networks = tune(base, checkpoint, strength).networks
    return networks.get("unet", base.denoiser), networks.get("text_encoder", base.part("text_encoder"))


def kohya_deltas(path: Path, base: BaseModel) -> dict[str, torch.Tensor]:
    """up @ down * alpha / rank in float64, by module name: the definition, without any library."""
    state = load_file(path)
    modules = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in base.denoiser.named_modules()}
    deltas = {}
    for key in (name for name in state if name.endswith(".lora_down.weight")):
        stem = key.removesuffix(".lora_down.weight")
        down, up = state[key].double(), state[f"{stem}.lora_up.weight"].double()
        scale = state[f"{stem}.alpha"].double() / len(down)
        deltas[modules[stem]] = (up.flatten(1) @ down.flatten(1) * scale).reshape(
            base.denoiser.get_submodule(modules[stem]).weight.shape
        )
    return deltas


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_kohya_lora_adds_up_times_down_times_alpha_over_rank(base: BaseModel, scale: float) -> None:
    unet, text = tuned_networks(base, open_checkpoint(KOHYA), scale)
    deltas = kohya_deltas(KOHYA, base)
    assert len(deltas) > 40
    for name, module in base.denoiser.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        change = unet.get_submodule(name).weight.double() - module.weight.double()
        torch.testing.assert_close(change, deltas.get(name, torch.zeros_like(change)) * scale, atol=1e-5, rtol=0)
    assert text is base.part("text_encoder")


def test_alpha_scales_the_delta(base: BaseModel, tmp_path: Path) -> None:
    state = load_file(KOHYA)
    halved = {name: tensor / 2 if name.endswith(".alpha") else tensor for name, tensor in state.items()}
    save_file(halved, tmp_path / "halved.safetensors")
    half, _ = tuned_networks(base, open_checkpoint(tmp_path / "halved.safetensors"))
    same, _ = tuned_networks(base, open_checkpoint(KOHYA), 0.5)
    for (name, a), b in zip(half.state_dict().items(), same.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


def test_a_peft_lora_predicts_as_diffusers_own_pipeline_with_it(base: BaseModel) -> None:
    unet, _ = tuned_networks(base, open_checkpoint(PEFT))
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, dtype=torch.float32)
    pipeline.load_lora_weights(PEFT.parent, weight_name=PEFT.name, use_safetensors=True)
    x, states = torch.randn(2, *[8, 16, 16]), torch.randn(2, 32, 128)
    with torch.inference_mode():
        ours = unet(x, torch.tensor(400), states).sample
        theirs = pipeline.unet(x, torch.tensor(400), states).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_text_encoder_lora_reaches_the_text_encoder(base: BaseModel, tmp_path: Path) -> None:
    import copy

    encoder = copy.deepcopy(base.part("text_encoder"))
    encoder.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, text_encoder_lora_layers=get_peft_model_state_dict(encoder), safe_serialization=True
    )
    unet, text = tuned_networks(base, open_checkpoint(tmp_path / "pytorch_lora_weights.safetensors"))
    tokens = torch.arange(32)[None]
    with torch.inference_mode():
        torch.testing.assert_close(text(tokens)[0], encoder(tokens)[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(text(tokens)[0], base.part("text_encoder")(tokens)[0], atol=1e-3)
    assert unet is base.denoiser


def test_dreambooth_is_the_same_from_a_folder_a_unet_file_and_an_original_layout_file(
    base: BaseModel, tmp_path: Path
) -> None:
    file = DREAMBOOTH / "unet/diffusion_pytorch_model.safetensors"
    save_file(
        {n: t.contiguous() for n, t in unet_to_ldm(base.denoiser, load_file(file)).items()},
        tmp_path / "ldm.safetensors",
    )
    folder, _ = tuned_networks(base, open_checkpoint(DREAMBOOTH))
    for path in (file, tmp_path / "ldm.safetensors"):
        unet, _ = tuned_networks(base, open_checkpoint(path))
        assert all(
            torch.equal(a, b) for a, b in zip(unet.state_dict().values(), folder.state_dict().values(), strict=True)
        )


def test_the_change_is_measured(kohya_pair: ModelPair) -> None:
    assert 0.001 < kohya_pair.effect.weights < 10
    assert kohya_pair.effect.prediction > 0.01


@torch.no_grad()
def test_a_flows_change_is_that_of_the_v_its_velocity_stands_for() -> None:
    """By x_0 and eps, at t = s / (1 + s) for s = sigma / alpha of Stable Diffusion at 500, on noise as large as x_t."""
    pair = ModelPair(load_base(locate_base("nano-flow")), open_checkpoint(FLOW_LORA))
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    ratio = float(((1 - alphas[500]) / alphas[500]).sqrt())
    t = ratio / (1 + ratio)
    size = ((1 - t) ** 2 + t**2) ** 0.5
    x = size * torch.randn(2, *pair.latent_shape, generator=torch.Generator().manual_seed(0))
    found = []
    for predict, tuned in ((pair.predict_base, False), (pair.predict_tuned, True)):
        velocity = predict(x, torch.tensor(1000 * t), pair.encode(["", ""], tuned))
        noise, picture = x + (1 - t) * velocity, x - t * velocity
        found.append(((1 - t) * noise - t * picture) / size)
    assert pair.effect.prediction == pytest.approx(float((found[1] - found[0]).norm() / found[0].norm()), rel=1e-3)


def test_an_adapter_of_zeros_is_refused(base: BaseModel, tmp_path: Path) -> None:
    state = {n: t if n.endswith(".alpha") else torch.zeros_like(t) for n, t in load_file(KOHYA).items()}
    save_file(state, tmp_path / "zero.safetensors")
    with pytest.raises(NoEffectError, match="nothing to extract"):
        ModelPair(base, open_checkpoint(tmp_path / "zero.safetensors"))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_itself_in_any_precision_is_refused(base: BaseModel, tmp_path: Path, kind: torch.dtype) -> None:
    save_file(
        {n: t.to(kind).contiguous() for n, t in base.denoiser.state_dict().items()}, tmp_path / "unet.safetensors"
    )
    with pytest.raises(NoEffectError, match="same weights"):
        ModelPair(base, open_checkpoint(tmp_path / "unet.safetensors"))


def test_layers_without_a_place_in_the_base_are_refused(base: BaseModel, tmp_path: Path) -> None:
    """A share of the weight over 1 % fails the audit; a smaller one is named in its warnings."""
    state = load_file(KOHYA)
    moved = {name.replace("down_blocks_1", "down_blocks_7"): tensor for name, tensor in state.items()}
    save_file(moved, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="no place in base"):
        ModelPair(base, open_checkpoint(tmp_path / "f.safetensors"))
    small = {
        name.replace("down_blocks_1", "down_blocks_7"): tensor * (0.1 if name.endswith("lora_up.weight") else 1)
        for name, tensor in state.items()
        if "down_blocks_1_attentions_0_proj_in" in name
    }
    save_file(state | small, tmp_path / "g.safetensors")
    pair = ModelPair(base, open_checkpoint(tmp_path / "g.safetensors"))
    assert len(pair.warnings) == 1
    assert "3 tensors of the file have no effect: lora_unet_down_blocks_7" in pair.warnings[0]


def test_shapes_of_another_family_are_refused(base: BaseModel, tmp_path: Path) -> None:
    state = {
        n: torch.cat([t, t], dim=-1) if t.ndim > 1 and "lora_down" in n else t for n, t in load_file(KOHYA).items()
    }
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        ModelPair(base, open_checkpoint(tmp_path / "wide.safetensors"))
    weights = load_file(DREAMBOOTH / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(weights, tmp_path / "inpainting.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit.*inpainting, depth, edit and other variants"):
        ModelPair(base, open_checkpoint(tmp_path / "inpainting.safetensors"))


def test_weights_that_are_not_finite_are_refused(base: BaseModel, tmp_path: Path) -> None:
    state = load_file(DREAMBOOTH / "unet/diffusion_pytorch_model.safetensors")
    state["conv_in.bias"] = torch.full_like(state["conv_in.bias"], float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(NoEffectError, match="not finite"):
        ModelPair(base, open_checkpoint(tmp_path / "nan.safetensors"))


def test_an_inpainting_base_is_refused(tmp_path: Path) -> None:
    from audit.models.base import load_base, locate_base

    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base/unet/config.json").read_text()) | {"in_channels": 17}
    (tmp_path / "base/unet/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_base(locate_base(str(tmp_path / "base")))
