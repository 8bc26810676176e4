"""ERNIE-Image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.models.families.base import Condition, TextShape
from audit.models.families.chat import of_their_lengths
from audit.models.families.flux import Patched
from audit.models.families.flux2 import of_patches
from audit.models.families.identify import Family

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\bernie(?:[- ]?image(?!\w)|$)")
_OTHERS = re.compile(r"edit|control|inpaint")
_WIDTH, _LAST = 4096, 35
_OWN = re.compile(
    r"(?:^|[._])layers[._](\d+)[._](?:self_attention[._](?:to_[qkv]|to_out[._]0)|mlp[._](?:gate_proj|up_proj|linear_fc2)|"
    r"adaLN_(?:sa|mlp)_ln)(?=[._])"
)
_EPS = 1e-5  # of the VAE's batch norm; its configuration says another, which the pipeline does not heed


class ErnieImage(Patched):
    """ERNIE-Image, base and Turbo: Ministral 3's states of the bare caption, the VAE of FLUX.2, one stream."""

    name = Family.ernie_image
    precedence = 22
    called = _CALLED
    pipeline = "ErnieImagePipeline"
    denoiser_class = "ErnieImageTransformer2DModel"
    longest_caption = 1024  # more than its pipeline's own rewriting makes; without a bound of ours it has none
    left_out: ClassVar[dict[str, Any]] = {"pe": None, "pe_tokenizer": None}  # what rewrites captions

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its blocks and their width, or the last of them, since LoKr, LoHa and OFT show no widths."""
        own = [(int(match[1]), info) for name, info in tensors.items() if (match := _OWN.search(name))]
        sizes = {size for _, info in own for size in info.shape}
        last = max((layer for layer, _ in own), default=0)
        return self.name if last <= _LAST and (_WIDTH in sizes or last == _LAST) else None

    def told_by_name(self, name: str) -> str | None:
        """Edit and control models are others."""
        return None if _OTHERS.search(name) else super().told_by_name(name)

    def settle(self, pipeline: Any) -> None:
        """Let the tokenizer cut captions where audits do."""
        pipeline.tokenizer.model_max_length = self.caption_tokens(pipeline)

    def warnings(self, pipeline: Any) -> list[str]:
        """Of Turbo, whose configuration is that of the base: only its name can tell."""
        if "turbo" not in str(pipeline.config.get("_name_or_path", "")).lower():
            return []
        return [
            "the base seems to be ERNIE-Image Turbo, distilled to few steps: its predictions are not those of a flow, "
            "on which guidance rests. Audit adapters that were trained on ERNIE-Image against that"
        ]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: without padding, and without rewriting them."""
        return of_their_lengths(pipeline.encode_prompt(list(captions), device), self.caption_tokens(pipeline))

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser, which takes patches of 2 x 2 as channels."""
        import torch

        assert condition.lengths is not None
        if latents.is_meta:
            _let_count(pipeline.transformer.pos_embed)
        lengths = torch.empty(len(latents), dtype=torch.long, device=latents.device)
        for row, length in enumerate(condition.lengths):
            lengths[row] = length
        found = pipeline.transformer(
            hidden_states=torch.nn.functional.pixel_unshuffle(latents, 2),
            timestep=timestep.expand(len(latents)).to(latents.dtype),
            text_bth=condition.states[:, : max(condition.lengths)],
            text_lens=lengths,
            return_dict=False,
        )[0]
        return torch.nn.functional.pixel_shuffle(found, 2)

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """Captions of their own lengths."""
        return TextShape(tokens, denoiser.text_in_dim, length=tokens)

    def latent_statistics(self, vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
        """Those of the VAE's batch norm, as of FLUX.2."""
        return of_patches(vae, latents, _EPS)

    def vae_scale_factor(self, pipeline: Any) -> int:
        """Its pipeline counts the pixels of a patch."""
        found: int = pipeline.vae_scale_factor // 2
        return found

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one image's latents; 1024 pixels by default."""
        side = (resolution or 1024) // self.vae_scale_factor(pipeline)
        return pipeline.transformer.config.in_channels // 4, side, side


def _let_count(embedding: Any) -> None:
    """Do without what diffusers puts around its angles, that autocast is off there: the meta device has no autocast."""
    import torch

    def forward(ids: torch.Tensor) -> torch.Tensor:
        angles = []
        for axis, size in enumerate(embedding.axes_dim):
            exponents = torch.arange(0, size, 2, dtype=torch.float32, device=ids.device) / size
            angles.append(torch.einsum("...n,d->...nd", ids[..., axis], 1.0 / (embedding.theta**exponents)).float())
        joined = torch.cat(angles, dim=-1).unsqueeze(2)
        return torch.stack([joined, joined], dim=-1).reshape(*joined.shape[:-1], -1)

    embedding.forward = forward


FAMILY = ErnieImage()
