"""Stable Diffusion XL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.errors import CheckpointError
from audit.models.families.base import Condition
from audit.models.families.identify import Family
from audit.models.families.unet import WithUNet, family_of_unet
from audit.models.published import PINNED

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\b(sd\s*xl|stable[- ]?diffusion[- ]?xl|sdxl[\w.-]*|pony|illustrious|noobai)")


class WithSizes(WithUNet):
    """A family whose UNet takes a pooled vector of the caption, and the sizes of a picture."""

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """Asked for an uncropped picture of the sampled size, as diffusers does by default."""
        added = {"text_embeds": condition.pooled, "time_ids": _sizes(pipeline, latents)}
        return pipeline.unet(
            latents, timestep, encoder_hidden_states=condition.states, added_cond_kwargs=added, return_dict=False
        )[0]


class StableDiffusionXL(WithSizes):
    """Stable Diffusion XL (arXiv 2307.01952) and its descendants, Pony and Illustrious among them."""

    name = Family.sdxl
    precedence = 10
    called = _CALLED
    pipeline = "StableDiffusionXLPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    probe = "a photo"  # of the empty caption's zeros no change of cross attention could be seen
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "te2": "text_encoder_2"}
    encoder_prefixes = (("conditioner.embedders.0.",), ("conditioner.embedders.1.",))
    left_out: ClassVar[dict[str, Any]] = {"feature_extractor": None, "add_watermarker": False}
    default_config = PINNED["sdxl"]

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By the width of the text that the UNet takes."""
        return self.name if family_of_unet(tensors) is Family.sdxl else None

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
            import torch

            kept = torch.tensor([caption != "" for caption in captions], device=device).to(states.dtype)
            states, pooled = states * kept[:, None, None], pooled * kept[:, None]
        return Condition(states, pooled)


def _sizes(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """[N, 6]: height and width of an uncropped picture, its upper left corner, and the size asked for.

    Filled on the device: a tensor made of numbers on the host would have to wait for the device at every step.
    """
    sizes = latents.new_zeros(len(latents), 6)
    height, width = (side * pipeline.vae_scale_factor for side in latents.shape[2:])
    for column, side in ((0, height), (1, width), (4, height), (5, width)):
        sizes[:, column].fill_(side)
    return sizes


FAMILY = StableDiffusionXL()
