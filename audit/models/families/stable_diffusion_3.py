"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.models.families.base import Condition, ModelFamily
from audit.models.families.flux import NOT_FLUX, SINGLE
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_START = r"(?:^|[._])"
_SD3_BLOCKS = re.compile(r"joint_blocks?[._]\d+[._](?:x_block|context_block)[._]")
_JOINT = re.compile(rf"{_START}transformer_blocks[._]\d+[._]attn[._](?:to_q|to_k|to_v|add_[qkv]_proj)[._]")
_SD3_WIDTHS = (1536, 2432)  # medium, large

_CALLED = re.compile(r"\b(sd[- ]?3|stable[- ]?diffusion[- ]?v?3)")


class StableDiffusion3(ModelFamily):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIP encoders and, where it is there, T5."""

    name = Family.sd3
    precedence = 50
    called = _CALLED
    denoiser_class = "SD3Transformer2DModel"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
    longest_caption = 256
    flow = True
    half_name = "bfloat16"  # T5 overflows in float16
    optional = ("text_encoder_3",)
    encoder_prefixes = (("text_encoders.clip_l.",), ("text_encoders.clip_g.",))
    left_out: ClassVar[dict[str, Any]] = {}

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its first code's blocks, else by the widths of its joint attention."""
        if any(_SD3_BLOCKS.search(name) for name in tensors):
            return self.name
        return _joint(tensors)

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Stability's names."""
        config: Any = network.config
        yield from simple(
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
            yield from simple(
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
                yield from simple(
                    (f"{image}.attn2.proj", f"{ours}.attn2.to_out.0"),
                    (f"{image}.attn2.ln_q", f"{ours}.attn2.norm_q"),
                    (f"{image}.attn2.ln_k", f"{ours}.attn2.norm_k"),
                )
            if not last:
                yield from simple(
                    (f"{text}.attn.proj", f"{ours}.attn.to_add_out"),
                    (f"{text}.mlp.fc1", f"{ours}.ff_context.net.0.proj"),
                    (f"{text}.mlp.fc2", f"{ours}.ff_context.net.2"),
                )

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts."""
        states, _, pooled, _ = pipeline.encode_prompt(
            list(captions), None, None, device=device, do_classifier_free_guidance=False
        )
        return Condition(states, pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        return pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]


def _joint(tensors: Mapping[str, TensorInfo]) -> Family | None:
    if any(SINGLE.search(name) or NOT_FLUX.search(name) for name in tensors):
        return None
    shapes = [info.shape for name, info in tensors.items() if _JOINT.search(name)]
    widths = {size for shape in shapes if len(shape) == 2 for size in shape}
    return Family.sd3 if widths & set(_SD3_WIDTHS) else None


FAMILY = StableDiffusion3()
