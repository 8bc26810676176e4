"""FLUX.2 dev, and what it shares with FLUX.2 klein."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.models.families.base import Condition, TextShape
from audit.models.families.chat import MISTRAL, Chatting
from audit.models.families.flux import Patched, pack, shared_names, unpack
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_START = r"(?:^|[._])"
# Names that no other architecture has: one modulation for all blocks, and one layer for all that enters a single block
_ALONE = re.compile(
    rf"{_START}(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)[._]lin|time_guidance_embed[._]|"
    r"single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj|"
    r"(?<!single_)(?<!joint_)transformer_blocks[._]\d+[._]ff(?:_context)?[._]linear_(?:in|out)(?=[._])"
)
_NOT_FLUX2 = re.compile(r"(?:img|txt)_mod[._]|modulation[._]lin|distilled_guidance_layer|vector_in[._]|_mlp[._]fc\d")
_BLOCK = re.compile(rf"{_START}(double|single)_blocks?[._](\d+)[._](?:(?:img|txt)_(attn|mlp)[._])?(\w+?)(?=[._]|$)")
# of the layers of a block in the first code: their rows and inputs by the network's width; both of the MLP are gated
_RATIOS = {"qkv": (3, 1), "proj": (1, 1), "0": (6, 1), "2": (1, 3), "linear1": (9, 1), "linear2": (1, 4)}
_OWN = {"0": 0, "2": 1, "linear1": 0, "linear2": 1}  # of these, the side that FLUX.1 has in another size
_FACTOR = re.compile(r"[._]lora[._](?:(?P<rows>B|up)|(?P<inputs>A|down))(?:\.\w+)?\.weight$")
_SINGLE = re.compile(rf"{_START}single_(?:transformer_)?blocks[._](\d+)[._]")
_SINGLES = {48: Family.flux2, 24: Family.flux2_klein, 20: Family.flux2_klein}
# by the network's width, the least first: twice the least is the width of another
_WIDTHS = {3072: Family.flux2_klein, 4096: Family.flux2_klein, 6144: Family.flux2}

_CALLED = re.compile(r"\bflux[-. ]?2(?!\d)")
KLEIN = re.compile(r"\bklein")


class Flux2Like(Chatting, Patched):
    """What FLUX.2's models share: their transformer, and a VAE whose latents are normalised a patch's channel."""

    denoiser_class = "Flux2Transformer2DModel"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By the names that it alone has, else by the sizes of its layers in the first code's names."""
        return self.name if _shown(tensors) == self.name else None

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """Black Forest Labs' names."""
        return _original_names(network)

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: padded, and the padding is seen."""
        limit = self.limit(pipeline)
        return Condition(pipeline.encode_prompt(list(captions), device=device, max_sequence_length=limit)[0])

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser."""
        import torch

        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), embedded, dtype=torch.float32, device=latents.device)
        places = torch.zeros(condition.states.shape[1], 4, dtype=torch.long, device=latents.device)
        places[:, 3] = torch.arange(len(places), device=latents.device)
        patches = pipeline.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=condition.states,
            txt_ids=places,
            img_ids=_positions(latents),
            return_dict=False,
        )[0]
        return unpack(patches, *latents.shape[2:])

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """The states of three layers side by side."""
        return TextShape(tokens, denoiser.joint_attention_dim)

    def time_shift(self, scheduler: Mapping[str, Any], latent_shape: Sequence[int], steps: int) -> float:
        """By the number of patches and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        *_, height, width = latent_shape
        found: float = compute_empirical_mu(height * width // 4, steps)
        return found

    def latent_statistics(self, vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
        """Those of the VAE's batch norm."""
        return of_patches(vae, latents, vae.config.batch_norm_eps)


