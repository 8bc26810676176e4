"""Wan 2.1, text to video."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, TextShape
from audit.models.families.frames import OneFrame
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(
    r"\bwan[- ]?(?:video[- ])?v?2[.-]?1(?!\d)|\bwan[- ]?(?:ai[-/ ])?(?:video[- ])?(?:1[.-]3b|14b)[- ]t2v|^wan[- ]t2v"
)
_OTHERS = re.compile(r"i2v|flf2v|s2v|vace|animate|control|inpaint|camera|\bfun\b|recam|phantom|multitalk|humo|mocha")
_WIDTHS, _LAST = frozenset({1536, 5120}), frozenset({29, 39})  # of 1.3B and 14B
_SMALLER = 480  # pixels: the lesser of the two sizes that Wan is trained on
_PREFIX = (
    r"^(?:base_model\.model\.)?"
    r"(?:(?:lora|lycoris|oft)_(?:unet_|transformer_)?|(?:model\.)?diffusion_model\.|transformer\.)?"
)
# Cosmos 2 has self_attn.q_proj in blocks of this name
_BLOCK = re.compile(
    _PREFIX + r"blocks[._](\d+)[._](?:(?:self|cross)_attn[._][qkvo]\.|attn[12][._]to_(?:[qkv]|out[._]0)\.|"
    r"ffn[._](?:[02]|net[._](?:0[._]proj|2))\.)"
)
# Image to video, VACE, Animate, speech to video, control and camera models, SkyReels, AnyFlow, Helios
_NOT_TEXT = re.compile(
    r"k_img|v_img|add_[kv]_proj|img_emb|image_embedder|vace_|motion_encoder|face_(?:adapter|encoder)|pose_patch|"
    r"audio|trainable_cond|frame_packer|control_adapter|ref_conv|fps_(?:embedding|projection)|delta_embedder|"
    r"patch_(?:short|mid|long)"
)
_FIRST = re.compile(_PREFIX + r"patch_embedding\.weight$")
# A file for an expert of Wan 2.2, or from pictures, by its name: its layers are those of Wan 2.1 T2V
_EXPERT = re.compile(r"(?:high|low)[-_ ]?noise|wan[-_ ]?(?:video[-_ ])?2[._]?2|i2v", re.IGNORECASE)


class Wan(OneFrame):
    """Wan 2.1 text to video, 1.3B and 14B (arXiv 2503.20314): UMT5's states, and one frame of a video."""

    name = Family.wan
    precedence = 22
    called = _CALLED
    pipeline = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    denoiser = "transformer"
    longest_caption = 512
    flow = True
    half_name = "bfloat16"

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Alibaba's names."""
        condition = "condition_embedder"
        yield from simple(
            ("time_embedding.0", f"{condition}.time_embedder.linear_1"),
            ("time_embedding.2", f"{condition}.time_embedder.linear_2"),
            ("text_embedding.0", f"{condition}.text_embedder.linear_1"),
            ("text_embedding.2", f"{condition}.text_embedder.linear_2"),
            ("time_projection.1", f"{condition}.time_proj"),
            ("head.head", "proj_out"),
        )
        for layer in range(network.config.num_layers):
            block = f"blocks.{layer}"
            for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
                for letter, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                    yield f"{block}.{theirs}.{letter}", Target((f"{block}.{ours}.{name}",))
                for name in ("norm_q", "norm_k"):
                    yield f"{block}.{theirs}.{name}", Target((f"{block}.{ours}.{name}",))
            yield from simple(
                (f"{block}.ffn.0", f"{block}.ffn.net.0.proj"),
                (f"{block}.ffn.2", f"{block}.ffn.net.2"),
                (f"{block}.norm3", f"{block}.norm2"),
            )

    def own_parameter(self, name: str) -> str:
        """What shifts and scales, of a block and at the end."""
        if name == "head.modulation":
            return "scale_shift_table"
        return re.sub(r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table", name)

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse what takes pictures, videos or sound too, two experts, and a time for every place."""
        if pipeline.config.boundary_ratio is not None or pipeline.transformer_2 is not None:
            raise CheckpointError(
                f"{name} is Wan 2.2, whose two experts share the noise levels: it cannot be audited, and neither can "
                "its high-noise and low-noise files; Wan 2.1 T2V can"
            )
        config, channels = pipeline.transformer.config, self.latent_channels(pipeline.vae)
        if pipeline.config.expand_timesteps or pipeline.vae.config.patch_size is not None:
            raise CheckpointError(
                f"{name} is Wan 2.2 TI2V-5B, which has a time for every place of a video: it cannot be audited; "
                "T2V models can"
            )
        if config.in_channels != channels or config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise CheckpointError(
                f"{name}: its transformer takes {config.in_channels} channels, its VAE has {channels}, or it takes "
                "pictures beside the caption: image-to-video, control and other variants cannot be audited; give the "
                "text-to-video model"
            )

    def doubts(self, name: str) -> list[str]:
        """Of files for Wan 2.2 or image to video."""
        if not _EXPERT.search(name):
            return []
        return [
            "its name says that it is for an expert of Wan 2.2, or for image to video, whose layers are those of Wan "
            "2.1 T2V: an audit on another base than the true one finds less, and finding nothing then says little"
        ]

    def warnings(self, pipeline: Any) -> list[str]:
        """That a video is looked at by its first frame."""
        return [
            "the base draws videos: one frame is sampled for each image, and what was trained on videos is judged by "
            "single frames against pictures, or frames of videos, of the references"
        ]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: padded with zeros."""
        states, _ = pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.caption_tokens(pipeline),
            device=device,
        )
        return Condition(states)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        found: torch.Tensor = pipeline.transformer(
            hidden_states=latents[:, :, None],
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=condition.states,
            return_dict=False,
        )[0]
        return found[:, :, 0]

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """UMT5's states alone."""
        return TextShape(tokens, denoiser.text_dim)

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one frame's latents; 480 pixels by default."""
        side = (resolution or _SMALLER) // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, side, side

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its blocks, and a width of its models or the last block. Image to video's blocks are the same."""
        if any(_NOT_TEXT.search(name) for name in tensors):
            return None
        if any(_FIRST.match(name) and info.shape[1:2] != (16,) for name, info in tensors.items()):
            return None
        blocks = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
        if not blocks:
            return None
        sizes = {size for info in tensors.values() if len(info.shape) == 2 for size in info.shape}
        if 3072 in sizes and not sizes & _WIDTHS:  # TI2V-5B
            return None
        return self.name if sizes & _WIDTHS or max(blocks) in _LAST else None

    def told_by_name(self, name: str) -> str | None:
        """Image to video, control and speech models are others."""
        return None if _OTHERS.search(name) else super().told_by_name(name)


FAMILY = Wan()
