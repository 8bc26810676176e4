"""Models whose VAE is one of videos: of which one frame is sampled, decoded and encoded, or one of a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import ModelFamily

if TYPE_CHECKING:
    import torch


class OneFrame(ModelFamily):
    """A family with latents of videos [N, C, frames, H, W], of which there is one frame: [N, C, H, W] outside."""

    def latent_channels(self, vae: Any) -> int:
        """Channels of the VAE's latents."""
        found: int = vae.config.z_dim
        return found

    def to_pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """The one frame."""
        return super().to_pixels(vae, latents[:, :, None])[:, :, 0]

    def to_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Of one frame."""
        return super().to_latents(vae, pixels[:, :, None])[:, :, 0]


class Frames(OneFrame):
    """A family that draws videos: of several frames the latents are [N, C, frames, H, W], and the middle one is seen.

    The VAE is causal in time: the first latent is the first frame, each further one as many as
    ``scale_factor_temporal`` says, and a frame depends on no later latent (arXiv 2503.20314).
    """

    def sampled_shape(self, pipeline: Any, latent_shape: Sequence[int], frames: int) -> tuple[int, ...]:
        """With a time axis where there are several. Raises CheckpointError for a number that no latents stand for."""
        if frames == 1:
            return tuple(latent_shape)
        each = pipeline.vae.config.scale_factor_temporal
        if (frames - 1) % each:
            raise CheckpointError(f"--frames {frames}: of this base it is 1, {each + 1}, {2 * each + 1} and so on")
        channels, height, width = latent_shape
        return channels, (frames - 1) // each + 1, height, width

    def to_pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """The one frame, or the middle one: later latents than its own are not decoded."""
        if latents.ndim == 4:
            return super().to_pixels(vae, latents)
        each = vae.config.scale_factor_temporal
        middle = (latents.shape[2] - 1) * each // 2
        until = math.ceil(middle / each) + 1
        return ModelFamily.to_pixels(self, vae, latents[:, :, :until])[:, :, middle]
