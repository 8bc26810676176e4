"""Qwen-Image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, ModelFamily, TextShape
from audit.models.families.chat import Chatting, of_their_lengths
from audit.models.families.flux import Patched, pack, unpack
from audit.models.families.identify import Family

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\bqwen[- ]?image(?![- ]?2(?:\.\d|\b))|^qwen$")
_OTHERS = re.compile(r"edit|control|layered|inpaint|vlo")
_WIDTH, _LAST = 3072, 59
_BLOCK = re.compile(r"(?<!single)(?<!joint)(?:^|[._])transformer_blocks[._](\d+)[._]")
# a stream's MLP and modulation by names of their own; JoyImage and Qwen-Image 2.1 have other layers in them
_OWN = re.compile(r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp[._]net[._]|mod[._]1(?=[._]))")
_JOINT = re.compile(r"transformer_blocks[._]\d+[._]attn[._](?:to_|add_)")
_SINGLE = re.compile(r"single_(?:transformer_)?blocks|mode_blocks")


class OneFrame(ModelFamily):
    """A family with Qwen-Image's VAE, which is one of videos: a picture is a frame of it."""

    def latent_channels(self, vae: Any) -> int:
        """Channels of the VAE's latents."""
        found: int = vae.config.z_dim
        return found

    def to_pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """The one frame."""
        return super().to_pixels(vae, latents[:, :, None])[:, :, 0]

    def to_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Of one frame."""
        return super().to_latents(vae, pixels[:, :, None])[:, :, 0]


class QwenImage(Chatting, OneFrame, Patched):
    """Qwen-Image (arXiv 2508.02324): the states of Qwen2.5-VL, and a VAE of videos, of which it takes one frame."""

    name = Family.qwen_image
    precedence = 23
    called = _CALLED
    pipeline = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its own names, or the last of its sixty blocks, in its width. Edit models have the same."""
        if any(_SINGLE.search(name) for name in tensors):
            return None
        blocks = {int(match[1]) for name in tensors if (match := _BLOCK.search(name))}
        sizes = {size for info in tensors.values() if len(info.shape) == 2 for size in info.shape}
        last = max(blocks, default=0) == _LAST
        named = any(_OWN.search(name) for name in tensors)
        joint = last and any(_JOINT.search(name) for name in tensors)
        return self.name if (named and (last or _WIDTH in sizes)) or (joint and _WIDTH in sizes) else None

    def told_by_name(self, name: str) -> str | None:
        """Edit, layered and control models are others."""
        return None if _OTHERS.search(name) else super().told_by_name(name)

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and what takes pictures too."""
        super().check(pipeline, name)
        config = pipeline.transformer.config
        if config.zero_cond_t or config.use_additional_t_cond or config.use_layer3d_rope:
            raise CheckpointError(f"{name} edits or layers pictures: give the text-to-image model, Qwen-Image")

    def settle(self, pipeline: Any) -> None:
        """Let copies of the transformer share its tables of positions: diffusers keeps each for good."""
        super().settle(pipeline)
        table = pipeline.transformer.pos_embed
        table.__deepcopy__ = lambda memo: table

    def messages(self, pipeline: Any, caption: str) -> list[dict[str, Any]]:
        """Below the pipeline's instruction, as its template has it."""
        system = pipeline.prompt_template_encode.split("system\n", 1)[1].split("<|im_end|>", 1)[0]
        return [{"role": "system", "content": system}, {"role": "user", "content": caption}]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: the instruction's states are left out."""
        limit = self.limit(pipeline)
        states, mask = pipeline.encode_prompt(list(captions), device, max_sequence_length=limit)
        lengths = [states.shape[1]] * len(states) if mask is None else mask.sum(1).tolist()
        return of_their_lengths([one[:length] for one, length in zip(states, lengths, strict=True)], limit)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        import torch

        assert condition.lengths is not None
        longest = max(condition.lengths)
        mask = None
        if min(condition.lengths) < longest:
            mask = torch.ones(len(latents), longest, dtype=torch.bool, device=latents.device)
            for row, length in enumerate(condition.lengths):
                mask[row, length:] = False
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), embedded, dtype=torch.float32, device=latents.device)
        height, width = latents.shape[2:]
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=condition.states[:, :longest],
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(patches, height, width)

    def guided(self, empty: torch.Tensor, caption: torch.Tensor, w: float) -> torch.Tensor:
        """Each patch keeps the norm that it has with the caption."""
        import torch

        ends = pack(caption)
        found = torch.lerp(pack(empty), ends, w)
        found = found * (torch.norm(ends, dim=-1, keepdim=True) / torch.norm(found, dim=-1, keepdim=True))
        return unpack(found, *caption.shape[2:])

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """Captions of their own lengths."""
        return TextShape(tokens, denoiser.joint_attention_dim, length=tokens)

    def _tokens(self, pipeline: Any, caption: str) -> int:
        return super()._tokens(pipeline, caption) - int(pipeline.prompt_template_encode_start_idx)


FAMILY = QwenImage()
