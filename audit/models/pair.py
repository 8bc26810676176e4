"""Base and fine-tuned model side by side: what extraction asks for predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audit.errors import NoEffectError
from audit.models.base import BaseModel
from audit.models.checkpoint import Checkpoint
from audit.models.tuning import tuned_networks


@dataclass(frozen=True)
class Effect:
    """Evidence that the checkpoint changed the network: relative changes, both above 0."""

    weights: float
    prediction: float


class ModelPair:
    """A base model and one checkpoint of it, for Stable Diffusion 1.x layouts (UNet, CLIP, AutoencoderKL).

    Both UNets are resident once; VAE, tokenizer and whatever the checkpoint leaves alone are shared. On a GPU the
    networks run in half precision and channels-last, on a CPU in float32. Raises CheckpointError where the
    checkpoint does not fit and NoEffectError where it changes nothing.
    """

    def __init__(self, base: BaseModel, checkpoint: Checkpoint, device: str = "cpu", lora_scale: float = 1.0) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.scheduler = base.scheduler
        self.tokenizer = base.tokenizer
        tuned_unet, tuned_text = tuned_networks(base, checkpoint, lora_scale)
        weights = _weight_change([(base.unet, tuned_unet), (base.text_encoder, tuned_text)], checkpoint)
        self.base_unet = base.part_on("unet", self.device, self.dtype)
        self.tuned_unet = self.base_unet if tuned_unet is base.unet else self._place(tuned_unet)
        self.base_text = base.part_on("text_encoder", self.device, self.dtype)
        self.tuned_text = self.base_text if tuned_text is base.text_encoder else self._place(tuned_text)
        exact = torch.float32 if base.vae.config.force_upcast else self.dtype
        self.vae = base.part_on("vae", self.device, exact)
        # six digits: the last bits of a norm depend on threads and memory layout, and an audit is to repeat exactly
        self.effect = Effect(float(f"{weights:.6g}"), float(f"{self._prediction_change(checkpoint):.6g}"))

    def _place(self, network: Any) -> Any:
        return network.to(self.device, self.dtype, memory_format=torch.channels_last).eval()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image's latents."""
        config = self.base_unet.config
        size = config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return config.in_channels, height, width

    @property
    def prediction_type(self) -> str:
        """What the UNet answers: "epsilon", "v_prediction" or "sample"."""
        return self.scheduler.config.prediction_type

    @property
    def caption_tokens(self) -> int:
        """Tokens the text encoder reads, its start and end token included."""
        return min(self.tokenizer.model_max_length, self.base_text.config.max_position_embeddings)

    def is_truncated(self, caption: str) -> bool:
        """Whether the text encoder sees only the beginning of ``caption``."""
        return len(self.tokenizer(caption).input_ids) > self.caption_tokens

    @torch.inference_mode()
    def encode(self, captions: list[str], tuned: bool) -> torch.Tensor:
        """Text states [N, tokens, width] of ``captions`` by the fine-tuned or the base text encoder."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.caption_tokens, return_tensors="pt"
        ).input_ids.to(self.device)
        encoder = self.tuned_text if tuned else self.base_text
        return encoder(tokens)[0].to(self.dtype)

    def predict_base(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The base's prediction [N, C, H, W] at one timestep (0-dim)."""
        return self.base_unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]

    def predict_tuned(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The fine-tuned model's prediction [N, C, H, W] at one timestep (0-dim)."""
        return self.tuned_unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3] of latents, rounded as diffusers' VaeImageProcessor does."""
        config = self.vae.config
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0]
        if not torch.isfinite(pixels).all():
            raise FloatingPointError("the decoded images are not finite")
        unit = (pixels.float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return unit.permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] through the codec and back: the best that any extraction can reach."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device, self.vae.dtype).div(127.5).sub(1)
        latents = self.vae.encode(pixels).latent_dist.mean
        config = self.vae.config
        return self.decode((latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor)

    @torch.inference_mode()
    def _prediction_change(self, checkpoint: Checkpoint) -> float:
        """Relative change of the prediction, as v, on seeded noise at a middle timestep, with the empty caption.

        As v, so that models that predict eps or x_0 have comparable numbers: v = (eps - sigma x_t) / alpha, and
        v = (alpha x_t - x_0) / sigma (Salimans and Ho, arXiv 2202.00512).
        """
        noise = torch.randn(2, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        latents = noise.to(self.device, self.dtype)
        steps = self.scheduler.config.num_train_timesteps
        timestep = torch.tensor(steps // 2, device=self.device)
        base = self.predict_base(latents, timestep, self.encode([""] * 2, tuned=False)).float()
        tuned = self.predict_tuned(latents, timestep, self.encode([""] * 2, tuned=True)).float()
        alpha = float(self.scheduler.alphas_cumprod[steps // 2]) ** 0.5
        sigma = (1 - alpha**2) ** 0.5
        if self.prediction_type == "epsilon":
            base, tuned = ((eps - sigma * latents.float()) / alpha for eps in (base, tuned))
        elif self.prediction_type == "sample":
            base, tuned = ((alpha * latents.float() - x0) / sigma for x0 in (base, tuned))
        change = float((tuned - base).norm() / base.norm().clamp(min=1e-12))
        if not change > 1e-6:
            raise NoEffectError(
                f"{checkpoint.path} does not change the base's predictions: there is nothing to extract"
            )
        return change


def _weight_change(networks: list[tuple[Any, Any]], checkpoint: Checkpoint) -> float:
    """Norm of tuned minus base over norm of base; NoEffectError where nothing but rounding differs."""
    changed = 0.0
    total = 0.0
    differs = False
    for base, tuned in networks:
        after = tuned.state_dict()
        for name, before in base.state_dict().items():
            total += float(before.double().square().sum())
            if tuned is base:
                continue
            changed += float((after[name].double() - before.double()).square().sum())
            same_in_half = torch.equal(after[name].half(), before.half())
            differs |= not (same_in_half or torch.equal(after[name].bfloat16(), before.bfloat16()))
    weights = (changed / max(total, 1e-12)) ** 0.5
    if not np.isfinite(weights):
        raise NoEffectError(f"{checkpoint.path} holds weights that are not finite: the file is broken")
    if not (weights > 0 and (differs or checkpoint.format.is_lora)):
        raise NoEffectError(
            f"{checkpoint.path} has the same weights as the base model: nothing was fine-tuned, or the file is an "
            "adapter whose weights are all zero; there is nothing to extract"
        )
    return weights
