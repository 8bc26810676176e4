"""Which model family a checkpoint belongs to: by the shapes of its tensors, or by what somebody calls its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audit.models.safetensors_header import TensorInfo

MAX_NAME = 500  # characters of a base model's name that are looked at


class Family(StrEnum):
    """The families that come with this package, by the names that tables have; others are told by theirs alone."""

    sd1 = "sd1"
    sd2 = "sd2"
    sdxl = "sdxl"
    sd3 = "sd3"
    flux = "flux"
    chroma = "chroma"
    flux2 = "flux2"
    flux2_klein = "flux2-klein"
    z_image = "z-image"
    qwen_image = "qwen-image"
    ernie_image = "ernie-image"
    krea2 = "krea-2"
    wan = "wan"
    hidream = "hidream"
    kolors = "kolors"
    anima = "anima"
    wan_5b = "wan-5b"
    alt = "altdiffusion"
    other = "other"


# Names of models of no family here that hold the name of one that is
_NONE_OF_THEM = (
    re.compile(r"refiner|\bsvd\b|stable[- ]video"),
    re.compile(r"\bpony[- ]?(?:diffusion[- ]?)?v?7|\bchroma(?:xl|1?[- ]?radiance)"),
)


def family_of_shapes(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The family that the tensors' names and shapes show, or None where they show none or could be another's too.

    AltDiffusion's UNet is Stable Diffusion 1's, and a Chroma adapter's names are Flux': ``agree`` knows of both.
    """
    from audit.models.families.registry import in_turn

    return next((found for family in in_turn() if (found := family.told_by(tensors))), None)


def agree(shapes: str, claimed: str) -> bool:
    """Whether a claim can be true of such shapes: AltDiffusion has those of SD 1, Chroma those of Flux."""
    from audit.models.families.registry import FAMILIES

    return shapes == claimed or (claimed in FAMILIES and shapes in FAMILIES[claimed].shaped_like)


def family_of_name(name: str) -> str:
    """The family that a base model's name ("SD 1.5", "sdxl_base_v1-0", a hub id) stands for; other where unknown."""
    from audit.models.families.registry import in_turn

    lowered = name[:MAX_NAME].lower().replace("_", "-")
    if any(pattern.search(lowered) for pattern in _NONE_OF_THEM):
        return Family.other
    for family in in_turn():
        found = family.told_by_name(lowered)
        if found:
            return found
    return Family.other
