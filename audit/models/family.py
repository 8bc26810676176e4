"""Which model family a checkpoint belongs to: by the shapes of its tensors, or by what somebody calls its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from audit.models.safetensors_header import TensorInfo


class Family(StrEnum):
    """Model families that share an architecture."""

    sd1 = "sd1"
    sd2 = "sd2"
    sdxl = "sdxl"
    sd3 = "sd3"
    flux = "flux"
    other = "other"


# Width of the text encoding that cross attention takes: CLIP ViT-L 768, OpenCLIP ViT-H 1024, both SDXL encoders 2048.
_CROSS_ATTENTION = {768: Family.sd1, 1024: Family.sd2, 2048: Family.sdxl}
_TO_K = re.compile(r"attn2[._]to_k\.(?:lora_down|lora_A|lora\.down|weight|default\.lora_A|lora_A\.default)\b")
_FLUX = re.compile(r"\b(?:lora_unet_|lora_transformer_|transformer\.|diffusion_model\.)?(?:double|single)_blocks?[._]")
_NAMES = (
    (r"\b(sd\s*xl|stable[-_ ]?diffusion[-_ ]?xl|sdxl[\w.-]*|pony|illustrious|noobai)", Family.sdxl),
    (r"\b(flux)", Family.flux),
    (r"\b(sd[-_ ]?3|stable[-_ ]?diffusion[-_ ]?v?3)", Family.sd3),
    (r"\b(sd[-_ ]?v?2|stable[-_ ]?diffusion[-_ ]?v?2)", Family.sd2),
    (r"\b(sd[-_ ]?v?1|stable[-_ ]?diffusion[-_ ]?v?1|dreamlike|anything[-_ ]?v)", Family.sd1),
)


def family_of_shapes(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """The family that the tensors' names and shapes show, or None where they show none."""
    for name, info in tensors.items():
        if _TO_K.search(name) and len(info.shape) >= 2:
            return _CROSS_ATTENTION.get(info.shape[1])
        if _FLUX.search(name):
            return Family.flux
        if "joint_transformer_blocks" in name or "joint_blocks" in name:
            return Family.sd3
    return None


def family_of_name(name: str) -> Family:
    """The family that a base model's name ("SD 1.5", "sdxl_base_v1-0", a hub id) stands for; other where unknown."""
    lowered = name.lower().replace("_", "-")
    for pattern, family in _NAMES:
        if re.search(pattern, lowered):
            return family
    return Family.other
