"""Which model family a checkpoint belongs to: by the shapes of its tensors, or by what somebody calls its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from audit.models.safetensors_header import TensorInfo

MAX_NAME = 500  # characters of a base model's name that are looked at


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
_START = r"(?:^|[._])"
# A UNet's cross attention within its blocks: LTX, PixArt, Hunyuan-DiT and Stable Audio have an attn2 outside of them
_KEYS = re.compile(r"[._]attn2[._](?:processor\.)?to_k(?=[._])")
_WITHIN = re.compile(rf"{_START}(?:down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]")
_LAST_BLOCK = re.compile(r"transformer_blocks[._]\d+$")
_FLAT_UNET = re.compile(r"lora_unet_(?!transformer_blocks|blocks)")
_INPUTS = re.compile(r"^(?:[._]lora[._](?:down|A)\.(?:[^.]+\.)?weight|\.weight|\.hada_w[12]_b|\.diff)$")
# UNets of the same widths that are other models: of video and motion, with a class or an image beside the text, Kolors
_OTHER_UNETS = re.compile(
    r"temporal_transformer_block|time_stack|time_mixer|motion_modules|temp_attentions|temp_convs|"
    r"(?:^|[._])(?:class_embedding|encoder_hid_proj|controlnet_cond_embedding)[._]"
)
_LABELS = re.compile(r"(?:^|[._])(?:label_emb[._]0[._]0|add_embedding[._]linear_1)(?:\.lora[._](?:down|A))?\.weight$")
_SDXL_LABELS = 2816  # pooled text and six sizes; Kolors has 5632, unCLIP its images
# Black Forest Labs' first Flux, told from what took over its names: HunyuanVideo says mod.linear and mlp.fc1, FLUX.2
# modulates all blocks at once, AuraFlow, Bria and others have single_transformer_blocks too
_FLUX_ALONE = re.compile(
    r"double_blocks?[._]\d+[._](?:img|txt)_mod[._]lin(?!ear)|single_blocks?[._]\d+[._]modulation[._]lin(?!ear)|"
    r"(?:double|single)_blocks?\.\d+\.processor\."
)
_NOT_FLUX = re.compile(
    r"(?:img|txt)_mod[._]linear|modulation[._]linear|(?:img|txt)_mlp[._]fc\d|stream_modulation|to_qkv_mlp_proj|"
    r"ff(?:_context)?[._]linear_(?:in|out|1)\b|joint_transformer_blocks|token_refiner|refiner_blocks|caption_projection|"
    r"individual_token_refiner|txt_in[._]individual|image_embedder|guidance_layers"
)
_ORIGINAL_DOUBLE = re.compile(rf"{_START}double_blocks?[._](\d+)[._]")
_ORIGINAL_SINGLE = re.compile(rf"{_START}single_blocks?[._](\d+)[._]")
_DOUBLE = re.compile(r"(?:^|\.|lora_transformer_|lora_unet_|lycoris_)transformer_blocks[._](\d+)[._]")
_SINGLE = re.compile(rf"{_START}single_transformer_blocks[._](\d+)[._]")
# blocks of FLUX.1; HunyuanVideo has 20 and 40, Bria's 8 and 38, LongCat 10 and 20, Ovis 6 and 27, FLUX.2 klein 5 and 20
_FLUX_DOUBLE, _FLUX_SINGLE = 19, 38
_KLEIN = (5, 20)
_FLUX_WIDTH = 3072
_FLUX_SIZES = {  # of the layers whose sizes are not every transformer's of this width, of the rows or of the inputs
    "linear1": (0, 21504), "linear2": (1, 15360), "mlp_0": (0, 12288), "mlp_2": (1, 12288),
}  # fmt: skip
_SIZED = re.compile(
    r"(?P<layer>linear1|linear2|mlp[._][02])(?:\.(?P<side>lora_[AB]|lora_down|lora_up)(?:\.\w+)?)?\.weight$"
)
_WHOLE = "context_embedder.weight"  # a whole transformer in diffusers' names has it, and FLUX.1 CLIP's vector beside it
_POOLED = "time_text_embed.text_embedder.linear_1.weight"
_SD3_BLOCKS = re.compile(r"joint_blocks?[._]\d+[._](?:x_block|context_block)[._]")
_JOINT = re.compile(rf"{_START}transformer_blocks[._]\d+[._]attn[._](?:to_q|to_k|to_v|add_[qkv]_proj)[._]")
_SD3_WIDTHS = (1536, 2432)  # medium, large
_NAMES: tuple[tuple[re.Pattern[str], Family], ...] = (
    (re.compile(r"refiner|\bkolors|\bsvd\b|stable[- ]video"), Family.other),
    (re.compile(r"\bflux[-. ]?2|\bpony[- ]?(?:diffusion[- ]?)?v?7|\bchroma(?:xl|1?[- ]?radiance)"), Family.other),
    (re.compile(r"\b(sd\s*xl|stable[- ]?diffusion[- ]?xl|sdxl[\w.-]*|pony|illustrious|noobai)"), Family.sdxl),
    (re.compile(r"\b(chroma)"), Family.chroma),
    (re.compile(r"\b(flux)"), Family.flux),
    (re.compile(r"\b(alt[- ]?diffusion)"), Family.alt),
    (re.compile(r"\b(sd[- ]?3|stable[- ]?diffusion[- ]?v?3)"), Family.sd3),
    (re.compile(r"\b(sd[- ]?v?2|stable[- ]?diffusion[- ]?v?2)"), Family.sd2),
    (re.compile(r"\b(sd[- ]?v?1|stable[- ]?diffusion[- ]?v?1|dreamlike|anything[- ]?v)"), Family.sd1),
)


def family_of_shapes(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """The family that the tensors' names and shapes show, or None where they show none or could be another's too.

    AltDiffusion's UNet is Stable Diffusion 1's, and a Chroma adapter's names are Flux': ``agree`` knows of both.
    """
    if any("distilled_guidance_layer." in name for name in tensors):
        return None if any("nerf_" in name for name in tensors) else Family.chroma  # Radiance predicts pixels
    if any(_SD3_BLOCKS.search(name) for name in tensors):
        return Family.sd3
    return _unet(tensors) or _flux(tensors) or _joint(tensors)


def _unet(tensors: Mapping[str, TensorInfo]) -> Family | None:
    widths = {info.shape[1] for name, info in tensors.items() if len(info.shape) >= 2 and _takes_text(name)}
    if len(widths) != 1 or any(_OTHER_UNETS.search(name) for name in tensors):
        return None
    found = family_of_dimensions(widths.pop())
    labels = {info.shape[1] for name, info in tensors.items() if _LABELS.search(name) and len(info.shape) == 2}
    fits = labels <= {_SDXL_LABELS} if found is Family.sdxl else not labels
    return found if fits else None


def _takes_text(name: str) -> bool:
    """Whether a tensor takes the text's states: in the cross attention of a UNet's block, at its keys' inputs."""
    found = _KEYS.search(name)
    if found is None or not _INPUTS.match(name[found.end() :]):
        return False
    block = name[: found.start()]
    return bool(_FLAT_UNET.match(block) or (_LAST_BLOCK.search(block) and _WITHIN.search(block)))


