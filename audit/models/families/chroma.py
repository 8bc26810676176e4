"""Chroma."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.models.families.base import Condition
from audit.models.families.flux import Patched, original_names, pack, positions, unpack
from audit.models.families.identify import Family
from audit.models.families.keys import Target, has_module, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\b(chroma)")


class Chroma(Patched):
    """Chroma: a descendant of FLUX.1 schnell with T5 alone, without distilled guidance."""

    name = Family.chroma
    precedence = 20
    called = _CALLED
    shaped_like = (Family.flux,)
    denoiser_class = "ChromaTransformer2DModel"
    pipeline = "ChromaPipeline"
    encoder_names: ClassVar[dict[str, str]] = {
        "te1": "text_encoder", "te2": "text_encoder", "te3": "text_encoder",
    }  # fmt: skip

    encoder_prefixes = (("text_encoders.t5xxl.",),)

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its own part; an adapter's names are Flux', and Radiance, which predicts pixels, has the part too."""
        told = any("distilled_guidance_layer." in name for name in tensors)
        return self.name if told and not any("nerf_" in name for name in tensors) else None

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Flux' names, and those of its own part."""
        for name, target in original_names(network):
            if all(has_module(network, module) for module in target.modules):
                yield name, target
        config: Any = network.config
        for name in ("in_proj", "out_proj"):
            yield f"distilled_guidance_layer.{name}", Target((f"distilled_guidance_layer.{name}",))
        for layer in range(config.approximator_layers):
            block = f"distilled_guidance_layer.layers.{layer}"
            yield from simple((f"{block}.in_layer", f"{block}.linear_1"), (f"{block}.out_layer", f"{block}.linear_2"))
            yield f"distilled_guidance_layer.norms.{layer}", Target((f"distilled_guidance_layer.norms.{layer}",))

    def settle(self, pipeline: Any) -> None:
        """Keep the guidance of 0 where the networks are."""
        embedding = pipeline.transformer.time_text_embed
        embedding.guidance_proj = no_guidance(embedding.guidance_proj)

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        found = pipeline.encode_prompt(list(captions), device=device, do_classifier_free_guidance=False)
        return Condition(found[0], mask=found[2])

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        import torch

        states, mask = condition.states, condition.mask
        if mask is not None:
            # every image patch is seen; of the caption, its words and one padding token
            seen = torch.ones(len(mask), latents.shape[2] * latents.shape[3] // 4, dtype=mask.dtype, device=mask.device)
            mask = torch.cat([mask, seen], dim=1).to(latents.dtype)
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, dtype=states.dtype, device=states.device),
            img_ids=positions(latents),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpack(patches, *latents.shape[2:])


def no_guidance(projection: Any) -> Any:
    """The projection of a guidance of 0, kept: diffusers makes it on the host and moves it at every evaluation."""
    import torch

    class NoGuidance(torch.nn.Module):
        value: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", projection(torch.tensor([0])), persistent=False)

        def forward(self, guidance: torch.Tensor) -> torch.Tensor:
            """[N, channels] for the zeros [N] that diffusers passes."""
            return self.value.expand(len(guidance), -1)

    return NoGuidance()


FAMILY = Chroma()