class Flux2(Flux2Like):
    """FLUX.2 dev: Mistral Small 3's states; a guidance weight is an input, as of FLUX.1 dev."""

    name = Family.flux2
    precedence = 26
    called = _CALLED
    pipeline = "Flux2Pipeline"
    template = MISTRAL

    def told_by_name(self, name: str) -> str | None:
        """FLUX.2 where it is not klein."""
        return None if KLEIN.search(name) else super().told_by_name(name)

    def load(self, folder: Path, options: dict[str, Any]) -> Any:
        """Without the processor of pictures that its tokenizer comes in."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        return super().load(folder, {**options, "tokenizer": tokenizer})

    def messages(self, pipeline: Any, caption: str) -> list[dict[str, Any]]:
        """Below the pipeline's own instruction."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        found: list[dict[str, Any]] = format_input([caption], pipeline.system_message)[0]
        return found


def of_patches(vae: Any, latents: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation by the VAE's batch norm, which has a channel for each of the four places of a patch."""
    import torch

    mean, deviation = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + eps)
    (side, _), (height, width) = vae.config.patch_size, latents.shape[2:]
    tiles = (1, 1, height // side, width // side)
    mean, deviation = (one.view(1, -1, side, side).repeat(tiles) for one in (mean, deviation))
    return mean, deviation


def _positions(latents: torch.Tensor) -> torch.Tensor:
    """int64 [H W / 4, 4]: 0, row and column of every patch, 0."""
    import torch

    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    found = torch.zeros(height, width, 4, dtype=torch.long, device=latents.device)
    found[..., 1] = torch.arange(height, device=latents.device)[:, None]
    found[..., 2] = torch.arange(width, device=latents.device)[None]
    return found.reshape(-1, 4)


def _original_names(network: Any) -> Iterator[tuple[str, Target]]:
    config: Any = network.config
    yield from shared_names(config.num_layers, "time_guidance_embed")
    yield from simple(
        ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
        ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
        ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    )
    if config.guidance_embeds:
        yield from simple(
            ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
            ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
        )
    for layer in range(config.num_layers):
        ours, theirs = f"transformer_blocks.{layer}", f"double_blocks.{layer}"
        yield from simple(
            (f"{theirs}.img_mlp.0", f"{ours}.ff.linear_in"),
            (f"{theirs}.img_mlp.2", f"{ours}.ff.linear_out"),
            (f"{theirs}.txt_mlp.0", f"{ours}.ff_context.linear_in"),
            (f"{theirs}.txt_mlp.2", f"{ours}.ff_context.linear_out"),
        )
    for layer in range(config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{layer}.attn", f"single_blocks.{layer}"
        yield from simple(
            (f"{theirs}.linear1", f"{ours}.to_qkv_mlp_proj"),
            (f"{theirs}.linear2", f"{ours}.to_out"),
            (f"{theirs}.norm.query_norm", f"{ours}.norm_q"),
            (f"{theirs}.norm.key_norm", f"{ours}.norm_k"),
        )


def _shown(tensors: Mapping[str, TensorInfo]) -> Family | None:
    if any(_ALONE.search(name) for name in tensors):
        sizes = {size for info in tensors.values() if len(info.shape) == 2 for size in info.shape}
        width = next((width for width in _WIDTHS if width in sizes), None)
        if width is None:  # LoKr, LoHa and OFT show none
            singles = [int(match[1]) for name in tensors if (match := _SINGLE.search(name))]
            return _SINGLES.get(max(singles, default=0) + 1)
        return _WIDTHS[width]
    if any(_NOT_FLUX2.search(name) for name in tensors):
        return None
    return _by_sizes(tensors)


def _by_sizes(tensors: Mapping[str, TensorInfo]) -> Family | None:
    """Of the first code's names, which others have too: what width all layers agree on."""
    widths, own = set[float](), False
    for name, info in tensors.items():
        found = _BLOCK.search(name)
        layer = found[4] if found else ""
        if layer not in _RATIOS or len(info.shape) != 2 or not name.endswith(".weight"):
            continue
        factor = _FACTOR.search(name)
        sides = (0, 1) if factor is None else (0,) if factor["rows"] else (1,)
        widths |= {info.shape[side] / _RATIOS[layer][side] for side in sides}
        own = own or _OWN.get(layer) in sides
    width = widths.pop() if len(widths) == 1 else 0
    return _WIDTHS.get(int(width)) if own or width != 3072 else None  # FLUX.1 and HunyuanVideo have 3072 too


FAMILY = Flux2()