def _flux(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """Flux by the names that it alone has, else by its sizes and the numbers of its blocks."""
    if any(_NOT_FLUX.search(name) for name in tensors):
        return None
    if any(_FLUX_ALONE.search(name) for name in tensors):
        return Family.flux
    sizes = {size for info in tensors.values() if len(info.shape) == 2 for size in info.shape}
    double, single = _numbers(tensors, _ORIGINAL_DOUBLE), _numbers(tensors, _ORIGINAL_SINGLE)
    if double or single:
        fits = max(double, default=0) < _FLUX_DOUBLE and max(single, default=0) < _FLUX_SINGLE
        klein = (double, single) == tuple(set(range(count)) for count in _KLEIN)
        complete = max(double, default=0) == _FLUX_DOUBLE - 1 or max(single, default=0) == _FLUX_SINGLE - 1
        told = _FLUX_WIDTH in sizes or complete  # LoKr, LoHa and OFT show no widths
        return Family.flux if fits and told and not klein and _sizes_are_flux(tensors) else None
    double, single = _numbers(tensors, _DOUBLE), _numbers(tensors, _SINGLE)
    if any(name.endswith(_WHOLE) for name in tensors) and not any(name.endswith(_POOLED) for name in tensors):
        return None
    both = bool(double) and bool(single)
    last = max(double, default=0) == _FLUX_DOUBLE - 1 and max(single, default=0) == _FLUX_SINGLE - 1
    return Family.flux if both and last else None


def _numbers(tensors: Mapping[str, TensorInfo], pattern: re.Pattern[str]) -> set[int]:
    return {int(match[1]) for name in tensors if (match := pattern.search(name))}


def _sizes_are_flux(tensors: Mapping[str, TensorInfo]) -> bool:
    for name, info in tensors.items():
        match = _SIZED.search(name)
        if match is None or len(info.shape) != 2:
            continue
        side, size = _FLUX_SIZES[match["layer"].replace(".", "_")]
        factor = {"lora_A": 1, "lora_down": 1, "lora_B": 0, "lora_up": 0}.get(match["side"] or "", side)
        if factor == side and info.shape[side] != size:
            return False
    return True


def _joint(tensors: Mapping[str, TensorInfo]) -> Family | None:
    if any(_SINGLE.search(name) or _NOT_FLUX.search(name) for name in tensors):
        return None
    shapes = [info.shape for name, info in tensors.items() if _JOINT.search(name)]
    widths = {size for shape in shapes if len(shape) == 2 for size in shape}
    return Family.sd3 if widths & set(_SD3_WIDTHS) else None


def family_of_dimensions(cross_attention: int) -> Family | None:
    """The family of a UNet whose cross attention takes text states of this width."""
    return _CROSS_ATTENTION.get(cross_attention)


def agree(shapes: Family, claimed: Family) -> bool:
    """Whether a claim can be true of such shapes: AltDiffusion has those of SD 1, Chroma those of Flux."""
    return shapes is claimed or (shapes, claimed) in ((Family.sd1, Family.alt), (Family.flux, Family.chroma))


def family_of_name(name: str) -> Family:
    """The family that a base model's name ("SD 1.5", "sdxl_base_v1-0", a hub id) stands for; other where unknown."""
    lowered = name[:MAX_NAME].lower().replace("_", "-")
    for pattern, family in _NAMES:
        if pattern.search(lowered):
            return family
    return Family.other
