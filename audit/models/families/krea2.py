"""Krea 2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import Condition, TextShape
from audit.models.families.flux import Patched, pack, unpack
from audit.models.families.frames import OneFrame
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\bkrea[-. ]?2(?![\d.])")
_OTHERS = re.compile(r"edit|control|inpaint|outpaint|kontext")
_WIDTH, _GROUPED, _LAST = 6144, 1536, 27
_START = (  # of diffusers' names and of Krea's
    r"(?:(?:^|[._])(?<!single_)(?<!joint_)transformer_blocks|"
    r"(?:^|[._])(?<!transformer_)(?<!double_)(?<!single_)(?<!joint_)(?<!refiner_)(?<!layerwise_)blocks)"
)
_END = r"(?=\.|_0\.)"
# q, k, v and a gate of each block, by diffusers' names and by Krea's; an MLP of three layers; a fusion of text states
_BLOCK = re.compile(
    rf"{_START}[._](\d+)[._](?:attn[._](?P<layer>to_gate|to_[qkv]|to_out|w[qkvo]|gate)|(?:ff|mlp)[._](?:gate|up|down)){_END}"
)
_ALONE = re.compile(
    r"(?:^|[._])(?:text_fusion|txtfusion)[._](?:layerwise_blocks|refiner_blocks|projector)(?=[._])|"
    rf"{_START}[._]\d+[._](?:attn[._](?:to_gate|w[qkvo])|(?:ff|mlp)[._](?:gate|up|down)){_END}"
)
_DISTILLED_SHIFT = 1.15  # mu of the distilled model, whatever the size of a picture
_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_TABLES = re.compile(r"^(blocks\.\d+)\.mod\.lin$|^(last)\.modulation\.lin$")


class Krea2(OneFrame, Patched):
    """Krea 2, raw and Turbo: the states of twelve layers of Qwen3-VL, the VAE of Qwen-Image, one stream."""

    name = Family.krea2
    precedence = 21
    called = _CALLED
    pipeline = "Krea2Pipeline"
    denoiser_class = "Krea2Transformer2DModel"

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its gates, its fusion of text states or its few keys and values, and by its width or its last block."""
        own = [(match, info) for name, info in tensors.items() if (match := _BLOCK.search(name))]
        attention = {size for match, info in own if match["layer"] for size in info.shape}
        if not any(_ALONE.search(name) for name in tensors) and not attention >= {_WIDTH, _GROUPED}:
            return None
        sizes = {size for _, info in own for size in info.shape}
        last = max((int(match[1]) for match, _ in own), default=0)
        return self.name if last <= _LAST and (_WIDTH in sizes or last == _LAST) else None

    def told_by_name(self, name: str) -> str | None:
        """Edit and control models are others."""
        return None if _OTHERS.search(name) else super().told_by_name(name)

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Krea's names."""
        yield from simple(
            ("first", "img_in"), ("tmlp.0", "time_embed.linear_1"), ("tmlp.2", "time_embed.linear_2"),
            ("tproj.1", "time_mod_proj"), ("txtmlp.0", "txt_in.norm"), ("txtmlp.1", "txt_in.linear_1"),
            ("txtmlp.3", "txt_in.linear_2"), ("txtfusion.projector", "text_fusion.projector"),
            ("last", "final_layer"), ("last.linear", "final_layer.linear"), ("last.norm", "final_layer.norm"),
        )  # fmt: skip
        config: Any = network.config
        for kind, count in (
            ("layerwise", config.num_layerwise_text_blocks),
            ("refiner", config.num_refiner_text_blocks),
        ):
            for layer in range(count):
                yield from _block(f"txtfusion.{kind}_blocks.{layer}", f"text_fusion.{kind}_blocks.{layer}")
        for layer in range(config.num_layers):
            yield from simple((f"blocks.{layer}", f"transformer_blocks.{layer}"))
            yield from _block(f"blocks.{layer}", f"transformer_blocks.{layer}")

    def own_parameter(self, name: str) -> str:
        """Krea has modules for the tables of modulation."""
        return _TABLES.sub(lambda match: f"{match[1] or match[2]}.scale_shift_table", name)

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, patches and depths of text states."""
        super().check(pipeline, name)
        taps, wanted = pipeline.text_encoder_select_layers, pipeline.transformer.config.num_text_layers
        if pipeline.patch_size != 2 or len(taps) != wanted:
            raise CheckpointError(
                f"{name} has patches of {pipeline.patch_size} and reads {len(taps)} layers of its text encoder, of "
                f"which its transformer takes {wanted}: give Krea 2 as it is published"
            )

    def settle(self, pipeline: Any) -> None:
        """Let the schedule of the distilled model be the same for all sizes of pictures, as its pipeline has it."""
        if pipeline.config.is_distilled:
            pipeline.scheduler.register_to_config(base_shift=_DISTILLED_SHIFT, max_shift=_DISTILLED_SHIFT)

    def warnings(self, pipeline: Any) -> list[str]:
        """Of the distilled one."""
        if not pipeline.config.is_distilled:
            return []
        return [
            "the base is Krea 2 Turbo, distilled to few steps: its predictions are not those of a flow, on which "
            "guidance rests. Adapters are mostly trained on Krea 2 Raw and used on Turbo: audit against Raw"
        ]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: padded within its template; the layers of a token side by side."""
        states, mask = pipeline.encode_prompt(list(captions), device, max_sequence_length=self._limit(pipeline))
        return Condition(states.flatten(2), mask=mask)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        from diffusers import Krea2Pipeline

        assert condition.mask is not None
        height, width = latents.shape[2:]
        layers = pipeline.transformer.config.num_text_layers
        states = condition.states.unflatten(2, (layers, -1))
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            encoder_hidden_states=states,
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            position_ids=Krea2Pipeline.prepare_position_ids(
                states.shape[1], height // 2, width // 2, device=latents.device
            ),
            encoder_attention_mask=condition.mask.bool(),
            return_dict=False,
        )[0]
        return unpack(patches, height, width)

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """The states of all layers side by side, and which of them are padding."""
        return TextShape(tokens, denoiser.num_text_layers * denoiser.text_hidden_dim, masked=True)

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one image's latents; 1024 pixels by default."""
        side = (resolution or 1024) // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, side, side

    def caption_tokens(self, pipeline: Any) -> int:
        """Tokens of a caption that the encoder reads: its states stand before those of the template's end."""
        return self._limit(pipeline) - int(pipeline.prompt_template_encode_num_suffix_tokens)

    def is_truncated(self, pipeline: Any, caption: str) -> bool:
        """Whether the text encoder sees only the beginning of ``caption``."""
        tokens = pipeline.tokenizer(pipeline.prompt_template_encode_prefix + caption).input_ids
        return len(tokens) - int(pipeline.prompt_template_encode_start_idx) > self.caption_tokens(pipeline)

    def _limit(self, pipeline: Any) -> int:
        return min(int(pipeline.tokenizer.model_max_length), self.longest_caption)


def _block(theirs: str, ours: str) -> Iterator[tuple[str, Target]]:
    for name, own in _ATTENTION.items():
        yield from simple((f"{theirs}.attn.{name}", f"{ours}.attn.{own}"))
    yield from simple(
        (f"{theirs}.attn.qknorm.qnorm", f"{ours}.attn.norm_q"), (f"{theirs}.attn.qknorm.knorm", f"{ours}.attn.norm_k"),
        (f"{theirs}.prenorm", f"{ours}.norm1"), (f"{theirs}.postnorm", f"{ours}.norm2"),
        (f"{theirs}.mlp.gate", f"{ours}.ff.gate"), (f"{theirs}.mlp.up", f"{ours}.ff.up"),
        (f"{theirs}.mlp.down", f"{ours}.ff.down"),
    )  # fmt: skip


FAMILY = Krea2()
