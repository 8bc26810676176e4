"""What families with a UNet share: their denoiser, how files show it, and its names in the first code (LDM)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, ModelFamily, TextShape
from audit.models.families.identify import Family
from audit.models.families.keys import Target

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

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
_OTHERS = (
    r"temporal_transformer_block|time_stack|time_mixer|motion_modules|temp_attentions|temp_convs|"
    r"(?:^|[._])(?:class_embedding|controlnet_cond_embedding)[._]"
)
_VIDEO_OR_CLASS = re.compile(_OTHERS)
_OTHER_UNETS = re.compile(_OTHERS + r"|(?:^|[._])encoder_hid_proj[._]")
_PROJECTION = re.compile(r"(?:^|[._])encoder_hid_proj(?:\.lora[._](?:down|A)(?:\.\w+)?)?\.weight$")
_LABELS = re.compile(r"(?:^|[._])(?:label_emb[._]0[._]0|add_embedding[._]linear_1)(?:\.lora[._](?:down|A))?\.weight$")
_SDXL_LABELS, _SDXL_WIDTH = 2816, 2048  # pooled text and six sizes; unCLIP has its images
_KOLORS_LABELS, _KOLORS_WIDTH = 5632, 4096
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


class WithUNet(ModelFamily):
    """A family whose denoiser is diffusers' UNet2DConditionModel."""

    denoiser_class = "UNet2DConditionModel"

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """LDM's names."""
        for ours, theirs in original_unet_names(network).items():
            yield theirs, Target((ours,))

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and what is no base model."""
        taken, given = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        if taken != given:
            raise CheckpointError(
                f"{name}: its UNet takes {taken} channels, its latents have {given}: inpainting, depth and other "
                "variants cannot be audited; give the text-to-image model"
            )

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """By the width of cross attention; Stable Diffusion XL's sizes and crop stand beside the pooled vector."""
        pooled = None
        if denoiser.addition_embed_type == "text_time":
            pooled = denoiser.projection_class_embeddings_input_dim - 6 * denoiser.addition_time_embed_dim
        return TextShape(tokens, denoiser.cross_attention_dim, pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        return pipeline.unet(latents, timestep, encoder_hidden_states=condition.states, return_dict=False)[0]


def family_of_unet(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """The family of a file that changes a UNet, by the width of the text it takes; None where it is no known one."""
    widths = {info.shape[1] for name, info in tensors.items() if len(info.shape) >= 2 and _takes_text(name)}
    if len(widths) != 1 or any(_OTHER_UNETS.search(name) for name in tensors):
        return None
    found = family_of_dimensions(widths.pop())
    labels = {info.shape[1] for name, info in tensors.items() if _LABELS.search(name) and len(info.shape) == 2}
    fits = labels <= {_SDXL_LABELS} if found is Family.sdxl else not labels
    return found if fits else None


def family_of_kolors(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a UNet is Kolors': of Stable Diffusion XL's width, with the first layers of ChatGLM3's states."""
    if any(_VIDEO_OR_CLASS.search(name) for name in tensors):
        return False
    widths = {info.shape[1] for name, info in tensors.items() if len(info.shape) >= 2 and _takes_text(name)}
    if not widths <= {_SDXL_WIDTH}:
        return False
    two = {name: info.shape for name, info in tensors.items() if len(info.shape) == 2}
    labels = {shape[1] for name, shape in two.items() if _LABELS.search(name)}
    projected = {shape[1] for name, shape in two.items() if _PROJECTION.search(name)}
    if labels - {_KOLORS_LABELS} or projected - {_KOLORS_WIDTH}:
        return False
    return bool(labels) or bool(projected and widths)


def _takes_text(name: str) -> bool:
    """Whether a tensor takes the text's states: in the cross attention of a UNet's block, at its keys' inputs."""
    found = _KEYS.search(name)
    if found is None or not _INPUTS.match(name[found.end() :]):
        return False
    block = name[: found.start()]
    return bool(_FLAT_UNET.match(block) or (_LAST_BLOCK.search(block) and _WITHIN.search(block)))


def family_of_dimensions(cross_attention: int) -> Family | None:
    """The family of a UNet whose cross attention takes text states of this width."""
    return _CROSS_ATTENTION.get(cross_attention)


def original_unet_names(network: Any) -> dict[str, str]:
    """The LDM name of every module of a diffusers UNet2DConditionModel, by its diffusers name."""
    config: Any = network.config
    blocks = [network.get_submodule(f"up_blocks.{level}") for level in range(len(config.block_out_channels))]
    prefixes = _prefixes(config.layers_per_block, [hasattr(block, "attentions") for block in blocks])
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


def diffusers_unet_name(flat: str) -> str | None:
    """diffusers' name of a module that ``flat`` names as LDM does, both with underscores for dots; None for others.

    Of UNets with two layers a block, which all published ones have.
    """
    words = flat.split("_")
    for count in range(min(len(words), _LONGEST), 1, -1):
        start = "_".join(words[:count])
        if (ours := _OURS.get(start)) is not None:
            rest = "_".join(words[count:])
            rest = _RESNET_OURS.get(rest, rest) if "resnets" in ours else rest
            return f"{ours}_{rest}" if rest else ours
    return None


def _prefixes(layers: int, has_attention: Sequence[bool]) -> dict[str, str]:
    """How names start in LDM, by how they start in diffusers, of UNets with ``layers`` layers a block.

    ``has_attention``: whether the up block of each level has attention, behind which its upsampler comes.
    """
    levels = len(has_attention)
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
        last = level * (layers + 1) + layers
        prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.{1 + has_attention[level]}.conv"
    return prefixes


_OURS = {
    theirs.replace(".", "_"): ours.replace(".", "_")
    for attention in (False, True)
    for ours, theirs in _prefixes(2, [attention] * 4).items()
}
_LONGEST = max(start.count("_") + 1 for start in _OURS)
_RESNET_OURS = {theirs.replace(".", "_"): ours for ours, theirs in _RESNET.items()}
