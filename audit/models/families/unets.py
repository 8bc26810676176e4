"""Families with a UNet: Stable Diffusion 1.x and 2.x, Stable Diffusion XL, AltDiffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from audit.errors import CheckpointError
from audit.models.families.base import Condition, ModelFamily
from audit.models.families.identify import Family
from audit.models.published import PINNED
from audit.untrusted.documents import parse_json


class _WithUNet(ModelFamily):
    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and what is no base model."""
        taken, given = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        if taken != given:
            raise CheckpointError(
                f"{name}: its UNet takes {taken} channels, its latents have {given}: inpainting, depth and other "
                "variants cannot be audited; give the text-to-image model"
            )

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        return pipeline.unet(latents, timestep, encoder_hidden_states=condition.states, return_dict=False)[0]


class StableDiffusion(_WithUNet):
    """Stable Diffusion 1.x (CLIP ViT-L) and 2.x (OpenCLIP ViT-H, often v-prediction)."""

    family = Family.sd1
    pipeline = "StableDiffusionPipeline"
    default_config: ClassVar[str | None] = PINNED["sd15"]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        return Condition(pipeline.encode_prompt(list(captions), device, 1, False)[0])


class AltDiffusion(StableDiffusion):
    """AltDiffusion: Stable Diffusion 1.x with a multilingual XLM-R text encoder (arXiv 2211.06679)."""

    family = Family.alt
    pipeline = "AltDiffusionPipeline"
    default_config = None

    def load(self, folder: Path, options: dict[str, Any]) -> Any:
        """Part by part: the text encoder's class has moved, and the published indices name where it was."""
        import diffusers
        from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
            RobertaSeriesModelWithTransformation,
        )
        from transformers import XLMRobertaTokenizer

        common = {name: options[name] for name in ("use_safetensors", "local_files_only", "variant")}
        dtypes = options["dtype"]
        index = parse_json((folder / "model_index.json").read_bytes())
        scheduler = getattr(diffusers, str(index["scheduler"][1]))
        if not issubclass(scheduler, diffusers.SchedulerMixin):
            raise ValueError(f"{index['scheduler'][1]} is no scheduler")
        return diffusers.AltDiffusionPipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", dtype=dtypes["vae"], **common),
            text_encoder=RobertaSeriesModelWithTransformation.from_pretrained(
                folder / "text_encoder", dtype=dtypes["text_encoder"], **common
            ),
            tokenizer=XLMRobertaTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtypes["unet"], **common),
            scheduler=scheduler.from_pretrained(folder / "scheduler", local_files_only=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def _positions(self, encoder: Any) -> int:
        return encoder.config.max_position_embeddings - 2  # RoBERTa counts from the padding token's number on


class StableDiffusionXL(_WithUNet):
    """Stable Diffusion XL (arXiv 2307.01952) and its descendants, Pony and Illustrious among them."""

    family = Family.sdxl
    pipeline = "StableDiffusionXLPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    probe = "a photo"  # of the empty caption's zeros no change of cross attention could be seen
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "te2": "text_encoder_2"}
    default_config = PINNED["sdxl"]

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and what is no base model."""
        if pipeline.text_encoder is None or pipeline.config.get("requires_aesthetics_score"):
            raise CheckpointError(f"{name} is the refiner of Stable Diffusion XL: audit against the base model")
        super().check(pipeline, name)

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """Both encoders' penultimate states side by side; zeros for the empty caption where the model wants them."""
        states, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([caption != "" for caption in captions], device=device).to(states.dtype)
            states, pooled = states * kept[:, None, None], pooled * kept[:, None]
        return Condition(states, pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """Asked for an uncropped picture of the sampled size, as diffusers does by default."""
        added = {"text_embeds": condition.pooled, "time_ids": _sizes(pipeline, latents)}
        return pipeline.unet(
            latents, timestep, encoder_hidden_states=condition.states, added_cond_kwargs=added, return_dict=False
        )[0]


def _sizes(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """[N, 6]: height and width of an uncropped picture, its upper left corner, and the size asked for.

    Filled on the device: a tensor made of numbers on the host would have to wait for the device at every step.
    """
    sizes = latents.new_zeros(len(latents), 6)
    height, width = (side * pipeline.vae_scale_factor for side in latents.shape[2:])
    for column, side in ((0, height), (1, width), (4, height), (5, width)):
        sizes[:, column].fill_(side)
    return sizes
