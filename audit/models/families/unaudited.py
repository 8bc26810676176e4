"""Models that cannot be audited, so that a file or a base of theirs is refused by its name.

What a file's tensors show is believed less than what its maker claims: names that several share are not in the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audit.models.families.identify import MAX_NAME, Family, family_of_name

if TYPE_CHECKING:
    from audit.models.safetensors_header import TensorInfo

_START = r"(?:^|[._])"
_BLOCK = rf"{_START}(?:transformer_)?blocks[._]\d+[._]"


@dataclass(frozen=True)
class Unaudited:
    """A model: ``called`` what people call it, in lower case with "-" for "_"; ``pipelines`` how the names of its
    pipeline classes in diffusers begin; ``tensors`` names that it alone has, or has of this ``size`` alone.
    """

    title: str
    called: str
    pipelines: str = r"(?!)"
    tensors: str | None = None
    size: int | None = None

    @property
    def sentence(self) -> str:
        """That it is not audited."""
        return f"{self.title} is not audited yet"


# The first that fits
TABLE = (
    Unaudited("HiDream-E1, which edits pictures,", r"\bhidream(?:[- ]?e1|[- ][\w -]{0,30}edit)", "HiDream.*Edit"),
    Unaudited("HiDream-O1", r"\bhidream[- ]?o1", "HiDreamO1"),
    Unaudited("HiDream that takes pictures", r"\bhidream", "HiDream"),
    Unaudited("Kolors that takes pictures", r"\bkolors", "Kolors"),
    Unaudited(
        "LTX", r"\bltx", "LTX",
        rf"{_START}(?:audio_(?:attn\d|ff|proj_in|proj_out|patchify_proj)|av_cross_attn_)",
    ),
    Unaudited(
        "HunyuanVideo or HunyuanImage", r"\bhunyuan[- ]?(?:video|image)", "Hunyuan(?:Video|Image)",
        rf"{_START}double_blocks[._]\d+[._](?:img|txt)_(?:attn_(?:qkv|proj)|mod[._]linear)[._]|"
        rf"{_START}context_embedder[._]token_refiner[._]",
    ),
    Unaudited("Hunyuan-DiT", r"\bhunyuan(?:[- ]?dit|[- ]?1\b)", "HunyuanDiT", rf"{_BLOCK}skip_(?:linear|norm)[._]"),
    Unaudited(
        "Kandinsky", r"\bkandinsky", "Kandinsky",
        rf"{_START}(?:text|visual)_transformer_blocks[._]\d+[._](?:self_attention|cross_attention|feed_forward)[._]",
    ),
    Unaudited(
        "AuraFlow, and Pony V7,", r"\bauraflow|\bpony[- ]?(?:diffusion[- ]?)?v?7", "AuraFlow",
        rf"{_START}joint_transformer_blocks[._]\d+[._]ff(?:_context)?[._](?:linear_\d|out_projection)",
    ),
    Unaudited("FLUX.3", r"\bflux[-. ]?3(?!\d)", "Flux3", rf"{_START}mode_blocks[._]\w+[._]\d+[._]"),
    Unaudited(
        "Qwen-Image 2", r"\bqwen(?:[- ]?image)?[- ]2(?:\.\d|\b)", "QwenImage21",
        r"transformer_blocks[._]\d+[._]img_mlp[._]gate_layer[._]",
    ),
    Unaudited(
        "Qwen-Image that edits or layers pictures", r"\bqwen[- ]?image[- ](?:edit|layered)",
        "QwenImage(?:Edit|Layered)",
    ),
    Unaudited("Lumina", r"\blumina", "Lumina", rf"{_START}(?:context_refiner|noise_refiner)[._]\d+[._]attn[._]"),
    Unaudited("Mochi", r"\bmochi", "Mochi", r"transformer_blocks[._]\d+[._]attn1[._](?:add_[qkv]_proj|to_add_out)"),
    Unaudited("PixArt", r"\bpixart", "PixArt", rf"{_START}adaln_single[._]emb[._](?:aspect_ratio|resolution)_embedder"),
    Unaudited("Sana", r"\bsana\b", "Sana", r"transformer_blocks[._]\d+[._]ff[._]conv_(?:depth|inverted|point)[._]"),
    Unaudited("CogVideoX", r"\bcogvideo", "CogVideo"),
    Unaudited("CogView", r"\bcogview", "CogView"),
    Unaudited("Cosmos", r"\bcosmos", "Cosmos", rf"{_START}adaln_modulation_(?:self_attn|cross_attn|mlp)[._]"),
    Unaudited("Bria", r"\bbria\b", "Bria"),
    Unaudited("Stable Cascade", r"\bstable[- ]?cascade", "StableCascade"),
    Unaudited("Stable Video Diffusion", r"\bsvd\b|\bstable[- ]?video", "StableVideo"),
    Unaudited("Ideogram", r"\bideogram", "Ideogram"),
    Unaudited("OmniGen", r"\bomnigen", "OmniGen"),
    Unaudited(
        "JoyImage", r"\bjoyimage", "JoyImage",
        rf"{_START}double_blocks[._]\d+[._]attn[._](?:img|txt)_attn_qkv[._]",
    ),
    Unaudited("MageFlow", r"\bmage[- ]?flow", "MageFlow"),
    Unaudited("MiniMax H3", r"\bminimax[- ]?h3", "MiniMaxH3"),
    Unaudited("Playground", r"\bplayground"),
)  # fmt: skip


def by_pipeline(kind: str) -> Unaudited | None:
    """The model of a pipeline class."""
    return next((one for one in TABLE if re.match(one.pipelines, kind)), None)


def by_claim(name: str) -> Unaudited | None:
    """The model that a base's name stands for; None where it is one that is audited, or not known."""
    lowered = name[:MAX_NAME].lower().replace("_", "-")
    if family_of_name(name) != Family.other:
        return None
    return next((one for one in TABLE if re.search(one.called, lowered)), None)


def by_tensors(tensors: Mapping[str, TensorInfo]) -> Unaudited | None:
    """The model that the names and shapes of a file show which is of no family that is audited."""
    return next((one for one in TABLE if one.tensors is not None and _shown(tensors, one.tensors, one.size)), None)


def _shown(tensors: Mapping[str, TensorInfo], pattern: str, size: int | None) -> bool:
    return any(re.search(pattern, name) and size in (None, *info.shape) for name, info in tensors.items())
