"""AltDiffusion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.models.families.identify import Family
from audit.models.families.stable_diffusion import StableDiffusion
from audit.models.index import read_index

if TYPE_CHECKING:
    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\b(alt[- ]?diffusion)")


class AltDiffusion(StableDiffusion):
    """AltDiffusion: Stable Diffusion 1.x with a multilingual XLM-R text encoder (arXiv 2211.06679)."""

    name = Family.alt
    precedence = 40
    called = _CALLED
    shaped_like = (Family.sd1,)
    pipeline = "AltDiffusionPipeline"
    default_config = None

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """Its shapes are those of Stable Diffusion 1."""
        return None

    def told_by_name(self, name: str) -> str | None:
        """By its own name."""
        return super(StableDiffusion, self).told_by_name(name)

    def variant_of(self, pipeline: Any) -> str:
        """There is one."""
        return self.name

    def load(self, folder: Path, options: dict[str, Any]) -> Any:
        """Part by part: the text encoder's class has moved, and the published indices name where it was."""
        import diffusers
        from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
            RobertaSeriesModelWithTransformation,
        )
        from transformers import XLMRobertaTokenizer

        common = {name: options[name] for name in ("use_safetensors", "local_files_only", "variant")}
        dtypes = options["dtype"]
        index = read_index(folder)
        scheduler = getattr(diffusers, str(index["scheduler"][1]))
        if not issubclass(scheduler, diffusers.SchedulerMixin):
            raise ValueError(f"{index['scheduler'][1]} is no scheduler")
        return diffusers.AltDiffusionPipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", dtype=dtypes["vae"], **common),
            text_encoder=RobertaSeriesModelWithTransformation.from_pretrained(
                folder / "text_encoder", dtype=dtypes["text_encoder"], **common
            ),
            tokenizer=XLMRobertaTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            unet=options.get("unet")
            or diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtypes["unet"], **common),
            scheduler=scheduler.from_pretrained(folder / "scheduler", local_files_only=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def _positions(self, encoder: Any) -> int:
        return encoder.config.max_position_embeddings - 2  # RoBERTa counts from the padding token's number on


FAMILY = AltDiffusion()
