"""Pictures through a base model's codec, its VAE: decoded latents, and what is left of a picture after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from audit.config import Precision
from audit.errors import CheckpointError, NotFiniteError
from audit.fits import Fits
from audit.models.base import BaseModel
from audit.models.families.base import ModelFamily
from audit.models.placement import choose_precision, decoder_precision

ALONE = 8  # pictures at once where nothing is known of their cost; halved where they do not fit


class Codec:
    """The VAE of a base model on a device. ``resolution`` is the side of pictures in pixels, None for the model's own.

    It needs no denoiser and no text encoder: ``load_vae`` has loaded neither. ModelPair is one too.
    """

    device: torch.device
    architecture: ModelFamily
    model: BaseModel
    resolution: int | None
    fits: Fits
    base: Any  # the base's pipeline, its networks on the device
    vae: Any

    def __init__(
        self,
        base: BaseModel,
        device: str = "cpu",
        resolution: int | None = None,
        precision: Precision = Precision.auto,
        fits: Fits | None = None,
    ) -> None:
        self.device, self.resolution = torch.device(device), resolution
        self.architecture, self.model, self.base = base.architecture, base, base.pipeline
        self.fits = fits or Fits()
        dtype = choose_precision(precision, base.architecture.half, self.device)
        self.vae = base.part_on("vae", self.device, decoder_precision(base.part("vae"), dtype, self.device))
        self._check_resolution(base.name)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a picture, pixels."""
        *_, height, width = self.latent_shape
        factor = self.architecture.vae_scale_factor(self.base)
        return width * factor, height * factor

    def _widen(self) -> None:
        """Go on in float32."""
        self.vae = self.model.part_on("vae", self.device, torch.float32)

    def _decoded_at_once(self) -> int:
        return ALONE

    def _check_resolution(self, name: str) -> None:
        if self.resolution is None:
            return
        unit = 2 * self.architecture.vae_scale_factor(self.base)
        if self.resolution % unit or not unit <= self.resolution <= 4096:
            raise CheckpointError(f"{name} samples sides from {unit} to 4096 that are multiples of {unit} pixels")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, perhaps a time axis, height and width of one image's latents."""
        return self.architecture.latent_shape(self.base, self.resolution)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3] of latents, rounded as diffusers' VaeImageProcessor does; in slices that fit into memory.

        A decoder that overflows in half precision is used in float32 from then on. Raises NotFiniteError where the
        pictures are not finite even so.
        """
        return self._sliced("decode", latents, self._pixels)

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] through the codec and back: the best that any extraction can reach."""

        return self._sliced("reconstruct", torch.from_numpy(images), lambda some: self._pixels(self._latents(some)))

    @torch.inference_mode()
    def encode_pictures(self, images: np.ndarray) -> np.ndarray:
        """Latents float32 [N, *latent_shape] of uint8 [N, H, W, 3] in ``picture_size``, as the denoiser takes them."""
        return self._sliced("encode", torch.from_numpy(images), lambda some: self._latents(some).float())

    def _latents(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(self.vae.dtype).div(127.5).sub(1)
        found: torch.Tensor = self.architecture.to_latents(self.vae, pixels)
        mean, deviation = self.architecture.latent_statistics(self.vae, found)
        return (found - mean) / deviation

    def _sliced(self, what: str, items: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        kind = what, self.architecture.name, tuple(items.shape[1:]), self.vae.dtype
        pieces = self.fits.slices(kind, items, lambda some: work(some).cpu(), self._decoded_at_once(), self.device)
        return torch.cat([pixels for _, pixels in pieces]).numpy()

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] on the device."""
        mean, deviation = self.architecture.latent_statistics(self.vae, latents)
        pixels = self.architecture.to_pixels(self.vae, (latents * deviation + mean).to(self.vae.dtype))
        if not torch.isfinite(pixels).all():
            if self.vae.dtype is torch.float32:
                raise NotFiniteError("the decoded images are not finite")
            self._widen()
            return self._pixels(latents)
        unit = (pixels.float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return unit.permute(0, 2, 3, 1)
