"""The published base models by name: what a network of each is built from, without its weights.

The configurations are those of the models' repositories (config.json); what is left out is the default of diffusers or
transformers. ``build`` makes the networks on torch's meta device, where a tensor has a shape and no memory, so that the
largest of them can be looked at on any machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.demo import BASE as EMBEDDED
from audit.demo import FLOW_BASE as EMBEDDED_FLOW
from audit.errors import ConfigError

if TYPE_CHECKING:
    import torch

Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class PublishedNetwork:
    """One network: its class in diffusers or transformers, its configuration, and its parameters in millions."""

    kind: str
    configuration: Configuration
    millions: float


@dataclass(frozen=True)
class PublishedModel:
    """A base model as it was published.

    ``pipeline`` is the class of its diffusers pipeline; ``resolution`` the side of its pictures in pixels;
    ``text_tokens`` how many text states its denoiser reads; ``stored_bytes`` what a weight takes in its files.
    """

    title: str
    pipeline: str
    resolution: int
    text_tokens: int
    stored_bytes: int
    networks: Mapping[str, PublishedNetwork]


SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21: dict[str, Any] = {
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    "sample_size": 96,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
    "in_channels": 16, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
SD35_LARGE: dict[str, Any] = {
    "sample_size": 128, "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38,
    "caption_projection_dim": 2432, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
    "in_channels": 16, "pos_embed_max_size": 192,
}  # fmt: skip
FLUX: dict[str, Any] = {"guidance_embeds": True}
CHROMA: dict[str, Any] = {}
FLUX2_DEV: dict[str, Any] = {}
FLUX2_KLEIN_4B: dict[str, Any] = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
FLUX2_KLEIN_9B: dict[str, Any] = {
    "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False,
}  # fmt: skip
Z_IMAGE: dict[str, Any] = {}
QWEN_IMAGE: dict[str, Any] = {}
WAN_1_3B: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_14B: dict[str, Any] = {}
WAN_5B: dict[str, Any] = {
    "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
}  # fmt: skip
KREA2: dict[str, Any] = {}
ANIMA: dict[str, Any] = {  # that of Cosmos-Predict2 2B, from which it descends
    "num_attention_heads": 16, "text_embed_dim": 1024, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None,
}  # fmt: skip
ANIMA_CONDITIONER: dict[str, Any] = {}
ERNIE_IMAGE: dict[str, Any] = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288, "text_in_dim": 3072,
}  # fmt: skip
HIDREAM: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": (4096, 4096),
    "axes_dims_rope": (64, 32, 32), "llama_layers": (*range(32), *[31] * 16),
}  # fmt: skip
KOLORS: dict[str, Any] = {
    **SDXL, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
OPEN_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
}  # fmt: skip
OPEN_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
LONG_CLIP_L: dict[str, Any] = {**CLIP_L, "max_position_embeddings": 248}
LONG_CLIP_G: dict[str, Any] = {**OPEN_CLIP_G, "max_position_embeddings": 218}
LLAMA31_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
CHATGLM3_6B: dict[str, Any] = {  # the rest is the default of diffusers' ChatGLMConfig
    "seq_length": 32768, "add_qkv_bias": True, "multi_query_attention": True, "multi_query_group_num": 2,
    "original_rope": True,
}  # fmt: skip
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
UMT5_XXL: dict[str, Any] = {**T5_XXL, "vocab_size": 256384}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_0_6B: dict[str, Any] = {
    **QWEN3_4B, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
}  # fmt: skip
QWEN3_8B: dict[str, Any] = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
MISTRAL_SMALL: dict[str, Any] = {
    "text_config": {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 1540,
    },
    "spatial_merge_size": 2, "vision_feature_layer": -1, "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
MINISTRAL_3B: dict[str, Any] = {  # what sees pictures, which no audit uses, is taken to be Mistral Small's
    "text_config": {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "vision_config": MISTRAL_SMALL["vision_config"], "spatial_merge_size": 2, "vision_feature_layer": -1,
    "projector_hidden_act": "gelu", "multimodal_projector_bias": False,
}  # fmt: skip
QWEN3_VL_4B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip
QWEN25_VL_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rope_scaling": {"type": "mrope",
        "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False,
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                      "out_hidden_size": 3584},
    "tie_word_embeddings": False,
}  # fmt: skip
# force_upcast is not in the older configurations, and true by diffusers' default
VAE_4: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
VAE_16: dict[str, Any] = {**VAE_4, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
VAE_FLUX2: dict[str, Any] = {**VAE_4, "latent_channels": 32}
VAE_QWEN: dict[str, Any] = {}
VAE_WAN: dict[str, Any] = {}
VAE_WAN_5B: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "is_residual": True, "scale_factor_spatial": 16, "latents_mean": (0.0,) * 48, "latents_std": (1.0,) * 48,
}  # fmt: skip

_VAE_4 = PublishedNetwork("AutoencoderKL", VAE_4, 83.65)
_VAE_16 = PublishedNetwork("AutoencoderKL", VAE_16, 83.82)
_CLIP_L = PublishedNetwork("CLIPTextModel", CLIP_L, 123.06)
_CLIP_L_PROJECTED = PublishedNetwork("CLIPTextModelWithProjection", CLIP_L, 123.65)
_OPEN_CLIP_H = PublishedNetwork("CLIPTextModel", OPEN_CLIP_H, 340.39)
_OPEN_CLIP_G = PublishedNetwork("CLIPTextModelWithProjection", OPEN_CLIP_G, 694.66)
_T5_XXL = PublishedNetwork("T5EncoderModel", T5_XXL, 4762.3)
_UMT5_XXL = PublishedNetwork("UMT5EncoderModel", UMT5_XXL, 5680.91)
_VAE_WAN = PublishedNetwork("AutoencoderKLWan", VAE_WAN, 126.89)
_QWEN3_4B = PublishedNetwork("Qwen3ForCausalLM", QWEN3_4B, 4022.47)
_VAE_FLUX2 = PublishedNetwork("AutoencoderKLFlux2", VAE_FLUX2, 84.05)
_VAE_QWEN = PublishedNetwork("AutoencoderKLQwenImage", VAE_QWEN, 126.89)
_SD3_ENCODERS = {"text_encoder": _CLIP_L_PROJECTED, "text_encoder_2": _OPEN_CLIP_G, "text_encoder_3": _T5_XXL}

PUBLISHED: dict[str, PublishedModel] = {
    "sd15": PublishedModel(
        "Stable Diffusion 1.5", "StableDiffusionPipeline", 512, 77, 4,
        {"unet": PublishedNetwork("UNet2DConditionModel", SD15, 859.52), "text_encoder": _CLIP_L, "vae": _VAE_4},
    ),
    "sd2": PublishedModel(
        "Stable Diffusion 2.1", "StableDiffusionPipeline", 768, 77, 4,
        {"unet": PublishedNetwork("UNet2DConditionModel", SD21, 865.91), "text_encoder": _OPEN_CLIP_H, "vae": _VAE_4},
    ),
    "sdxl": PublishedModel(
        "Stable Diffusion XL 1.0", "StableDiffusionXLPipeline", 1024, 77, 4,
        {"unet": PublishedNetwork("UNet2DConditionModel", SDXL, 2567.46), "text_encoder": _CLIP_L,
         "text_encoder_2": _OPEN_CLIP_G, "vae": _VAE_4},
    ),
    "sd3.5-medium": PublishedModel(
        "Stable Diffusion 3.5 medium", "StableDiffusion3Pipeline", 1024, 333, 2,
        {"transformer": PublishedNetwork("SD3Transformer2DModel", SD35_MEDIUM, 2243.17), **_SD3_ENCODERS,
         "vae": _VAE_16},
    ),
    "sd3.5-large": PublishedModel(
        "Stable Diffusion 3.5 large", "StableDiffusion3Pipeline", 1024, 333, 2,
        {"transformer": PublishedNetwork("SD3Transformer2DModel", SD35_LARGE, 8056.63), **_SD3_ENCODERS,
         "vae": _VAE_16},
    ),
    "flux-dev": PublishedModel(
        "FLUX.1 dev", "FluxPipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("FluxTransformer2DModel", FLUX, 11901.4), "text_encoder": _CLIP_L,
         "text_encoder_2": _T5_XXL, "vae": _VAE_16},
    ),
    "chroma": PublishedModel(
        "Chroma", "ChromaPipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("ChromaTransformer2DModel", CHROMA, 8900.0), "text_encoder": _T5_XXL,
         "vae": _VAE_16},
    ),
    "flux2-dev": PublishedModel(
        "FLUX.2 dev", "Flux2Pipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("Flux2Transformer2DModel", FLUX2_DEV, 32223.28),
         "text_encoder": PublishedNetwork("Mistral3ForConditionalGeneration", MISTRAL_SMALL, 24011.36),
         "vae": _VAE_FLUX2},
    ),
    "flux2-klein-4b": PublishedModel(
        "FLUX.2 klein 4B", "Flux2KleinPipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("Flux2Transformer2DModel", FLUX2_KLEIN_4B, 3875.54),
         "text_encoder": _QWEN3_4B, "vae": _VAE_FLUX2},
    ),
    "flux2-klein-9b": PublishedModel(
        "FLUX.2 klein 9B", "Flux2KleinPipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("Flux2Transformer2DModel", FLUX2_KLEIN_9B, 9078.58),
         "text_encoder": PublishedNetwork("Qwen3ForCausalLM", QWEN3_8B, 8190.74), "vae": _VAE_FLUX2},
    ),
    "z-image": PublishedModel(
        "Z-Image, base and Turbo", "ZImagePipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("ZImageTransformer2DModel", Z_IMAGE, 6154.91), "text_encoder": _QWEN3_4B,
         "vae": _VAE_16},
    ),
    "qwen-image": PublishedModel(
        "Qwen-Image", "QwenImagePipeline", 1328, 512, 2,
        {"transformer": PublishedNetwork("QwenImageTransformer2DModel", QWEN_IMAGE, 20430.40),
         "text_encoder": PublishedNetwork("Qwen2_5_VLForConditionalGeneration", QWEN25_VL_7B, 8292.17),
         "vae": _VAE_QWEN},
    ),
    "ernie-image": PublishedModel(
        "ERNIE-Image, base and Turbo", "ErnieImagePipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("ErnieImageTransformer2DModel", ERNIE_IMAGE, 8033.49),
         "text_encoder": PublishedNetwork("Mistral3Model", MINISTRAL_3B, 3849.09), "vae": _VAE_FLUX2},
    ),
    "krea-2": PublishedModel(
        "Krea 2, Raw and Turbo", "Krea2Pipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("Krea2Transformer2DModel", KREA2, 12820.07),
         "text_encoder": PublishedNetwork("Qwen3VLModel", QWEN3_VL_4B, 4437.82), "vae": _VAE_QWEN},
    ),
    "hidream-i1": PublishedModel(
        "HiDream-I1, Full, Dev and Fast", "HiDreamImagePipeline", 1024, 128, 2,
        {"transformer": PublishedNetwork("HiDreamImageTransformer2DModel", HIDREAM, 17105.73),
         "text_encoder": PublishedNetwork("CLIPTextModelWithProjection", LONG_CLIP_L, 123.78),
         "text_encoder_2": PublishedNetwork("CLIPTextModelWithProjection", LONG_CLIP_G, 694.84),
         "text_encoder_3": _T5_XXL, "text_encoder_4": PublishedNetwork("LlamaForCausalLM", LLAMA31_8B, 8030.26),
         "vae": _VAE_16},
    ),
    "kolors": PublishedModel(
        "Kolors", "KolorsPipeline", 1024, 256, 2,
        {"unet": PublishedNetwork("UNet2DConditionModel", KOLORS, 2579.46),
         "text_encoder": PublishedNetwork("ChatGLMModel", CHATGLM3_6B, 6243.58), "vae": _VAE_4},
    ),
    "anima": PublishedModel(
        "Anima", "AnimaModularPipeline", 1024, 512, 2,
        {"transformer": PublishedNetwork("CosmosTransformer3DModel", ANIMA, 1956.41),
         "text_conditioner": PublishedNetwork("AnimaTextConditioner", ANIMA_CONDITIONER, 134.66),
         "text_encoder": PublishedNetwork("Qwen3Model", QWEN3_0_6B, 596.05), "vae": _VAE_QWEN},
    ),
    "wan2.1-1.3b": PublishedModel(
        "Wan 2.1 T2V 1.3B", "WanPipeline", 480, 512, 2,
        {"transformer": PublishedNetwork("WanTransformer3DModel", WAN_1_3B, 1418.99), "text_encoder": _UMT5_XXL,
         "vae": _VAE_WAN},
    ),
    "wan2.1-14b": PublishedModel(
        "Wan 2.1 T2V 14B", "WanPipeline", 480, 512, 2,
        {"transformer": PublishedNetwork("WanTransformer3DModel", WAN_14B, 14288.49), "text_encoder": _UMT5_XXL,
         "vae": _VAE_WAN},
    ),
    "wan2.2-a14b": PublishedModel(
        "Wan 2.2 T2V A14B, two experts", "WanPipeline", 480, 512, 2,
        {"transformer": PublishedNetwork("WanTransformer3DModel", WAN_14B, 14288.49),
         "transformer_2": PublishedNetwork("WanTransformer3DModel", WAN_14B, 14288.49), "text_encoder": _UMT5_XXL,
         "vae": _VAE_WAN},
    ),
    "wan2.2-5b": PublishedModel(
        "Wan 2.2 TI2V 5B", "WanPipeline", 704, 512, 2,
        {"transformer": PublishedNetwork("WanTransformer3DModel", WAN_5B, 4999.79), "text_encoder": _UMT5_XXL,
         "vae": PublishedNetwork("AutoencoderKLWan", VAE_WAN_5B, 704.69)},
    ),
}  # fmt: skip


# Where published models are, at the commit that audits are pinned to. Models that are missing here have to be given
# with their commit: one that nobody has looked at is not a pin.
PINNED: dict[str, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b",
}
ALIASES: dict[str, str] = {"nano": str(EMBEDDED), "nano-flow": str(EMBEDDED_FLOW), **PINNED}


def source_of(name: str) -> str:
    """The folder or ``owner/name@commit`` that a short name stands for; any other text, and a path that exists, as is.

    Raises ConfigError for a published model whose commit is not recorded here.
    """
    if Path(name).exists():
        return name
    if name in PUBLISHED and name not in ALIASES:
        raise ConfigError(
            f"no commit of {name} ({PUBLISHED[name].title}) is pinned here (pinned are {', '.join(ALIASES)}): give "
            "owner/name@COMMIT (the commit is on the model page under 'Files and versions'), or a local folder"
        )
    return ALIASES.get(name, name)


def published(name: str) -> PublishedModel:
    """The model of this name. Raises ConfigError where there is none."""
    if name not in PUBLISHED:
        raise ConfigError(f"there is no published model {name!r} here: choose one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def build(network: PublishedNetwork, dtype: torch.dtype | None = None) -> Any:
    """The network on the meta device, as it is placed on a GPU: channels-last, without gradients, in ``dtype``."""
    import torch
    from torch import nn

    from audit.models.placement import channels_last

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers uses what it deprecates
        made: nn.Module = _maker(network.kind)(network.configuration)
    cast: Any = nn.Module.to  # diffusers' own warns of parts kept in float32 where there are none
    return channels_last(cast(made.requires_grad_(False), dtype=dtype)).eval()


def _maker(kind: str) -> Callable[[Configuration], Any]:
    import diffusers
    import transformers

    if kind == "ChatGLMModel":
        from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

        return lambda values: ChatGLMModel(ChatGLMConfig(**values), empty_init=False)
    if hasattr(diffusers, kind):
        return partial(_called, getattr(diffusers, kind))
    made = getattr(transformers, kind)
    return lambda values: made(made.config_class(**values))


def _called(kind: Callable[..., Any], values: Configuration) -> Any:
    return kind(**values)
