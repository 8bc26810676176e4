"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.models.families.base import Condition
from audit.models.families.identify import Family
from audit.models.families.unet import WithUNet, family_of_dimensions, family_of_unet
from audit.models.published import PINNED

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = {
    Family.sd2: re.compile(r"\b(sd[- ]?v?2|stable[- ]?diffusion[- ]?v?2)"),
    Family.sd1: re.compile(r"\b(sd[- ]?v?1|stable[- ]?diffusion[- ]?v?1|dreamlike|anything[- ]?v)"),
}


class StableDiffusion(WithUNet):
    """Stable Diffusion 1.x (CLIP ViT-L) and 2.x (OpenCLIP ViT-H, often v-prediction)."""

    name = Family.sd1
    precedence = 60
    pipeline = "StableDiffusionPipeline"
    default_config: ClassVar[str | None] = PINNED["sd15"]
    left_out: ClassVar[dict[str, Any]] = {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By the width of the text that the UNet takes."""
        found = family_of_unet(tensors)
        return found if found in _CALLED else None

    def told_by_name(self, name: str) -> str | None:
        """Of two versions, the one that is named."""
        return next((family for family, pattern in _CALLED.items() if pattern.search(name)), None)

    def variant_of(self, pipeline: Any) -> str:
        """The version that the width of the text shows."""
        return family_of_dimensions(pipeline.unet.config.cross_attention_dim) or self.name

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        return Condition(pipeline.encode_prompt(list(captions), device, 1, False)[0])

    def encode_soft(self, pipeline: Any, vectors: torch.Tensor, device: torch.device) -> Condition:
        """What the text encoder makes of vectors in place of tokens."""
        from audit.models.soft import Embedded

        return Condition(Embedded(pipeline.text_encoder, pipeline.tokenizer, device).states(vectors))


FAMILY = StableDiffusion()
