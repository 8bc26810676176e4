"""FLUX.1, and what is made of 2 x 2 patches as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.errors import CheckpointError
from audit.models.families.base import Condition, ModelFamily
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_START = r"(?:^|[._])"
_DISTILLED = "distilled_guidance_layer."  # Chroma's, which has Flux' other names
# Black Forest Labs' first Flux, told from what took over its names: HunyuanVideo says mod.linear and mlp.fc1, FLUX.2
# modulates all blocks at once, AuraFlow, Bria and others have single_transformer_blocks too
_FLUX_ALONE = re.compile(
    r"double_blocks?[._]\d+[._](?:img|txt)_mod[._]lin(?!ear)|single_blocks?[._]\d+[._]modulation[._]lin(?!ear)|"
    r"(?:double|single)_blocks?\.\d+\.processor\."
)
NOT_FLUX = re.compile(
    r"(?:img|txt)_mod[._]linear|modulation[._]linear|(?:img|txt)_mlp[._]fc\d|stream_modulation|to_qkv_mlp_proj|"
    r"ff(?:_context)?[._]linear_(?:in|out|1)\b|joint_transformer_blocks|token_refiner|refiner_blocks|caption_projection|"
    r"individual_token_refiner|txt_in[._]individual|image_embedder|guidance_layers"
)
_ORIGINAL_DOUBLE = re.compile(rf"{_START}double_blocks?[._](\d+)[._]")
_ORIGINAL_SINGLE = re.compile(rf"{_START}single_blocks?[._](\d+)[._]")
_DOUBLE = re.compile(r"(?:^|\.|lora_transformer_|lora_unet_|lycoris_)transformer_blocks[._](\d+)[._]")
SINGLE = re.compile(rf"{_START}single_transformer_blocks[._](\d+)[._]")
# blocks of FLUX.1; HunyuanVideo has 20 and 40, Bria's 8 and 38, LongCat 10 and 20, Ovis 6 and 27, FLUX.2 klein 5 and 20
_FLUX_DOUBLE, _FLUX_SINGLE = 19, 38
_KLEIN = (5, 20)
_FLUX_WIDTH = 3072
_FLUX_SIZES = {  # of the layers whose sizes are not every transformer's of this width, of the rows or of the inputs
    "linear1": (0, 21504), "linear2": (1, 15360), "mlp_0": (0, 12288), "mlp_2": (1, 12288),
}  # fmt: skip
_SIZED = re.compile(
    r"(?P<layer>linear1|linear2|mlp[._][02])(?:\.(?P<side>lora_[AB]|lora_down|lora_up)(?:\.\w+)?)?\.weight$"
)
_WHOLE = "context_embedder.weight"  # a whole transformer in diffusers' names has it, and FLUX.1 CLIP's vector beside it
_POOLED = "time_text_embed.text_embedder.linear_1.weight"


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] as the [N, H W / 4, 4 C] patches of 2 x 2 that Flux takes."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, height * width // 4, channels * 4)


def unpack(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The latents [N, C, ``height``, ``width``] of patches."""
    n, _, channels = patches.shape
    latents = patches.reshape(n, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(n, channels // 4, height, width)


def positions(latents: torch.Tensor) -> torch.Tensor:
    """float [H W / 4, 3]: 0, row and column of every patch."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    import torch

    found = torch.zeros(height, width, 3, dtype=latents.dtype, device=latents.device)
    found[..., 1] = torch.arange(height, device=latents.device)[:, None]
    found[..., 2] = torch.arange(width, device=latents.device)[None]
    return found.reshape(-1, 3)


_CALLED = re.compile(r"\bflux(?![-. ]?[23](?!\d))")


class Patched(ModelFamily):
    """A family whose transformer takes patches of 2 x 2 latents."""

    denoiser = "transformer"
    longest_caption = 512
    flow = True
    own_sigmas = True
    half_name = "bfloat16"  # what they are trained and published in; float16 overflows in T5

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one image's latents."""
        side = pipeline.default_sample_size if resolution is None else resolution // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, side, side

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other channel counts, and what is no base model."""
        taken, given = pipeline.transformer.config.in_channels, 4 * self.latent_channels(pipeline.vae)
        if taken != given:
            raise CheckpointError(
                f"{name}: its transformer takes {taken} channels, its patches have {given}: Fill, Canny, Depth and "
                "other variants cannot be audited; give the text-to-image model"
            )


class Flux(Patched):
    """FLUX.1 dev and schnell: CLIP's pooled vector and T5's states; dev takes a guidance weight as an input."""

    name = Family.flux
    precedence = 30
    called = _CALLED
    denoiser_class = "FluxTransformer2DModel"
    pipeline = "FluxPipeline"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    # sd-scripts calls T5 te3, OneTrainer te2
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"}

    encoder_prefixes = (("text_encoders.clip_l.",), ("text_encoders.t5xxl.",))

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By the names that it alone has, else by its sizes and the numbers of its blocks."""
        return None if any(_DISTILLED in name for name in tensors) else _flux(tensors)

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Black Forest Labs' names."""
        return original_names(network)

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers\' pipeline encodes prompts."""
        states, pooled, _ = pipeline.encode_prompt(list(captions), None, device=device)
        return Condition(states, pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        import torch

        states = condition.states
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), embedded, dtype=torch.float32, device=latents.device)
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, dtype=states.dtype, device=states.device),
            img_ids=positions(latents),
            return_dict=False,
        )[0]
        return unpack(patches, *latents.shape[2:])


