"""What the weight files in a base model's folder hold: in which precision, which variant, and whether that is all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from audit.errors import CheckpointError
from audit.models.checkpoint import variant_of, weight_files
from audit.models.families.base import ModelFamily
from audit.models.safetensors_header import read_header

_STEMS = dict.fromkeys(("unet", "transformer", "transformer_2", "text_conditioner", "vae"), "diffusion_pytorch_model")


def stem_of(part: str) -> str:
    """How the files of the weights of ``part`` begin."""
    return _STEMS.get(part, "model")


def files_of(folder: Path, part: str) -> list[Path]:
    """The files of the weights of ``part``."""
    return weight_files(folder / part, stem_of(part))


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The precision of all weights in ``files``, which holds them exactly: float32 where they are mixed."""
    kinds = {info.dtype for path in files for info in read_header(path).tensors.values()}
    floating = {kind for kind in kinds if kind[0] not in "IU"}
    half = {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}
    return half.get(frozenset(floating), torch.float32)


def variant_in(folder: Path, architecture: ModelFamily) -> str | None:
    """The variant ("fp16") that diffusers is to load: it takes the weights without one for parts that have no other."""
    for part in architecture.networks:
        found = files_of(folder, part) if (folder / part).is_dir() else []
        if found and (variant := variant_of(found[0], stem_of(part))):
            return variant
    return None


def check_complete(folder: Path, part: str, network: Any) -> None:
    """Raise CheckpointError where the files of ``part`` hold fewer numbers than ``network``, which was loaded of them.

    The libraries make up at random what is missing, and only warn. Counted, since they rename and join what they read.
    """
    if network is None:
        return
    shapes = (one.shape for path in files_of(folder, part) for one in read_header(path).tensors.values())
    stored, wanted = sum(map(math.prod, shapes)), sum(one.numel() for one in network.parameters())
    if stored < wanted:
        raise CheckpointError(
            f"{folder / part} holds {stored} numbers of the {wanted} that its configuration asks for: weights are "
            "missing; download it again"
        )
