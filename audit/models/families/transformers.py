"""Families with a transformer and flow matching: Stable Diffusion 3, Flux and Chroma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from audit.errors import CheckpointError
from audit.models.families.base import Condition, ModelFamily
from audit.models.families.identify import Family


class StableDiffusion3(ModelFamily):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIP encoders and, where it is there, T5."""

    family = Family.sd3
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
    longest_caption = 256
    flow = True
    half = torch.bfloat16  # T5 overflows in float16

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        states, _, pooled, _ = pipeline.encode_prompt(
            list(captions), None, None, device=device, do_classifier_free_guidance=False
        )
        return Condition(states, pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        return pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] as the [N, H W / 4, 4 C] patches of 2 x 2 that Flux takes."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, height * width // 4, channels * 4)


def unpack(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The latents [N, C, ``height``, ``width``] of patches."""
    n, _, channels = patches.shape
    latents = patches.reshape(n, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(n, channels // 4, height, width)


def positions(latents: torch.Tensor) -> torch.Tensor:
    """float [H W / 4, 3]: 0, row and column of every patch."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    found = torch.zeros(height, width, 3, dtype=latents.dtype, device=latents.device)
    found[..., 1] = torch.arange(height, device=latents.device)[:, None]
    found[..., 2] = torch.arange(width, device=latents.device)[None]
    return found.reshape(-1, 3)


class _Patched(ModelFamily):
    denoiser = "transformer"
    longest_caption = 512
    flow = True
    half = torch.bfloat16  # what they are trained and published in; float16 overflows in T5

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, int, int]:
        side = pipeline.default_sample_size if resolution is None else resolution // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, side, side

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and what is no base model."""
        taken, given = pipeline.transformer.config.in_channels, 4 * pipeline.vae.config.latent_channels
        if taken != given:
            raise CheckpointError(
                f"{name}: its transformer takes {taken} channels, its patches have {given}: Fill, Canny, Depth and "
                "other variants cannot be audited; give the text-to-image model"
            )


class Flux(_Patched):
    """FLUX.1 dev and schnell: CLIP's pooled vector and T5's states; dev takes a guidance weight as an input."""

    family = Family.flux
    pipeline = "FluxPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    # sd-scripts calls T5 te3, OneTrainer te2
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"}

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        states, pooled, _ = pipeline.encode_prompt(list(captions), None, device=device)
        return Condition(states, pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        states = condition.states
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), embedded, dtype=torch.float32, device=latents.device)
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, dtype=states.dtype, device=states.device),
            img_ids=positions(latents),
            return_dict=False,
        )[0]
        return unpack(patches, *latents.shape[2:])


class _NoGuidance(nn.Module):
    """The projection of a guidance of 0, kept: diffusers makes it on the host and moves it at every evaluation."""

    value: torch.Tensor

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.register_buffer("value", projection(torch.tensor([0])), persistent=False)

    def forward(self, guidance: torch.Tensor) -> torch.Tensor:
        """[N, channels] for the zeros [N] that diffusers passes."""
        return self.value.expand(len(guidance), -1)


class Chroma(_Patched):
    """Chroma: a descendant of FLUX.1 schnell with T5 alone, without distilled guidance."""

    family = Family.chroma
    pipeline = "ChromaPipeline"
    encoder_names: ClassVar[dict[str, str]] = {
        "te1": "text_encoder", "te2": "text_encoder", "te3": "text_encoder",
    }  # fmt: skip

    def settle(self, pipeline: Any) -> None:
        """Keep the guidance of 0 where the networks are."""
        embedding = pipeline.transformer.time_text_embed
        embedding.guidance_proj = _NoGuidance(embedding.guidance_proj)

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        found = pipeline.encode_prompt(list(captions), device=device, do_classifier_free_guidance=False)
        return Condition(found[0], mask=found[2])

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        states, mask = condition.states, condition.mask
        if mask is not None:  # every image patch is seen; of the caption, its words and one padding token
            seen = torch.ones(len(mask), latents.shape[2] * latents.shape[3] // 4, dtype=mask.dtype, device=mask.device)
            mask = torch.cat([mask, seen], dim=1).to(latents.dtype)
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, dtype=states.dtype, device=states.device),
            img_ids=positions(latents),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpack(patches, *latents.shape[2:])
