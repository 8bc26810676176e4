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
    chroma = "chroma"
    alt = "altdiffusion"
    other = "other"


# Width of the text encoding that cross attention takes: CLIP ViT-L 768 (AltDiffusion's XLM-R too), OpenCLIP ViT-H 1024,
# both SDXL encoders 2048; the SDXL refiner's 1280 is none of them.
_CROSS_ATTENTION = {768: Family.sd1, 1024: Family.sd2, 2048: Family.sdxl}
_KEYS = re.compile(r"attn2[._](?:processor\.)?to_k(?P<rest>[._].*)$")
_INPUTS = re.compile(r"^(?:[._]lora[._](?:down|A)\.(?:[^.]+\.)?weight|\.weight|\.hada_w[12]_b|\.diff)$")
_ORIGINAL_FLUX = re.compile(r"\b(?:lora_unet_|lora_transformer_|lycoris_)?(?:double|single)_blocks?[._]")
_JOINT = re.compile(r"\b(?:lora_transformer_|lycoris_)?transformer_blocks[._](\d+)[._]attn[._](?:to_q|add_q_proj)\b")
_FLUX_WIDTH = 3072
_FLUX_DOUBLE_BLOCKS = 19
_SD3_WIDTHS = (1536, 2432)  # medium, large
_NAMES = (
    (r"\b(sd\s*xl|stable[-_ ]?diffusion[-_ ]?xl|sdxl[\w.-]*|pony|illustrious|noobai)", Family.sdxl),
    (r"\b(chroma)", Family.chroma),
    (r"\b(flux)", Family.flux),
    (r"\b(alt[-_ ]?diffusion)", Family.alt),
    (r"\b(sd[-_ ]?3|stable[-_ ]?diffusion[-_ ]?v?3)", Family.sd3),
    (r"\b(sd[-_ ]?v?2|stable[-_ ]?diffusion[-_ ]?v?2)", Family.sd2),
    (r"\b(sd[-_ ]?v?1|stable[-_ ]?diffusion[-_ ]?v?1|dreamlike|anything[-_ ]?v)", Family.sd1),
)


def family_of_shapes(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """The family that the tensors' names and shapes show, or None where they show none.

    AltDiffusion's UNet is Stable Diffusion 1's, and a Chroma adapter's names are Flux': ``agree`` knows of both.
    """
    for name, info in tensors.items():
        if (match := _KEYS.search(name)) and len(info.shape) >= 2 and _INPUTS.match(match["rest"]):
            return family_of_dimensions(info.shape[1])
        if name.startswith("distilled_guidance_layer.") or ".distilled_guidance_layer." in name:
            return Family.chroma
        if _ORIGINAL_FLUX.search(name) or "single_transformer_blocks" in name:
            return Family.flux
        if "joint_transformer_blocks" in name or "joint_blocks" in name:
            return Family.sd3
    found = [(int(match[1]), info.shape) for name, info in tensors.items() if (match := _JOINT.search(name))]
    widths = {size for _, shape in found if len(shape) == 2 for size in shape}
    if widths & set(_SD3_WIDTHS):
        return Family.sd3
    if found and _FLUX_WIDTH in widths and max(number for number, _ in found) < _FLUX_DOUBLE_BLOCKS:
        return Family.flux
    return None


def family_of_dimensions(cross_attention: int) -> Family | None:
    """The family of a UNet whose cross attention takes text states of this width."""
    return _CROSS_ATTENTION.get(cross_attention)


def agree(shapes: Family, claimed: Family) -> bool:
    """Whether a claim can be true of such shapes: AltDiffusion has those of SD 1, Chroma those of Flux."""
    return shapes is claimed or (shapes, claimed) in ((Family.sd1, Family.alt), (Family.flux, Family.chroma))


def family_of_name(name: str) -> Family:
    """The family that a base model's name ("SD 1.5", "sdxl_base_v1-0", a hub id) stands for; other where unknown."""
    lowered = name.lower().replace("_", "-")
    for pattern, family in _NAMES:
        if re.search(pattern, lowered):
            return family
    return Family.other
