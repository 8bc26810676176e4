"""Networks of the published sizes with random weights, and a LoRA for them: nothing is downloaded.

Weights are drawn on the device that is named, as the classes initialise themselves; whole pipelines are then brought
to the host in float32, where a loaded base model is. Toy sizes have the same structure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from audit.demo import ASSETS
from audit.models.published import SD15, SDXL, VAE_4


class Kind(StrEnum):
    """The pipelines with a UNet."""

    sd15 = "sd15"
    sdxl = "sdxl"


@dataclass(frozen=True)
class Encoder:
    """A CLIP text encoder; ``projected`` is one that also answers the caption as one vector."""

    width: int
    layers: int
    heads: int
    projected: bool = False
    vocabulary: int = 49408
    tokens: int = 77


@dataclass(frozen=True)
class Sizes:
    """A pipeline's networks: keyword arguments of diffusers' own classes, and the text encoders."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    encoders: tuple[Encoder, ...]


_XL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
_VAE: dict[str, Any] = {
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_TINY_VAE = _VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
_TINY_ENCODER = Encoder(32, 2, 2)

REAL = {
    Kind.sd15: Sizes(
        SD15,
        VAE_4 | {"scaling_factor": 0.18215, "force_upcast": False},
        (Encoder(768, 12, 12),),
    ),
    Kind.sdxl: Sizes(
        SDXL,
        VAE_4 | {"scaling_factor": 0.13025, "force_upcast": True},
        (Encoder(768, 12, 12), Encoder(1280, 32, 20, projected=True)),
    ),
}
TINY = {
    Kind.sd15: Sizes(
        {
            "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8,
            "block_out_channels": (16, 16, 32, 32), "layers_per_block": 1,
        },
        _TINY_VAE | {"scaling_factor": 0.18215, "force_upcast": False},
        (_TINY_ENCODER,),
    ),
    Kind.sdxl: Sizes(
        _XL_BLOCKS
        | {
            "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": (1, 2, 2), "norm_num_groups": 8,
            "block_out_channels": (16, 32, 32), "layers_per_block": 1, "transformer_layers_per_block": (1, 1, 2),
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        _TINY_VAE | {"scaling_factor": 0.13025, "force_upcast": True},
        (_TINY_ENCODER, Encoder(32, 2, 2, projected=True)),
    ),
}  # fmt: skip


def sizes_of(kind: Kind, tiny: bool = False) -> Sizes:
    """The published sizes of ``kind``, or toy ones."""
    return (TINY if tiny else REAL)[kind]


def make_unet(kind: Kind, device: str = "cpu", tiny: bool = False) -> Any:
    """A seeded random UNet in float32, its weights drawn on ``device``; it stays there."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**sizes_of(kind, tiny).unet).requires_grad_(False).eval()


def make_pipeline(kind: Kind, device: str, tiny: bool = False) -> Any:
    """A whole pipeline in float32 on the host, its weights drawn on ``device``."""
    import diffusers

    sizes = sizes_of(kind, tiny)
    unet = make_unet(kind, device, tiny).to("cpu")
    with torch.device(device):
        vae = diffusers.AutoencoderKL(**sizes.vae)
        encoders = [_make_encoder(one) for one in sizes.encoders]
    for network in (vae, *encoders):
        network.to("cpu").requires_grad_(False).eval()
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    tokenizer = _tokenizer(sizes.encoders[0].tokens)
    if kind is Kind.sdxl:
        return diffusers.StableDiffusionXLPipeline(
            vae, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        vae, *encoders, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def _tokenizer(tokens: int) -> Any:
    """The embedded model's: its words lie within the published vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ASSETS / "base" / "tokenizer", model_max_length=tokens)


def _make_encoder(encoder: Encoder) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = _tokenizer(encoder.tokens)
    config = CLIPTextConfig(
        vocab_size=encoder.vocabulary, hidden_size=encoder.width, intermediate_size=4 * encoder.width,
        num_hidden_layers=encoder.layers, num_attention_heads=encoder.heads, projection_dim=encoder.width,
        max_position_embeddings=encoder.tokens, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if encoder.projected else CLIPTextModel)(config)


def make_lora(unet: nn.Module, path: Path, rank: int, seed: int = 1) -> int:
    """Write a LoRA by kohya's names on all attention and feed-forward layers, in float16; how many layers it has."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and ".transformer_blocks." in name:
            stem = f"lora_unet_{name.replace('.', '_')}"
            out, inputs = module.weight.shape
            state[f"{stem}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator).half() * 0.02
            state[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=generator).half() * 0.02
            state[f"{stem}.alpha"] = torch.tensor(rank / 2)
    save_file(state, path)
    return len(state) // 3


def fuse_by_diffusers(unet: Any, path: Path) -> None:
    """Change ``unet`` by the LoRA at ``path`` with diffusers' own means, the adapter taken off again."""
    from diffusers import StableDiffusionPipeline

    state, alphas = StableDiffusionPipeline.lora_state_dict(load_file(path))
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="x")
    unet.fuse_lora()
    unet.unload_lora()


def parameters(networks: Iterable[nn.Module]) -> int:
    """How many weights they have."""
    return sum(one.numel() for network in networks for one in network.parameters())
