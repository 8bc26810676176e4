"""All families that can be audited, by the diffusers pipeline class of their base model."""

from __future__ import annotations

from audit.models.families.base import ModelFamily
from audit.models.families.transformers import Chroma, Flux, StableDiffusion3
from audit.models.families.unets import AltDiffusion, StableDiffusion, StableDiffusionXL

FAMILIES: dict[str, ModelFamily] = {
    one.pipeline: one
    for one in (StableDiffusion(), StableDiffusionXL(), AltDiffusion(), StableDiffusion3(), Flux(), Chroma())
}