def shared_names(layers: int, time: str) -> Iterator[tuple[str, Target]]:
    """What FLUX.1 and FLUX.2 name alike: ends, time (diffusers' module ``time``) and attention of double blocks."""
    yield from simple(
        ("time_in.in_layer", f"{time}.timestep_embedder.linear_1"),
        ("time_in.out_layer", f"{time}.timestep_embedder.linear_2"),
        ("txt_in", "context_embedder"),
        ("img_in", "x_embedder"),
        ("final_layer.linear", "proj_out"),
    )
    yield "final_layer.adaLN_modulation.1", Target(("norm_out.linear",), swapped=True)
    for layer in range(layers):
        ours, theirs = f"transformer_blocks.{layer}.attn", f"double_blocks.{layer}"
        yield f"{theirs}.img_attn.qkv", Target(tuple(f"{ours}.to_{x}" for x in "qkv"))
        yield f"{theirs}.txt_attn.qkv", Target(tuple(f"{ours}.add_{x}_proj" for x in "qkv"))
        yield from simple(
            (f"{theirs}.img_attn.norm.query_norm", f"{ours}.norm_q"),
            (f"{theirs}.img_attn.norm.key_norm", f"{ours}.norm_k"),
            (f"{theirs}.txt_attn.norm.query_norm", f"{ours}.norm_added_q"),
            (f"{theirs}.txt_attn.norm.key_norm", f"{ours}.norm_added_k"),
            (f"{theirs}.img_attn.proj", f"{ours}.to_out.0"),
            (f"{theirs}.txt_attn.proj", f"{ours}.to_add_out"),
        )


