"""Write a nano model in the original (LDM) single-file layout; diffusers reads it back."""

from __future__ import annotations

from typing import Any

import torch

from audit.models.base import BaseModel
from audit.models.families.unet import original_unet_names


def unet_to_ldm(unet: Any, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A UNet's state dictionary (or ``state``, another of such a UNet) under ``model.diffusion_model.``."""
    names = original_unet_names(unet)
    found = {}
    for name, tensor in (state or unet.state_dict()).items():
        module, _, parameter = name.rpartition(".")
        found[f"model.diffusion_model.{names[module]}.{parameter}"] = tensor
    return found


def _vae_to_ldm(state: dict[str, torch.Tensor], levels: int = 3, layers: int = 1) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        new = name
        for level in range(levels):
            new = new.replace(f"encoder.down_blocks.{level}.resnets.", f"encoder.down.{level}.block.")
            new = new.replace(f"encoder.down_blocks.{level}.downsamplers.0.", f"encoder.down.{level}.downsample.")
            new = new.replace(f"decoder.up_blocks.{level}.resnets.", f"decoder.up.{levels - 1 - level}.block.")
            new = new.replace(f"decoder.up_blocks.{level}.upsamplers.0.", f"decoder.up.{levels - 1 - level}.upsample.")
        for number in (0, 1):
            new = new.replace(f"mid_block.resnets.{number}.", f"mid.block_{number + 1}.")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[f"first_stage_model.{new}"] = tensor
    return found


def to_ldm(base: BaseModel) -> dict[str, torch.Tensor]:
    """The whole model as one state dictionary, contiguous."""
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in base.part("text_encoder").state_dict().items()
    }
    parts = {**unet_to_ldm(base.denoiser), **_vae_to_ldm(base.pipeline.vae.state_dict()), **text}
    return {name: tensor.clone().contiguous() for name, tensor in parts.items()}
