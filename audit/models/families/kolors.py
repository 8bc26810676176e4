"""Kolors.

The UNet's configuration is Stable Diffusion XL's with ChatGLM3's states in front of it: their width, and the number of
inputs of ``add_embedding`` (4096 + 6 x 256), follow from diffusers' KolorsPipeline. What diffusers' own classes do not
have by default (``original_rope`` and others of ChatGLM3-6B, the 1,100 steps of the scheduler) is from memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, TextShape
from audit.models.families.identify import Family
from audit.models.families.stable_diffusion_xl import WithSizes
from audit.models.families.unet import family_of_kolors

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\bkolors")
_OTHERS = re.compile(r"inpaint|control|ip-?adapter|img2img|virtual|try-?on|refiner")
_PIECES = Path("tokenizer") / "tokenizer.model"


class Kolors(WithSizes):
    """Kolors: the UNet of Stable Diffusion XL with the states of one language model, ChatGLM3-6B."""

    name = Family.kolors
    precedence = 9
    called = _CALLED
    shaped_like = (Family.sdxl,)
    pipeline = "KolorsPipeline"
    longest_caption = 256

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its first layers; without them its shapes are those of Stable Diffusion XL."""
        return self.name if family_of_kolors(tensors) else None

    def told_by_name(self, name: str) -> str | None:
        """Inpainting, ControlNets and what takes pictures are others."""
        return None if _OTHERS.search(name) else super().told_by_name(name)

    def check_folder(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Refuse a folder whose tokenizer cannot be read."""
        if find_spec("sentencepiece") is None or not is_safe(version("sentencepiece")):
            raise CheckpointError(
                f"{folder} is a KolorsPipeline, whose tokenizer is read by sentencepiece 0.2.1 or later: pip install "
                "'lora-audit[kolors]'"
            )
        if not (folder / _PIECES).is_file():
            raise CheckpointError(f"{folder} has no {_PIECES}: give the whole folder of the pipeline")

    def load(self, folder: Path, options: dict[str, Any]) -> Any:
        """The tokenizer is made of its one file, which was tried before: a configuration could name another."""
        from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

        return super().load(folder, {**options, "tokenizer": ChatGLMTokenizer(str(folder / _PIECES))})

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and a UNet that does not take the text encoder's states."""
        super().check(pipeline, name)
        config, width = pipeline.unet.config, pipeline.text_encoder.config.hidden_size
        sizes = width + 6 * (config.addition_time_embed_dim or 0)
        if config.encoder_hid_dim_type != "text_proj" or config.encoder_hid_dim != width:
            raise CheckpointError(
                f"{name}: its UNet takes text states of the width {config.encoder_hid_dim}, its text encoder's have "
                f"{width}: give Kolors as it is published"
            )
        if config.addition_embed_type != "text_time" or config.projection_class_embeddings_input_dim != sizes:
            raise CheckpointError(
                f"{name}: its UNet takes {config.projection_class_embeddings_input_dim} numbers of a caption and of "
                f"sizes, where {sizes} are given: give Kolors as it is published"
            )

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """The penultimate layer's states, and the last layer's of the last token; as of any for the empty caption."""
        states, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device, 1, False, max_sequence_length=self.caption_tokens(pipeline)
        )
        return Condition(states, pooled)

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """ChatGLM3's states, of which the UNet makes those that its cross attention takes."""
        pooled = denoiser.projection_class_embeddings_input_dim - 6 * denoiser.addition_time_embed_dim
        return TextShape(tokens, denoiser.encoder_hid_dim, pooled)

    def _positions(self, encoder: Any) -> int:
        found: int = encoder.config.seq_length
        return found


def is_safe(release: str) -> bool:
    """Whether this release of sentencepiece is without the overflow that a model file can cause (CVE-2026-1260)."""
    numbers = [int(one) for one in re.findall(r"\d{1,9}", release)[:3]]
    return numbers >= [0, 2, 1]


FAMILY = Kolors()
