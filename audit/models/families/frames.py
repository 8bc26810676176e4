"""Models whose VAE is one of videos: of which one frame is sampled, decoded and encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