def original_names(network: Any) -> Iterator[tuple[str, Target]]:
    """Black Forest Labs' names of the modules of a transformer with Flux' blocks."""
    config: Any = network.config
    yield from shared_names(config.num_layers, "time_text_embed")
    yield from simple(
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    )
    for layer in range(config.num_layers):
        ours, theirs = f"transformer_blocks.{layer}", f"double_blocks.{layer}"
        yield from simple(
            (f"{theirs}.img_mod.lin", f"{ours}.norm1.linear"),
            (f"{theirs}.txt_mod.lin", f"{ours}.norm1_context.linear"),
            (f"{theirs}.img_mlp.0", f"{ours}.ff.net.0.proj"),
            (f"{theirs}.img_mlp.2", f"{ours}.ff.net.2"),
            (f"{theirs}.txt_mlp.0", f"{ours}.ff_context.net.0.proj"),
            (f"{theirs}.txt_mlp.2", f"{ours}.ff_context.net.2"),
        )
    for layer in range(config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{layer}", f"single_blocks.{layer}"
        yield f"{theirs}.linear1", Target((*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp"))
        yield from simple(
            (f"{theirs}.linear2", f"{ours}.proj_out"),
            (f"{theirs}.modulation.lin", f"{ours}.norm.linear"),
            (f"{theirs}.norm.query_norm", f"{ours}.attn.norm_q"),
            (f"{theirs}.norm.key_norm", f"{ours}.attn.norm_k"),
        )
    # XLabs names the attention's adapters as processors of the block
    for layer in range(config.num_layers):
        for number, stream in (("1", "img"), ("2", "txt")):
            block = f"transformer_blocks.{layer}.attn"
            three = [f"{block}.to_{x}" if stream == "img" else f"{block}.add_{x}_proj" for x in "qkv"]
            yield f"double_blocks.{layer}.processor.qkv_lora{number}", Target(tuple(three))
            out = f"{block}.to_out.0" if stream == "img" else f"{block}.to_add_out"
            yield f"double_blocks.{layer}.processor.proj_lora{number}", Target((out,))
    for layer in range(config.num_single_layers):
        block = f"single_transformer_blocks.{layer}"
        yield f"single_blocks.{layer}.processor.qkv_lora", Target(tuple(f"{block}.attn.to_{x}" for x in "qkv"))
        yield f"single_blocks.{layer}.processor.proj_lora", Target((f"{block}.proj_out",))


def _flux(tensors: Mapping[str, TensorInfo]) -> Family | None:
    if any(NOT_FLUX.search(name) for name in tensors):
        return None
    if any(_FLUX_ALONE.search(name) for name in tensors):
        return Family.flux
    sizes = {size for info in tensors.values() if len(info.shape) == 2 for size in info.shape}
    double, single = _numbers(tensors, _ORIGINAL_DOUBLE), _numbers(tensors, _ORIGINAL_SINGLE)
    if double or single:
        fits = max(double, default=0) < _FLUX_DOUBLE and max(single, default=0) < _FLUX_SINGLE
        of_klein = [set(range(count)) for count in _KLEIN]
        klein = double == of_klein[0] and single in (of_klein[1], set())
        complete = max(double, default=0) == _FLUX_DOUBLE - 1 or max(single, default=0) == _FLUX_SINGLE - 1
        told = _FLUX_WIDTH in sizes or complete  # LoKr, LoHa and OFT show no widths
        return Family.flux if fits and told and not klein and _sizes_are_flux(tensors) else None
    double, single = _numbers(tensors, _DOUBLE), _numbers(tensors, SINGLE)
    if any(name.endswith(_WHOLE) for name in tensors) and not any(name.endswith(_POOLED) for name in tensors):
        return None
    both = bool(double) and bool(single)
    last = max(double, default=0) == _FLUX_DOUBLE - 1 and max(single, default=0) == _FLUX_SINGLE - 1
    return Family.flux if both and last else None


def _numbers(tensors: Mapping[str, TensorInfo], pattern: re.Pattern[str]) -> set[int]:
    return {int(match[1]) for name in tensors if (match := pattern.search(name))}


def _sizes_are_flux(tensors: Mapping[str, TensorInfo]) -> bool:
    for name, info in tensors.items():
        match = _SIZED.search(name)
        if match is None or len(info.shape) != 2:
            continue
        side, size = _FLUX_SIZES[match["layer"].replace(".", "_")]
        factor = {"lora_A": 1, "lora_down": 1, "lora_B": 0, "lora_up": 0}.get(match["side"] or "", side)
        if factor == side and info.shape[side] != size:
            return False
    return True


FAMILY = Flux()
