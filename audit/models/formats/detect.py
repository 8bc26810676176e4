"""Which format a file has, by the names of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from audit.errors import CheckpointError
from audit.models.families.identify import family_of_shapes
from audit.models.families.unaudited import by_tensors
from audit.models.formats.names import AdapterNames, Algorithm, Naming, read_names, shown
from audit.models.safetensors_header import Header, TensorInfo


class Format(StrEnum):
    """What a checkpoint is, told by the names of its tensors."""

    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"
    lora_processor = "lora-processor"
    lora_xlabs = "lora-xlabs"
    lycoris = "lycoris"
    embedding = "embedding"
    unet = "unet"
    transformer = "transformer"
    ldm = "ldm"
    diffusers_folder = "diffusers-folder"

    @property
    def is_adapter(self) -> bool:
        """Whether it is to be added to the base, not a network of its own."""
        return self not in (Format.unet, Format.transformer, Format.ldm, Format.diffusers_folder)


_ORIGINAL = (
    "model.diffusion_model.", "double_blocks.0.img_attn.qkv.", "joint_blocks.0.x_block.attn.qkv.",
    "input_blocks.0.0.weight", "blocks.0.self_attn.q.",
    "blocks.0.adaln_modulation_", "net.blocks.0.", "net.llm_adapter.",
    "txtfusion.projector.", "text_fusion.projector.", "layers.0.self_attention.to_q.",
    "double_stream_blocks.0.block.",
    "layers.0.attention.qkv.", "layers.0.attention.to_q.",
)  # fmt: skip
_BY_NAMING = {
    Naming.kohya: Format.lora_kohya, Naming.peft: Format.lora_peft, Naming.processor: Format.lora_processor,
    Naming.xlabs: Format.lora_xlabs,
}  # fmt: skip


def detect_format(path: Path, header: Header) -> tuple[Format, str]:
    """The format and the name of its part. Raises CheckpointError for one that cannot be audited."""
    found = detect(header.tensors)
    if found is not None:
        return found
    other = by_tensors(header.tensors) if family_of_shapes(header.tensors) is None else None
    some = shown(header.tensors, 3)
    if other:
        raise CheckpointError(f"{path}: {other.sentence}, and its tensors are named as those of it are ({some})")
    raise CheckpointError(
        f"{path} is neither an adapter nor the weights of a known model (tensors such as {some}): "
        "if it is for another kind of model, it cannot be audited"
    )


def detect(tensors: Mapping[str, TensorInfo]) -> tuple[Format, str] | None:
    """The format and the name of the part that such tensors are; None for an unknown one."""
    names = read_names(tensors)
    if names.groups or names.embeddings:
        return format_of(names), "adapter"
    if any(name.startswith(_ORIGINAL) for name in tensors):
        return Format.ldm, "all"
    if {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= set(tensors):
        return Format.unet, "unet"
    if (
        any(name.startswith(("transformer_blocks.0.", "blocks.0.attn1.")) for name in tensors)
        and "proj_out.weight" in tensors
    ):
        return Format.transformer, "transformer"
    if names.incomplete is not None:  # it is refused when it is loaded, with the tensors that are of no use
        return _BY_NAMING[names.incomplete], "adapter"
    return (Format.lora_peft, "adapter") if len(names.adapters) > 1 else None


def format_of(names: AdapterNames) -> Format:
    """The format of an adapter: LyCORIS where it is more than LoRA, else by whose names it has."""
    if not names.groups:
        return Format.embedding
    if any(group.algorithm is not Algorithm.lora and group.flat for group in names.groups):
        return Format.lycoris
    namings = {group.naming for group in names.groups}
    order = (Naming.xlabs, Naming.kohya, Naming.processor, Naming.peft)
    return _BY_NAMING[next(naming for naming in order if naming in namings)]
