"""Where the modules of other layouts are in diffusers' networks: LDM's UNet, Black Forest Labs' Flux, SD 3's MMDiT.

A file may name a module as diffusers does, or as the model's first code does, with dots or, in kohya's style, with
underscores. Some modules of the first code are several of diffusers', their rows one under the other (``qkv``), and
some have the halves of their rows in the other order (shift and scale). A denoiser's first names are known by its
family (``ModelFamily.originals``), those of text encoders here. The correspondence is that of diffusers' own
converters of whole checkpoints (``diffusers.loaders.single_file_utils``), against which the tests compare it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """The diffusers modules that one module of a file stands for; their rows, in this order, make up the file's.

    ``swapped``: the two halves of the rows change places.
    """

    modules: tuple[str, ...]
    swapped: bool = False


def simple(*pairs: tuple[str, str]) -> Iterator[tuple[str, Target]]:
    """Modules that differ in their names alone, of pairs (theirs, ours)."""
    for theirs, ours in pairs:
        yield theirs, Target((ours,))


def has_module(network: Any, name: str) -> bool:
    """Whether ``network`` has a module of this name."""
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


def originals_of(network: Any) -> Iterator[tuple[str, Target]]:
    """The names of the modules of ``network`` in its first code, where they differ, and where they are."""
    from audit.models.families.registry import FAMILIES  # they are made of what is here

    kind = type(network).__name__
    family = next((one for one in FAMILIES.values() if one.denoiser_class == kind), None)
    if family is not None:
        yield from family.originals(network)
    elif kind in _CLIP:
        yield from open_clip_names(network)
    elif kind in _STORED_AS:
        yield from _stored_names(network, _STORED_AS[kind])


def _stored_names(network: Any, prefixes: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, Target]]:
    for name, _ in network.named_modules():
        for ours, theirs in prefixes:
            if name.startswith(ours):
                yield f"{theirs}{name.removeprefix(ours)}", Target((name,))
                break


def open_clip_names(network: Any) -> Iterator[tuple[str, Target]]:
    """OpenCLIP's names of the modules of a CLIP text encoder."""
    nested = "text_model." if has_module(network, "text_model") else ""
    config: Any = network.config
    yield from simple(("ln_final", f"{nested}final_layer_norm"))
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"{nested}encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        yield f"{theirs}.attn.in_proj", Target(tuple(f"{ours}.self_attn.{x}_proj" for x in "qkv"))
        yield from simple(
            (f"{theirs}.attn.out_proj", f"{ours}.self_attn.out_proj"),
            (f"{theirs}.ln_1", f"{ours}.layer_norm1"),
            (f"{theirs}.ln_2", f"{ours}.layer_norm2"),
            (f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1"),
            (f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"),
        )


# Models of text and pictures, which transformers stores under the names that they had in its earlier versions
_STORED_AS = {
    "Mistral3ForConditionalGeneration": (
        ("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."), ("lm_head", "language_model.lm_head"),
    ),
    "Mistral3Model": (("language_model.", "language_model.model."),),
    "Qwen3Model": (("", "model."),),
    "Qwen2_5_VLForConditionalGeneration": (("model.language_model.", "model."), ("model.visual.", "visual.")),
}  # fmt: skip
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
# diffusers' attention processors of old: to_q_lora is the adapter of to_q, and CLIP's have other names than UNet's
_OLD_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def module_targets(network: Any) -> dict[str, Target]:
    """Every name that a file may give to a module of ``network``, with dots, and where it is in it."""
    found: dict[str, Target] = {}
    for name, module in network.named_modules():
        if not name or not any(True for _ in module.parameters(recurse=False)):
            continue
        target = Target((name,))
        names = {name, name.removeprefix("text_model."), f"text_model.{name.removeprefix('text_model.')}"}
        parent, _, last = name.rpartition(".")
        if last == "0" and parent.endswith("to_out"):  # old processors: to_out
            names.add(parent)
        if "self_attn." in name:
            old = next((old for old, new in _OLD_CLIP.items() if new == last), None)
            if old:
                names |= {f"{one.rpartition('.')[0]}.{old}" for one in set(names)}
        if ".attn1." in name or ".attn2." in name or ".attn." in name:
            for one in set(names):
                for attention in ("attn1", "attn2", "attn"):
                    names.add(one.replace(f".{attention}.", f".{attention}.processor."))
        for one in names:
            found.setdefault(one, target)
    for theirs, target in originals_of(network):
        if all(has_module(network, module) for module in target.modules):
            found.setdefault(theirs, target)
    return found


def flat_targets(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same by names with underscores for dots, as kohya's files have them."""
    return {name.replace(".", "_"): target for name, target in targets.items()}
