"""HiDream-I1.

The transformer's configuration is that of copies of the published one (transformer/config.json of HiDream-I1 Dev, whose
model_index.json names FlowMatchLCMScheduler). That Full is published with UniPC, and Fast with Dev's scheduler, is
from memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from audit.errors import CheckpointError
from audit.models.families.base import Condition, ModelFamily, TextShape
from audit.models.families.flux import positions
from audit.models.families.identify import Family
from audit.models.index import is_absent

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"\bhidream")
_OTHERS = re.compile(r"hidream[- ]?[eo]1|\bedit|control|inpaint|outpaint")
_EDITS = re.compile(r"hidream[-_ ]?e1|(?<![a-z])edit(?:s|ing)?(?![a-z])", re.IGNORECASE)
_FEW_STEPS = re.compile(r"hidream[-_ ]?i1[-_ ](?:dev|fast)\b", re.IGNORECASE)
_OWN = re.compile(r"(?:^|[._])(?:double|single)_stream_blocks[._]\d+[._]block[._]")
_PATCH = 2
_LLAMA = ("text_encoder_4", "tokenizer_4")
_SHORTEST, _LONGEST = (256, 0.5), (4096, 1.15)  # patches of a picture, and how far they shift the schedule


class HiDream(ModelFamily):
    """HiDream-I1 (arXiv 2505.22705), Full, Dev and Fast: a mixture of experts with four text encoders.

    Pooled vectors of two CLIPs, the states of T5, and of Llama 3.1 those of each layer: a block reads one layer's.
    """

    name = Family.hidream
    precedence = 20
    called = _CALLED
    pipeline = "HiDreamImagePipeline"
    denoiser_class = "HiDreamImageTransformer2DModel"
    denoiser = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
    encoder_names: ClassVar[dict[str, str]] = {
        "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3", "te4": "text_encoder_4",
    }  # fmt: skip
    longest_caption = 128
    probe = "a photo"  # of the empty caption Llama sees one token, which attends to itself whatever is changed
    flow = True
    half_name = "bfloat16"  # T5 overflows in float16
    compiles = False  # which expert a token goes to is read by the host
    left_out: ClassVar[dict[str, Any]] = {}

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By the names of its blocks, which no other model has; HiDream-E1 has the same."""
        return self.name if any(_OWN.search(name) for name in tensors) else None

    def told_by_name(self, name: str) -> str | None:
        """E1 edits pictures, O1 is another model."""
        return None if _OTHERS.search(name) else super().told_by_name(name)

    def check_folder(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Refuse a folder without Llama, which the published repositories have not: its licence keeps it apart."""
        missing = [part for part in _LLAMA if is_absent(index, part) or not (folder / part).is_dir()]
        if missing:
            raise CheckpointError(
                f"{folder} has no {' and no '.join(missing)}: HiDream-I1 is published without Llama 3.1 8B Instruct. "
                "Load it in Python with HiDreamImagePipeline.from_pretrained(..., text_encoder_4=LlamaForCausalLM"
                '.from_pretrained("meta-llama/Meta-Llama-3.1-8B-Instruct"), tokenizer_4=PreTrainedTokenizerFast'
                '.from_pretrained("meta-llama/Meta-Llama-3.1-8B-Instruct")), save_pretrained() it, and give that folder'
            )

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse what edits pictures, other channel counts and patches, and text states that do not fit."""
        config = pipeline.transformer.config
        height, width = config.max_resolution
        if _EDITS.search(name) or height != width:
            raise CheckpointError(f"{name} is HiDream-E1, which edits pictures: give HiDream-I1")
        given = self.latent_channels(pipeline.vae)
        if config.in_channels != given or config.patch_size != _PATCH:
            raise CheckpointError(
                f"{name}: its transformer takes {config.in_channels} channels in patches of {config.patch_size}, its "
                f"latents have {given}: edit, inpainting and other variants cannot be audited; give HiDream-I1"
            )
        t5, llama = pipeline.text_encoder_3.config, pipeline.text_encoder_4.config
        layers = list(config.llama_layers)
        blocks = config.num_layers + config.num_single_layers
        last = max(layers, default=-1)
        fits = len(layers) == blocks and min(layers, default=-1) >= 0 and last < llama.num_hidden_layers
        if not fits or list(config.caption_channels) != [t5.d_model, llama.hidden_size]:
            raise CheckpointError(
                f"{name}: its transformer reads {len(layers)} layers, up to number {last}, of text states of "
                f"the widths {list(config.caption_channels)}; T5 has {t5.d_model}, Llama {llama.hidden_size} in "
                f"{llama.num_hidden_layers} layers: give HiDream-I1 with the encoders that it was trained with"
            )

    def doubts(self, pipeline: Any, name: str) -> list[str]:
        """HiDream-E1 has the layers of I1."""
        if not _EDITS.search(name):
            return []
        return [
            "its name says that it is for HiDream-E1, which edits pictures: on HiDream-I1 finding nothing says little"
        ]

    def settle(self, pipeline: Any) -> None:
        """Let a schedule that shifts larger pictures be the same for all sizes, as its pipeline has it."""
        if pipeline.scheduler.config.get("use_dynamic_shifting"):
            (few, low), (many, high) = _SHORTEST, _LONGEST
            shift = low + (high - low) * (pipeline.transformer.max_seq - few) / (many - few)
            pipeline.scheduler.register_to_config(base_shift=shift, max_shift=shift)

    def warnings(self, pipeline: Any) -> list[str]:
        """Of Dev and Fast, whose network is Full's: their scheduler tells them, else their name."""
        name = str(pipeline.config.get("_name_or_path", ""))
        if type(pipeline.scheduler).__name__ != "FlowMatchLCMScheduler" and not _FEW_STEPS.search(name):
            return []
        return [
            "the base seems to be HiDream-I1 Dev or Fast, distilled to few steps: its predictions are not those of a "
            "flow, on which guidance rests. Audit adapters that were trained on HiDream-I1 Full against that"
        ]

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts, bare and padded; T5's states and Llama's layers side by side."""
        import torch

        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
            list(captions),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.caption_tokens(pipeline),
        )
        layers = llama[: 1 + max(pipeline.transformer.config.llama_layers)].permute(1, 2, 0, 3)
        return Condition(torch.cat([t5, layers.flatten(2)], dim=2), pooled)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser, which answers x_0 - eps.

        It is given patches, and their number as one: of latents it would read it from the device, a picture at a time.
        """
        transformer = pipeline.transformer
        if latents.is_meta:
            _let_count(transformer)
        t5, llama = transformer.config.caption_channels
        layers = condition.states[..., t5:].unflatten(2, (-1, llama)).unbind(2)
        patches, places, kept = patches_of(latents, transformer.max_seq)
        height, width = latents.shape[2:]
        found: torch.Tensor = transformer(
            hidden_states=patches,
            timesteps=timestep.expand(len(latents)),
            encoder_hidden_states_t5=condition.states[..., :t5],
            encoder_hidden_states_llama3=layers,
            pooled_embeds=condition.pooled,
            img_ids=places,
            img_sizes=[(height // _PATCH, width // _PATCH)] * len(latents),
            hidden_states_masks=kept,
            return_dict=False,
        )[0]
        return -found

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """T5's states, those of each of Llama's layers beside them, and the pooled vectors."""
        t5, llama = denoiser.caption_channels
        return TextShape(tokens, t5 + llama * (1 + max(denoiser.llama_layers)), denoiser.text_emb_dim)

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one image's latents; 1024 pixels by default."""
        side = (resolution or 1024) // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, side, side

    def caption_tokens(self, pipeline: Any) -> int:
        """Tokens that all encoders read of a caption: the pipeline pads it to one number for all four."""
        positions = [self._positions(getattr(pipeline, encoder)) for encoder in self.encoders]
        limits = [int(getattr(pipeline, tokenizer).model_max_length) for tokenizer in self.tokenizers[2:]]
        return min(self.longest_caption, *positions, *limits)


def patches_of(latents: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches [N, S, 4 C] of 2 x 2 latents, their rows and columns float32 [N, S, 3], and which count [N, S].

    All of a square picture's count; those of another are padded to ``most``, as the transformer does with latents.
    """
    import torch

    count, channels, height, width = latents.shape
    split = latents.reshape(count, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    patches = split.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, _PATCH * _PATCH * channels)
    places = positions(latents.float()).expand(count, -1, -1)
    kept = patches.new_ones(patches.shape[:2])
    if height == width:
        return patches, places, kept
    missing = most - patches.shape[1]
    pad = torch.nn.functional.pad
    return pad(patches, (0, 0, 0, missing)), pad(places, (0, 0, 0, missing)), pad(kept, (0, missing))


def _let_count(transformer: Any) -> None:
    """Let every expert have as many tokens as another: which one has how many cannot be read on the meta device."""
    for block in (*transformer.double_stream_blocks, *transformer.single_stream_blocks):
        experts = block.block.ff_i
        if hasattr(experts, "moe_infer"):
            experts.moe_infer = _Even(experts)


class _Even:
    """The experts' answers [rows, width], with the operations and the memory of diffusers' own."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import torch

        order = chosen.argsort()
        rows = order // self.layer.num_activated_experts
        found = torch.zeros_like(states)
        shares = zip(self.layer.experts, *(x.tensor_split(len(self.layer.experts)) for x in (order, rows)), strict=True)
        for expert, some, own in shares:
            answer = expert(states[own]).mul_(weights[some])
            found.scatter_reduce_(0, own[:, None].repeat(1, states.shape[1]), answer, reduce="sum")
        return found


FAMILY = HiDream()
