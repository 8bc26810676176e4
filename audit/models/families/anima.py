"""Anima."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from audit.errors import CheckpointError
from audit.models.families.base import Condition, TextShape
from audit.models.families.frames import OneFrame
from audit.models.families.identify import Family
from audit.models.families.keys import Target, simple
from audit.models.index import class_of, read_index

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo

_CALLED = re.compile(r"^(?:[\w.-]+/)?anima(?:[- ](?:base|preview|turbo|v?\d).*)?(?:/lora)?$")
_WIDTH, _TEXT, _LAST = 2048, 1024, 27
_PREFIX = (
    r"^(?:base_model\.model\.)?(?:net\.)?"
    r"(?:(?:lora|lycoris|oft)_(?:unet_|transformer_)?|(?:model\.)?diffusion_model\.|transformer\.)?"
)
# By NVIDIA's names for Cosmos-Predict2, of which Anima is a descendant. Its smallest model has the same layers
_BLOCK = re.compile(
    _PREFIX + r"blocks[._](\d+)[._](?:(?:self|cross)_attn[._](?:[qkv]|output)_proj|mlp[._]layer[12]|"
    r"adaln_modulation_(?:self_attn|cross_attn|mlp)[._][12])(?=[._])"
)
# By diffusers': what shifts and scales is two layers, and attention to the caption is narrower than the rest
_SHIFT = re.compile(_PREFIX + r"transformer_blocks[._](\d+)[._]norm[123][._]linear_[12](?=[._])")
_CAPTION = re.compile(_PREFIX + r"transformer_blocks[._](\d+)[._]attn2[._]to_[kv](?=[._])")
_CONDITIONER = re.compile(r"(?:^|[._])(?:llm_adapter|text_conditioner)[._]blocks[._]\d+[._]")
# Predict 1 and 2.5, Transfer, and what takes a picture besides
_OTHERS = re.compile(r"crossattn_proj|img_context|[qkv]_img|before_proj|after_proj|extra_pos_embedder|learnable_pos")
_FIRST = re.compile(
    _PREFIX + r"(?:x_embedder[._]proj[._]1|patch_embed[._]proj)\.(?:lora_(?:A|down)\.(?:\w+\.)?)?weight$"
)
_ATTENTION = (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0"),
              ("q_norm", "norm_q"), ("k_norm", "norm_k"))  # fmt: skip
_TOKENIZERS = ("tokenizer", "t5_tokenizer")


class Anima(OneFrame):
    """Anima: NVIDIA's Cosmos-Predict2 2B with Qwen3's states, which a conditioner asks by T5's tokens.

    Its VAE is that of Qwen-Image. diffusers has it as a modular pipeline, which is built here of parts that lie in the
    folder: what its index names elsewhere is not fetched, and no code of it is run. Sizes and layouts are those of
    public configurations, of diffusers' converters and of sd-scripts' code; no weights of it have been run here.
    """

    name = Family.anima
    precedence = 19
    called = _CALLED
    pipeline = "AnimaModularPipeline"
    denoiser_class = "CosmosTransformer3DModel"
    denoiser = "transformer"
    conditioners = ("text_conditioner",)
    tokenizers = ("tokenizer",)
    encoder_names: ClassVar[dict[str, str]] = {"te1": "text_encoder", "conditioner": "text_conditioner"}
    longest_caption = 512
    flow = True
    own_sigmas = True
    half_name = "bfloat16"

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """By its conditioner, or its blocks in their width. Those of Cosmos-Predict2 2B are the same."""
        if any(_OTHERS.search(name) for name in tensors):
            return None
        if any(_FIRST.match(name) and len(info.shape) == 2 and info.shape[1] != 68 for name, info in tensors.items()):
            return None  # what takes more than latents and a mask of padding
        if any(_CONDITIONER.search(name) for name in tensors):
            return self.name
        own = [(int(match[1]), info) for name, info in tensors.items() if (match := _of_block(name))]
        sizes = {size for _, info in own for size in info.shape}
        captions = {size for name, info in tensors.items() if _CAPTION.match(name) for size in info.shape}
        last = max((layer for layer, _ in own), default=-1)
        if own and last <= _LAST and (_WIDTH in sizes or last == _LAST):
            return self.name
        return self.name if captions >= {_WIDTH, _TEXT} and not own else None

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """NVIDIA's names."""
        yield from simple(
            ("x_embedder.proj.1", "patch_embed.proj"), ("t_embedding_norm", "time_embed.norm"),
            ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
            ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
            ("final_layer.linear", "proj_out"), ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
            ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
        )  # fmt: skip
        for layer in range(network.config.num_layers):
            theirs, ours = f"blocks.{layer}", f"transformer_blocks.{layer}"
            for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1):
                for step in (1, 2):
                    yield (
                        f"{theirs}.adaln_modulation_{part}.{step}",
                        Target((f"{ours}.norm{number}.linear_{step}",)),
                    )
            for part, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
                yield from simple(*((f"{theirs}.{part}.{a}", f"{ours}.{attention}.{b}") for a, b in _ATTENTION))
            yield from simple(
                (f"{theirs}.mlp.layer1", f"{ours}.ff.net.0.proj"), (f"{theirs}.mlp.layer2", f"{ours}.ff.net.2")
            )

    def load(self, folder: Path, options: dict[str, Any]) -> Any:
        """Part by part, each of its own class from its own folder."""
        import diffusers
        import transformers

        parts = {name: options[name] for name in self.networks if name in options}
        common = {name: options[name] for name in ("use_safetensors", "local_files_only", "variant")}
        dtypes = options["dtype"]
        kinds = {
            "transformer": diffusers.CosmosTransformer3DModel, "text_conditioner": diffusers.AnimaTextConditioner,
            "text_encoder": transformers.Qwen3Model, "vae": diffusers.AutoencoderKLQwenImage,
        }  # fmt: skip
        for name, kind in kinds.items():
            if name not in parts:
                parts[name] = kind.from_pretrained(folder / name, dtype=dtypes[name], **common)
        return self.assemble(folder, parts)

    def assemble(self, folder: Path, parts: Mapping[str, Any]) -> Any:
        """diffusers' modular pipeline of ``parts``; tokenizers are left out where there is no text encoder."""
        import diffusers
        import transformers

        index = read_index(folder)
        made = dict(parts)
        wanted = _TOKENIZERS if parts.get("text_encoder") is not None else ()
        for name in (*wanted, "scheduler"):
            if not (folder / name).is_dir():
                raise ValueError(
                    f"there is no {name} in it: where its index names another place, put the {name} of that place into "
                    "the folder"
                )
        for name in wanted:
            found = getattr(transformers, class_of(index, name), None)
            if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)):
                raise ValueError(f"{class_of(index, name)[:80]} is no tokenizer")
            kind: Any = found
            made[name] = kind.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
        made["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder / "scheduler", local_files_only=True
        )
        pipeline = diffusers.AnimaModularPipeline()
        pipeline.register_components(**{name: part for name, part in made.items() if part is not None})
        return pipeline

    def check(self, pipeline: Any, name: str) -> None:
        """Refuse other networks of Cosmos, and a schedule that its pipeline does not have."""
        config, channels = pipeline.transformer.config, self.latent_channels(pipeline.vae)
        if config.in_channels != channels or config.img_context_dim_in or config.use_crossattn_projection:
            raise CheckpointError(
                f"{name}: its transformer takes {config.in_channels} channels, its VAE has {channels}, or it takes "
                "pictures beside the caption: give the text-to-image model, Anima"
            )
        if pipeline.scheduler.config.get("use_dynamic_shifting"):
            raise CheckpointError(f"{name}: its scheduler shifts by the size of a picture, which Anima's does not")

    def settle(self, pipeline: Any) -> None:
        """Let a caption's states be the same whatever stands beside it in a batch, and blocks be compiled once."""
        for name in _TOKENIZERS:
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).padding_side = "right"
        pipeline.transformer._repeated_blocks = pipeline.transformer._no_split_modules

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As diffusers' pipeline encodes prompts: bare, by both tokenizers, and through the conditioner."""
        from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

        found = AnimaTextEncoderStep.encode_prompt(
            pipeline, list(captions), prepare_unconditional_embeds=False,
            max_sequence_length=self.caption_tokens(pipeline), device=device,
        )  # fmt: skip
        conditioner = pipeline.text_conditioner
        states: torch.Tensor = conditioner(
            source_hidden_states=found["qwen_prompt_embeds"].to(conditioner.dtype),
            target_input_ids=found["t5_input_ids"],
            target_attention_mask=found["t5_attention_mask"],
            source_attention_mask=found["qwen_attention_mask"],
        )
        return Condition(states)

    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """One evaluation of the denoiser, which takes the mask of padding, of zeros, as one more channel."""
        network = pipeline.transformer
        if network.config.concat_padding_mask:  # diffusers resizes it by torchvision; here it has its size
            network.register_to_config(concat_padding_mask=False)
        height, width = latents.shape[2:]
        found: torch.Tensor = network(
            hidden_states=latents[:, :, None],
            timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
            encoder_hidden_states=condition.states,
            condition_mask=latents.new_zeros(len(latents), 1, 1, height, width),
            return_dict=False,
        )[0]
        return found[:, :, 0]

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """The conditioner's states alone."""
        return TextShape(tokens, denoiser.text_embed_dim)

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """Channels, height and width of one image's latents; 1024 pixels by default."""
        side = (resolution or 1024) // pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, side, side

    def caption_tokens(self, pipeline: Any) -> int:
        """Tokens of a caption that both tokenizers let through: the denoiser has as many states of every caption."""
        limits = [int(getattr(pipeline, name).model_max_length) for name in _TOKENIZERS]
        return min(self.longest_caption, pipeline.text_conditioner.config.min_sequence_length, *limits)

    def is_truncated(self, pipeline: Any, caption: str) -> bool:
        """Whether the beginning of ``caption`` alone is seen."""
        limit = self.caption_tokens(pipeline)
        return any(len(getattr(pipeline, name)(caption).input_ids) > limit for name in _TOKENIZERS)


def _of_block(name: str) -> re.Match[str] | None:
    return _BLOCK.match(name) or _SHIFT.match(name)


FAMILY = Anima()
