"""One spelling for a module's name, whichever of a model's layouts a file has it in, without a network at hand.

A family's ``originals`` yields names for as many layers as a network says to have: here one that has more than any
published model. Where families call different modules by one name, the family of the file decides.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from audit.models.families.base import ModelFamily
from audit.models.families.keys import Target, open_clip_names
from audit.models.families.registry import FAMILIES, in_turn
from audit.models.families.unet import WithUNet, diffusers_unet_name

log = logging.getLogger(__name__)
MOST_LAYERS = 64  # of one kind; Qwen-Image has 60 blocks
_T5 = re.compile(r"(?:encoder_)?block_\d+_layer_\d+_")
_OLD_CLIP = re.compile(r"self_attn_to_(q|k|v|out)$")


@dataclass(frozen=True)
class Place:
    """What one module of a file is: diffusers' modules, with underscores for dots, whose rows make up the file's.

    ``swapped``: the two halves of the rows change places.
    """

    part: str
    modules: tuple[str, ...]
    swapped: bool = False


def place_of(part: str, module: str, family: str | None) -> Place:
    """The place of a ``module`` of a file's ``part`` ("denoiser", "te1", ...), of the family that its shapes show."""
    name = _flat(module)
    target = next((found for one in (name, _plain(name)) if (found := _find(part, one, family)) is not None), None)
    if target is None:
        ours = diffusers_unet_name(_plain(name)) if part == "denoiser" else None
        target = Target((ours or name,))
    modules = tuple(_plain(_flat(one)) for one in target.modules)
    return Place("t5" if _T5.match(modules[0]) else part, modules, target.swapped)


def _flat(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _plain(name: str) -> str:
    """Without what old processors, versions of transformers and trainers add to a flat name."""
    name = name.replace("processor_", "").removeprefix("text_model_")
    name = name.removesuffix("_0") if name.endswith("to_out_0") else name
    return _OLD_CLIP.sub(r"self_attn_\1_proj", name)


def _find(part: str, name: str, family: str | None) -> Target | None:
    if part != "denoiser":
        return _encoders().get(name)
    own = FAMILIES.get(family) if family else None
    return (_undisputed() if own is None else _of_family(own)).get(name)


@lru_cache(maxsize=64)
def _of_family(family: ModelFamily) -> dict[str, Target]:
    """The targets of a family's first names; none where it needs a real network to say them."""
    if isinstance(family, WithUNet):
        return {}
    try:
        return _targets(family.originals(_outline()))
    except (AttributeError, TypeError, KeyError) as error:
        log.info("names of %s are compared as files spell them: %s", family.name, error)
        return {}


@lru_cache(maxsize=1)
def _undisputed() -> dict[str, Target]:
    """What no two families understand differently."""
    found: dict[str, Target] = {}
    disputed = set()
    for family in in_turn():
        for name, target in _of_family(family).items():
            if found.setdefault(name, target) != target:
                disputed.add(name)
    return {name: target for name, target in found.items() if name not in disputed}


@lru_cache(maxsize=1)
def _encoders() -> dict[str, Target]:
    return _targets(open_clip_names(_outline()))


def _targets(pairs: Iterable[tuple[str, Target]] | Iterator[tuple[str, Target]]) -> dict[str, Target]:
    return {_flat(theirs): target for theirs, target in pairs}


class _Most:
    """A configuration in which every count is MOST_LAYERS."""

    guidance_embeds = True
    dual_attention_layers = range(MOST_LAYERS)

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return MOST_LAYERS


def _outline() -> Any:
    return SimpleNamespace(config=_Most(), get_submodule=lambda name: None, named_modules=lambda: iter(()))
