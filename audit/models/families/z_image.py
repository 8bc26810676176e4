"""Z-Image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, TextShape
from audit.models.families.chat import Chatting, of_their_lengths
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\bz[- ]?image")
_OTHERS = re.compile(r"omni|edit|control|layered|inpaint")
_WIDTH = 3840
# a single stream of blocks with a refiner of the noise: Lumina 2 has both too, in another width
_OWN = re.compile(
    r"(?:^|[._])(?:noise_refiner|context_refiner|layers)[._]\d+[._](?:attention|feed_forward|adaLN_modulation)[._]"
)
_SIGLIP = re.compile(r"(?:^|[._])siglip_(?:embedder|refiner|pad_token)")
_LAYER = re.compile(r"(?:^|[._])layers[._](\d+)[._]attention[._]to[._]")
_LAYERS = 30
TURBO_SHIFT = 3.0  # of Turbo's noise schedule; base has 6


class ZImage(Chatting):
    """Z-Image (arXiv 2511.22699): Qwen3's states and patches in one sequence. Turbo is distilled to few steps."""

    name = Family.z_image
    precedence = 24
    called = _CALLED
    pipeline = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    denoiser = "transformer"
    longest_caption = 512
    flow = True
    own_sigmas = True
    half_name = "bfloat16"

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its blocks and their width; Lumina 2's have another."""
        if any(_SIGLIP.search(name) for name in tensors):
            return None
        sizes = {
            size for name, info in tensors.items() if _OWN.search(name) and len(info.shape) == 2 for size in info.shape
        }
        layers = {int(match[1]) for name in tensors if (match := _LAYER.search(name))}
        told = _WIDTH in sizes or max(layers, default=0) == _LAYERS - 1  # LoKr, LoHa and OFT show no widths
        return self.name if told and any(_OWN.search(name) for name in tensors) else None

    def told_by_name(self, name: str) -> str | None:
        """Omni, edit and control models are others."""
        return None if _OTHERS.search(name) else super().told_by_name(name)

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Tongyi's names."""
        yield from simple(
            ("x_embedder", "all_x_embedder.2-1"),
            ("final_layer.linear", "all_final_layer.2-1.linear"),
            ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
        )
        config: Any = network.config
        for kind in ("layers", "noise_refiner", "context_refiner"):
            for layer in range(config.n_layers if kind == "layers" else config.n_refiner_layers):
                block = f"{kind}.{layer}.attention"
                yield f"{block}.qkv", Target(tuple(f"{block}.to_{x}" for x in "qkv"))
                yield from simple(
                    (f"{block}.out", f"{block}.to_out.0"),
                    (f"{block}.q_norm", f"{block}.norm_q"),
                    (f"{block}.k_norm", f"{block}.norm_k"),
                )

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse what takes pictures too."""
        if pipeline.transformer.config.siglip_feat_dim is not None:
            raise CheckpointError(f"{name} takes pictures beside the caption: give the text-to-image model, Z-Image")

    def warnings(self, pipeline: Any) -> list[str]:
        """Of Turbo, which its scheduler tells: base is sampled with a shift of 6, Turbo with one of 3."""
        if pipeline.scheduler.config.get("shift") != TURBO_SHIFT:
            return []
        return [
            "the base seems to be Z-Image Turbo, distilled to few steps: its predictions are not those of a flow, on "
            "which guidance rests. Adapters of Turbo are trained on it with a helper that undoes the distillation, or "
            "on Z-Image base: audit against base where that was used"
        ]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: without padding."""
        limit = self.limit(pipeline)
        found, _ = pipeline.encode_prompt(
            list(captions), device, do_classifier_free_guidance=False, max_sequence_length=limit
        )
        return of_their_lengths(found, limit)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser, which answers x_0 - eps and counts time from noise to picture."""
        import torch

        time = (1000 - timestep.expand(len(latents))) / 1000
        found = pipeline.transformer(list(latents[:, :, None]), time, condition.each(), return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """Captions of their own lengths."""
        return TextShape(tokens, denoiser.cap_feat_dim, length=tokens)

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one image's latents; 1024 pixels by default."""
        side = (resolution or 1024) // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, side, side


FAMILY = ZImage()
