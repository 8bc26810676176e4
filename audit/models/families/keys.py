"""Where the modules of other layouts are in diffusers' networks: LDM's UNet, Black Forest Labs' Flux, SD 3's MMDiT.

A file may name a module as diffusers does, or as the model's first code does, with dots or, in kohya's style, with
underscores. Some modules of the first code are several of diffusers', their rows one under the other (``qkv``), and
some have the halves of their rows in the other order (shift and scale). The correspondence is that of diffusers' own
converters of whole checkpoints (``diffusers.loaders.single_file_utils``), against which the tests compare it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The diffusers modules that one module of a file stands for; their rows, in this order, make up the file's.

    ``swapped``: the two halves of the rows change places.
    """

    modules: tuple[str, ...]
    swapped: bool = False


def original_unet_names(network: nn.Module) -> dict[str, str]:
    """The LDM name of every module of a diffusers UNet2DConditionModel, by its diffusers name."""
    config: Any = network.config
    layers = config.layers_per_block
    levels = len(config.block_out_channels)
    prefixes = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    for level in range(levels):
        for layer in range(layers):
            block = 1 + level * (layers + 1) + layer
            prefixes[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            prefixes[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
        prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            prefixes[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
            prefixes[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
        has_attention = hasattr(network.get_submodule(f"up_blocks.{level}"), "attentions")
        last = level * (layers + 1) + layers
        prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if has_attention else 1}.conv"
    found = {}
    for name, _ in network.named_modules():
        prefix = next((known for known in prefixes if name == known or name.startswith(f"{known}.")), None)
        if prefix is None:
            continue
        rest = name.removeprefix(prefix).removeprefix(".")
        if "resnets" in prefix:
            rest = _RESNET.get(rest, rest)
        found[name] = f"{prefixes[prefix]}.{rest}" if rest else prefixes[prefix]
    return found


def _flux(network: nn.Module) -> Iterator[tuple[str, Target]]:
    config: Any = network.config
    yield from _simple(
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("txt_in", "context_embedder"),
        ("img_in", "x_embedder"),
        ("final_layer.linear", "proj_out"),
    )
    yield "final_layer.adaLN_modulation.1", Target(("norm_out.linear",), swapped=True)
    for layer in range(config.num_layers):
        ours, theirs = f"transformer_blocks.{layer}", f"double_blocks.{layer}"
        yield f"{theirs}.img_attn.qkv", Target(tuple(f"{ours}.attn.to_{x}" for x in "qkv"))
        yield f"{theirs}.txt_attn.qkv", Target(tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv"))
        yield from _simple(
            (f"{theirs}.img_mod.lin", f"{ours}.norm1.linear"),
            (f"{theirs}.txt_mod.lin", f"{ours}.norm1_context.linear"),
            (f"{theirs}.img_attn.norm.query_norm", f"{ours}.attn.norm_q"),
            (f"{theirs}.img_attn.norm.key_norm", f"{ours}.attn.norm_k"),
            (f"{theirs}.txt_attn.norm.query_norm", f"{ours}.attn.norm_added_q"),
            (f"{theirs}.txt_attn.norm.key_norm", f"{ours}.attn.norm_added_k"),
            (f"{theirs}.img_attn.proj", f"{ours}.attn.to_out.0"),
            (f"{theirs}.txt_attn.proj", f"{ours}.attn.to_add_out"),
            (f"{theirs}.img_mlp.0", f"{ours}.ff.net.0.proj"),
            (f"{theirs}.img_mlp.2", f"{ours}.ff.net.2"),
            (f"{theirs}.txt_mlp.0", f"{ours}.ff_context.net.0.proj"),
            (f"{theirs}.txt_mlp.2", f"{ours}.ff_context.net.2"),
        )
    for layer in range(config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{layer}", f"single_blocks.{layer}"
        yield f"{theirs}.linear1", Target((*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp"))
        yield from _simple(
            (f"{theirs}.linear2", f"{ours}.proj_out"),
            (f"{theirs}.modulation.lin", f"{ours}.norm.linear"),
            (f"{theirs}.norm.query_norm", f"{ours}.attn.norm_q"),
            (f"{theirs}.norm.key_norm", f"{ours}.attn.norm_k"),
        )
    # XLabs names the attention's adapters as processors of the block
    for layer in range(config.num_layers):
        for number, stream in (("1", "img"), ("2", "txt")):
            block = f"transformer_blocks.{layer}.attn"
            three = [f"{block}.to_{x}" if stream == "img" else f"{block}.add_{x}_proj" for x in "qkv"]
            yield f"double_blocks.{layer}.processor.qkv_lora{number}", Target(tuple(three))
            out = f"{block}.to_out.0" if stream == "img" else f"{block}.to_add_out"
            yield f"double_blocks.{layer}.processor.proj_lora{number}", Target((out,))
    for layer in range(config.num_single_layers):
        block = f"single_transformer_blocks.{layer}"
        yield f"single_blocks.{layer}.processor.qkv_lora", Target(tuple(f"{block}.attn.to_{x}" for x in "qkv"))
        yield f"single_blocks.{layer}.processor.proj_lora", Target((f"{block}.proj_out",))


def _chroma(network: nn.Module) -> Iterator[tuple[str, Target]]:
    for name, target in _flux(network):
        if all(_has(network, module) for module in target.modules):
            yield name, target
    config: Any = network.config
    for name in ("in_proj", "out_proj"):
        yield f"distilled_guidance_layer.{name}", Target((f"distilled_guidance_layer.{name}",))
    for layer in range(config.approximator_layers):
        block = f"distilled_guidance_layer.layers.{layer}"
        yield from _simple((f"{block}.in_layer", f"{block}.linear_1"), (f"{block}.out_layer", f"{block}.linear_2"))
        yield f"distilled_guidance_layer.norms.{layer}", Target((f"distilled_guidance_layer.norms.{layer}",))


def _sd3(network: nn.Module) -> Iterator[tuple[str, Target]]:
    config: Any = network.config
    yield from _simple(
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        ("context_embedder", "context_embedder"),
        ("final_layer.linear", "proj_out"),
    )
    yield "final_layer.adaLN_modulation.1", Target(("norm_out.linear",), swapped=True)
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        ours = f"transformer_blocks.{layer}"
        image, text = f"joint_blocks.{layer}.x_block", f"joint_blocks.{layer}.context_block"
        yield f"{image}.attn.qkv", Target(tuple(f"{ours}.attn.to_{x}" for x in "qkv"))
        yield f"{text}.attn.qkv", Target(tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv"))
        yield f"{text}.adaLN_modulation.1", Target((f"{ours}.norm1_context.linear",), swapped=last)
        yield from _simple(
            (f"{image}.adaLN_modulation.1", f"{ours}.norm1.linear"),
            (f"{image}.attn.ln_q", f"{ours}.attn.norm_q"),
            (f"{image}.attn.ln_k", f"{ours}.attn.norm_k"),
            (f"{text}.attn.ln_q", f"{ours}.attn.norm_added_q"),
            (f"{text}.attn.ln_k", f"{ours}.attn.norm_added_k"),
            (f"{image}.attn.proj", f"{ours}.attn.to_out.0"),
            (f"{image}.mlp.fc1", f"{ours}.ff.net.0.proj"),
            (f"{image}.mlp.fc2", f"{ours}.ff.net.2"),
        )
        if layer in (config.dual_attention_layers or ()):
            yield f"{image}.attn2.qkv", Target(tuple(f"{ours}.attn2.to_{x}" for x in "qkv"))
            yield from _simple(
                (f"{image}.attn2.proj", f"{ours}.attn2.to_out.0"),
                (f"{image}.attn2.ln_q", f"{ours}.attn2.norm_q"),
                (f"{image}.attn2.ln_k", f"{ours}.attn2.norm_k"),
            )
        if not last:
            yield from _simple(
                (f"{text}.attn.proj", f"{ours}.attn.to_add_out"),
                (f"{text}.mlp.fc1", f"{ours}.ff_context.net.0.proj"),
                (f"{text}.mlp.fc2", f"{ours}.ff_context.net.2"),
            )


def _open_clip(network: nn.Module) -> Iterator[tuple[str, Target]]:
    nested = "text_model." if _has(network, "text_model") else ""
    config: Any = network.config
    yield from _simple(("ln_final", f"{nested}final_layer_norm"))
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"{nested}encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        yield f"{theirs}.attn.in_proj", Target(tuple(f"{ours}.self_attn.{x}_proj" for x in "qkv"))
        yield from _simple(
            (f"{theirs}.attn.out_proj", f"{ours}.self_attn.out_proj"),
            (f"{theirs}.ln_1", f"{ours}.layer_norm1"),
            (f"{theirs}.ln_2", f"{ours}.layer_norm2"),
            (f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1"),
            (f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"),
        )


def _simple(*pairs: tuple[str, str]) -> Iterator[tuple[str, Target]]:
    for theirs, ours in pairs:
        yield theirs, Target((ours,))


def _has(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


_ORIGINALS = {
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "SD3Transformer2DModel": _sd3,
    "CLIPTextModel": _open_clip,
    "CLIPTextModelWithProjection": _open_clip,
}
# diffusers' attention processors of old: to_q_lora is the adapter of to_q, and CLIP's have other names than UNet's
_OLD_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def module_targets(network: nn.Module) -> dict[str, Target]:
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
    if type(network).__name__ == "UNet2DConditionModel":
        for ours, theirs in original_unet_names(network).items():
            if ours in found:
                found.setdefault(theirs, Target((ours,)))
    elif originals := _ORIGINALS.get(type(network).__name__):
        for theirs, target in originals(network):
            if all(_has(network, module) for module in target.modules):
                found.setdefault(theirs, target)
    return found


def flat_targets(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same by names with underscores for dots, as kohya's files have them."""
    return {name.replace(".", "_"): target for name, target in targets.items()}
