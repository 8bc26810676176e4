"""What a LoRA adapts, and its file: in kohya's, PEFT's or diffusers' layout, as their trainers write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from audit.errors import StudyError
from audit.study.factors import Layout, Targets, TrainingFactors

_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
_TRANSFORMER = (*_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
MODULES = {  # the ends of modules' names, as PEFT's lists are
    Targets.attention: _ATTENTION,
    Targets.transformer: _TRANSFORMER,
    Targets.everything: (*_TRANSFORMER, *_CONVOLUTIONS),
}
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA_FAMILIES = ("sd1", "sd2", "altdiffusion")  # those whose modules kohya names as diffusers does
FILES = {
    Layout.kohya: "lora.safetensors", Layout.peft: "adapter_model.safetensors",
    Layout.diffusers: "pytorch_lora_weights.safetensors",
}  # fmt: skip


def check_layout(factors: TrainingFactors, family: str) -> None:
    """Raise StudyError for a layout that has no place for what is trained."""
    if factors.layout is Layout.kohya and family not in KOHYA_FAMILIES:
        raise StudyError(
            f"layout = kohya is written for {', '.join(KOHYA_FAMILIES)}; for {family} take diffusers or peft"
        )
    if factors.layout is Layout.peft and factors.text_encoder:
        raise StudyError("layout = peft holds one network: with text_encoder = true take kohya or diffusers")


def add_adapters(pipeline: Any, denoiser: str, factors: TrainingFactors) -> None:
    """Add a LoRA to the denoiser and, where it is trained, to the text encoder; alpha is the rank."""
    assert factors.rank is not None
    assert factors.targets is not None
    rank, start = factors.rank, "gaussian"
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=start, target_modules=list(MODULES[factors.targets]))
    getattr(pipeline, denoiser).add_adapter(config)
    if factors.text_encoder:
        pipeline.text_encoder.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=start, target_modules=list(TEXT_ENCODER))
        )


def save_adapter(pipeline: Any, denoiser: str, factors: TrainingFactors, folder: Path, said: dict[str, str]) -> Path:
    """Write the adapter below ``folder``; the file. ``said`` is what kohya's header says beside."""
    assert factors.layout is not None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[factors.layout]
    network = getattr(pipeline, denoiser)
    tensors = half(get_peft_model_state_dict(network))
    encoder = half(get_peft_model_state_dict(pipeline.text_encoder)) if factors.text_encoder else {}
    if factors.layout is Layout.kohya:
        found = kohya_names(tensors, "lora_unet") | kohya_names(encoder, "lora_te_text_model")
        save_file(found, path, metadata=kohya_metadata(factors) | said)
    elif factors.layout is Layout.peft:
        save_file({f"base_model.model.{name}": one for name, one in tensors.items()}, path)
        network.peft_config["default"].save_pretrained(folder)
    else:
        layers = {f"{denoiser}_lora_layers": tensors}
        if encoder:
            layers["text_encoder_lora_layers"] = encoder
        type(pipeline).save_lora_weights(folder, safe_serialization=True, **layers)
    return path


def save_networks(
    pipeline: Any, denoiser: str, text_encoder: bool, folder: Path, dtype: torch.dtype = torch.float16
) -> Path:
    """Write the denoiser and, where it was trained, the text encoder as diffusers' folders in ``dtype``; the folder."""
    for name in (denoiser, *(("text_encoder",) if text_encoder else ())):
        network = getattr(pipeline, name)
        if hasattr(network, "register_to_config"):
            network.register_to_config(_name_or_path="")  # not where the base is on this machine
        network.to(dtype).save_pretrained(folder / name, safe_serialization=True)
    return folder


def kohya_names(state: dict[str, torch.Tensor], prefix: str, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """PEFT's tensors under kohya's names (networks/lora.py of sd-scripts), with ``alpha`` times its rank a module."""
    found = {}
    for name, tensor in state.items():
        module, side = re.sub(r"\.weight$", "", name).rsplit(".lora_", 1)
        module = module.removeprefix("text_model.") if prefix.startswith("lora_te") else module
        stem = f"{prefix}_{module.replace('.', '_')}"
        found[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
        if side == "A":
            found[f"{stem}.alpha"] = torch.tensor(alpha * len(tensor), dtype=torch.float16)
    return found


def kohya_metadata(factors: TrainingFactors) -> dict[str, str]:
    """The ``ss_*`` header's fields that say how the file was trained; captions and pictures are not among them."""
    fields: dict[str, object] = {
        "ss_network_module": "networks.lora", "ss_network_dim": factors.rank,
        "ss_network_alpha": float(factors.rank or 0),
        "ss_learning_rate": factors.rate, "ss_unet_lr": factors.rate, "ss_batch_size_per_device": factors.batch,
        "ss_lr_scheduler": str(factors.schedule), "modelspec.architecture": "stable-diffusion-v1/lora",
    }  # fmt: skip
    if factors.targets is Targets.everything:
        fields["ss_network_args"] = json.dumps({"conv_dim": factors.rank, "conv_alpha": factors.rank})
    return {name: str(value) for name, value in fields.items()}


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in float16, on the CPU and contiguous, as published files are."""
    return {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in state.items()}
