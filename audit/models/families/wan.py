"""Wan 2.1 and 2.2, text to video: one network, two experts, and the small one with a VAE of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, TextShape
from audit.models.families.frames import Frames
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(
    r"\bwan[- ]?(?:video[- ])?v?2[.-]?1(?!\d)|\bwan[- ]?(?:ai[-/ ])?(?:video[- ])?(?:1[.-]3b|14b)[- ]t2v|^wan[- ]t2v|"
    r"\bwan[- ]?(?:video[- ])?v?2[.-]?2[- ](?:t2v\b|a?14b\b)"
)
_CALLED_5B = re.compile(r"\bwan[- ]?(?:video[- ])?v?2[.-]?2[- ](?:ti2v\b|5b\b)")
_OTHERS = re.compile(
    r"(?<!t)i2v|flf2v|s2v|vace|animate|control|inpaint|camera|\bfun\b|recam|phantom|multitalk|humo|mocha"
)
_WIDTHS, _LAST = frozenset({1536, 5120}), frozenset({29, 39})  # of 1.3B and 14B
_WIDTH_5B = 3072
_SMALLER, _SMALLER_5B = 480, 704  # pixels: the lesser of the sizes that Wan, and TI2V-5B, are trained on
_PREFIX = (
    r"^(?:base_model\.model\.)?"
    r"(?:(?:lora|lycoris|oft)_(?:unet_|transformer_)?|(?:model\.)?diffusion_model\.|transformer\.)?"
    r"(?:transformer_[12][._])?"
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
_EXPERT = re.compile(r"(?:high|low)[-_ ]?noise|wan[-_ ]?(?:video[-_ ])?2[._]?2", re.IGNORECASE)
_PICTURES = re.compile(r"(?<!t)i2v", re.IGNORECASE)
LEAST = 10  # thousandths of the schedule that each of two experts has, so that membership can ask it


class Wan(Frames):
    """Wan text to video (arXiv 2503.20314): UMT5's states, and one frame of a video, or a few.

    2.1 1.3B and 14B; 2.2 A14B, whose ``transformer`` is asked at timesteps from ``boundary_ratio`` of the schedule on
    and ``transformer_2`` below; 2.2 TI2V-5B, which takes a time for every place of a video: from text alone they are
    all the same one.
    """

    name = Family.wan
    precedence = 22
    called = _CALLED
    pipeline = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    denoiser = "transformer"
    further_denoisers = ("transformer_2",)
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

    def boundary(self, pipeline: Any) -> float | None:
        """diffusers' boundary_ratio, of a base with two experts."""
        second = getattr(pipeline, "transformer_2", None)
        return None if second is None else float(pipeline.config.boundary_ratio)

    def boundary_in(self, index: Mapping[str, Any]) -> float | None:
        """Raises CheckpointError where there are two experts and no boundary between them."""
        if index.get("transformer_2") in (None, [None, None]):
            return None
        found = index.get("boundary_ratio")
        if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 < found < 1:
            raise CheckpointError(
                "its model_index.json has two experts and no boundary_ratio from 0 to 1: it is damaged"
            )
        return float(found)

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse what takes pictures, videos or sound too, and experts that do not fit each other."""
        ratio = pipeline.config.boundary_ratio
        if pipeline.transformer is None or (ratio is None) != (pipeline.transformer_2 is None):
            raise CheckpointError(
                f"{name}: of its two experts one is missing, or it does not say at which noise levels each is asked "
                "(boundary_ratio): give the whole model"
            )
        if ratio is not None:
            _check_boundary(ratio, name)
        channels = self.latent_channels(pipeline.vae)
        for network in (pipeline.transformer, pipeline.transformer_2):
            config = None if network is None else network.config
            if config is not None and (
                config.in_channels != channels or config.image_dim is not None or config.added_kv_proj_dim is not None
            ):
                raise CheckpointError(
                    f"{name}: its transformer takes {config.in_channels} channels, its VAE has {channels}, or it takes "
                    "pictures beside the caption: image-to-video, control and other variants cannot be audited; give "
                    "the text-to-video model"
                )

    def variant_of(self, pipeline: Any) -> str:
        """TI2V-5B by its width."""
        config = pipeline.transformer.config
        return Family.wan_5b if config.num_attention_heads * config.attention_head_dim == _WIDTH_5B else self.name

    def doubts(self, pipeline: Any, name: str) -> list[str]:
        """Of files for Wan 2.2 where the base is none, or for image to video."""
        whose = "image to video" if _PICTURES.search(name) else None
        if whose is None and _EXPERT.search(name) and self.boundary(pipeline) is None:
            whose = "an expert of Wan 2.2" if self.variant_of(pipeline) == self.name else None
        if whose is None:
            return []
        return [
            f"its name says that it is for {whose}, whose layers are those of Wan 2.1 T2V: an audit on another base "
            "than the true one finds less, and finding nothing then says little"
        ]

    def warnings(self, pipeline: Any) -> list[str]:
        """That a video is looked at by single frames."""
        return [
            "the base draws videos: one frame of each is looked at, and what was trained on videos is judged by single "
            "frames against pictures, or frames of videos, of the references"
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
        """One evaluation of the denoiser, or of the expert that the timestep belongs to."""
        video = latents if latents.ndim == 5 else latents[:, :, None]
        network, boundary = pipeline.transformer, self.boundary(pipeline)
        if boundary is not None:
            steps = pipeline.scheduler.config.num_train_timesteps
            network = network if float(timestep) >= boundary * steps else pipeline.transformer_2
            timestep = latents.new_full((), float(timestep), dtype=timestep.dtype)
        found: torch.Tensor = network(
            hidden_states=video,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=condition.states,
            return_dict=False,
        )[0]
        return found if latents.ndim == 5 else found[:, :, 0]

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """UMT5's states alone."""
        return TextShape(tokens, denoiser.text_dim)

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one frame's latents; 480 pixels by default, of TI2V-5B 704."""
        own = _SMALLER_5B if pipeline.vae.config.patch_size is not None else _SMALLER
        side = (resolution or own) // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, side, side

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its blocks, and a width of its models or the last block. Image to video's blocks are the same."""
        if any(_NOT_TEXT.search(name) for name in tensors):
            return None
        channels = {info.shape[1:2] for name, info in tensors.items() if _FIRST.match(name)}
        if channels - {(16,), (48,)}:
            return None
        blocks = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
        if not blocks:
            return None
        sizes = {size for info in tensors.values() if len(info.shape) == 2 for size in info.shape}
        if _WIDTH_5B in sizes and not sizes & _WIDTHS:
            return Family.wan_5b if channels <= {(48,)} else None
        if channels - {(16,)}:
            return None
        return self.name if sizes & _WIDTHS or max(blocks) in _LAST else None

    def told_by_name(self, name: str) -> str | None:
        """Image to video, control and speech models are others."""
        if _OTHERS.search(name):
            return None
        return Family.wan_5b if _CALLED_5B.search(name) else super().told_by_name(name)


def _check_boundary(ratio: float, name: str) -> None:
    """Raise CheckpointError where one of the experts has next to none of the noise levels that membership asks at."""
    from audit.evidence.levels import edge
    from audit.evidence.membership import SCALE

    if not LEAST <= edge(ratio) <= SCALE - LEAST:
        raise CheckpointError(
            f"{name}: its experts part at {ratio} of the schedule, so that one of them has next to no noise levels at "
            "which a picture can be told: it cannot be audited"
        )


FAMILY = Wan()
