"""How a checkpoint was trained: what its metadata claims, and the rank that its tensors have. No tensor is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from audit.models.formats.names import Group, rank_of, read_names
from audit.models.safetensors_header import TensorInfo

MAX_RANK = 1 << 16
MAX_STEPS = 10**9
MAX_LEARNING_RATE = 1000.0  # Prodigy and D-Adaptation are run at about 1


@dataclass(frozen=True)
class Training:
    """How a file was trained; None for what is not said. Everything but ``tensor_rank`` is its author's claim.

    ``tensor_rank`` is the rank that most changed modules have, the larger of two. ``claimed_learning_rate`` is the
    denoiser's where it has one of its own.
    """

    claimed_rank: int | None = None
    claimed_steps: int | None = None
    claimed_learning_rate: float | None = None
    tensor_rank: int | None = None


def training_of(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Training:
    """What a header says: kohya's ss_network_dim, ss_steps and ss_unet_lr or ss_learning_rate, within bounds."""
    rates = (_number(metadata.get(name), MAX_LEARNING_RATE) for name in ("ss_unet_lr", "ss_learning_rate"))
    return Training(
        _whole(metadata.get("ss_network_dim"), MAX_RANK),
        _whole(metadata.get("ss_steps"), MAX_STEPS),
        next((rate for rate in rates if rate is not None), None),
        tensor_rank(tensors),
    )


def tensor_rank(tensors: Mapping[str, TensorInfo]) -> int | None:
    """The rank that most modules of an adapter have; None for files without low-rank factors."""
    counted = Counter(rank for group in read_names(tensors).groups if (rank := _rank(group, tensors)) is not None)
    return max(counted, key=lambda rank: (counted[rank], rank)) if counted else None


def _rank(group: Group, tensors: Mapping[str, TensorInfo]) -> int | None:
    try:
        rank = rank_of(group.algorithm, {role: tensors[name].shape for role, name in group.tensors.items()})
    except (KeyError, IndexError):  # of a file that lacks a factor, or has a number for one
        return None
    return rank if rank is not None and 0 < rank <= MAX_RANK else None


def _whole(text: str | None, most: int) -> int | None:
    """The positive whole number that ``text`` is, at most ``most``."""
    found = re.fullmatch(r"\s*(\d{1,12})(?:\.0{1,6})?\s*", text or "", re.ASCII)
    return int(found[1]) if found and 0 < int(found[1]) <= most else None


def _number(text: str | None, most: float) -> float | None:
    """The positive finite number that ``text`` is, at most ``most``."""
    if text is None or not re.fullmatch(r"\s*[\d.]{1,30}(?:[eE][+-]?\d{1,3})?\s*", text, re.ASCII):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 < value <= most else None
