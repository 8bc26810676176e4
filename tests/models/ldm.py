"""Write a nano model in the original (LDM) single-file layout, the inverse of what diffusers reads."""

from __future__ import annotations

import torch

from audit.models.base import BaseModel

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def _unet_blocks(levels: int, layers: int) -> list[tuple[str, str]]:
    """(diffusers prefix, LDM prefix) of every block of a UNet."""
    pairs = []
    block = 1
    for level in range(levels):
        for layer in range(layers):
            pairs.append((f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{block}.0."))
            pairs.append((f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{block}.1."))
            block += 1
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{block}.0.op."))
        block += 1
    pairs += [("mid_block.resnets.0.", "middle_block.0."), ("mid_block.attentions.0.", "middle_block.1.")]
    pairs += [("mid_block.resnets.1.", "middle_block.2.")]
    for level in range(levels):
        for layer in range(layers + 1):
            number = level * (layers + 1) + layer
            pairs.append((f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{number}.0."))
            pairs.append((f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{number}.1."))
        has_attention = level < levels - 1
        place = 2 if has_attention else 1
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{number}.{place}.conv."))
    pairs += [
        ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
        ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ]  # fmt: skip
    return pairs


def unet_to_ldm(state: dict[str, torch.Tensor], levels: int = 3, layers: int = 1) -> dict[str, torch.Tensor]:
    """A UNet's state dictionary under ``model.diffusion_model.``."""
    found = {}
    for name, tensor in state.items():
        prefix, target = next(pair for pair in _unet_blocks(levels, layers) if name.startswith(pair[0]))
        rest = name.removeprefix(prefix)
        if "resnets" in prefix:
            part, _, kind = rest.rpartition(".")
            rest = f"{next(ldm for ldm, ours in _RESNET.items() if ours == part)}.{kind}"
        found[f"model.diffusion_model.{target}{rest}"] = tensor
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
    parts = {**unet_to_ldm(base.denoiser.state_dict()), **_vae_to_ldm(base.pipeline.vae.state_dict()), **text}
    return {name: tensor.clone().contiguous() for name, tensor in parts.items()}
