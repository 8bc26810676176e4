"""A family whose latents have a time axis [C, T, H, W]: PixArt's transformer, asked for videos of one frame."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.models.families.base import Condition, ModelFamily

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\btoy[- ]?video")


class Toy(ModelFamily):
    """PixArt-Sigma (arXiv 2403.04692) with T5; the one frame is what is looked at."""

    name = "toy"
    called = _CALLED
    pipeline = "PixArtSigmaPipeline"
    denoiser_class = "PixArtTransformer2DModel"
    denoiser = "transformer"
    left_out: Mapping[str, Any] = {}

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By the layer that makes the timestep's modulation of all blocks."""
        return self.name if any("adaln_single.linear" in name for name in tensors) else None

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """T5's states and which of them count."""
        states, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=device, max_sequence_length=16
        )
        return Condition(states, mask=mask)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation; the learned variance is left out."""
        found = pipeline.transformer(
            latents[:, :, 0], encoder_hidden_states=condition.states, encoder_attention_mask=condition.mask,
            timestep=timestep.expand(len(latents)), return_dict=False,
        )[0]  # fmt: skip
        return found[:, : latents.shape[1], None]

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, one frame, height and width."""
        channels, height, width = super().latent_shape(pipeline, resolution)
        return channels, 1, height, width

    def to_pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """The frame."""
        return super().to_pixels(vae, latents[:, :, 0])

    def to_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Of one frame."""
        return super().to_latents(vae, pixels)[:, :, None]


FAMILY = Toy()
