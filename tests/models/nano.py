"""Random nano models of every family, of diffusers' and transformers' own classes, seeded."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AnimaTextConditioner,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    DDIMScheduler,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
    XLMRobertaTokenizerFast,
)

from audit.models.base import BaseModel, load_base, locate_base

WORDS = ["a", "photo", "of", "painting", "sks", "dog", "cat", "red", "the", "in", "style"]
TOKENS = 16
CHAT_TOKENS = 48  # with what stands around a caption
KEPT = tempfile.TemporaryDirectory()


def clip_tokenizer() -> CLIPTokenizer:
    """Letters alone, as CLIP writes them."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789<>-_,."]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def word_tokenizer(kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast) -> Any:
    """Whole words, with T5's special tokens."""
    vocab = {name: number for number, name in enumerate(["<pad>", "</s>", "<unk>", "<s>", "<mask>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer, words.normalizer = WhitespaceSplit(), Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def clip(kind: type, width: int, seed: int, act: str = "quick_gelu", layers: int = 3) -> Any:
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=width, hidden_act=act,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1,
        )
    )  # fmt: skip


def t5(width: int) -> T5EncoderModel:
    torch.manual_seed(5)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    encoder.shared.weight.data.mul_(0.3)
    return encoder


def vae(channels: int, **options: Any) -> AutoencoderKL:
    torch.manual_seed(6)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        sample_size=64, **options,
    )  # fmt: skip


def unet(width: int, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(7)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=8, **options,
    )  # fmt: skip


def scheduler(beta_end: float = 0.012, **options: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=beta_end, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, **options,
    )  # fmt: skip


def sd1() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae(4), clip(CLIPTextModel, 32, 1), clip_tokenizer(), unet(32), scheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def sd2() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae(4), clip(CLIPTextModel, 32, 1, "gelu"), clip_tokenizer(), unet(32, use_linear_projection=True),
        scheduler(prediction_type="v_prediction"), None, None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    denoiser = unet(
        64, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32, **added,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae(4, force_upcast=True), clip(CLIPTextModel, 32, 1), clip(CLIPTextModelWithProjection, 32, 2, "gelu"),
        clip_tokenizer(), clip_tokenizer(), denoiser, scheduler(), add_watermarker=False,
    )  # fmt: skip


def alt() -> Any:
    from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
        RobertaSeriesConfig,
        RobertaSeriesModelWithTransformation,
    )

    torch.manual_seed(3)
    encoder = RobertaSeriesModelWithTransformation(
        RobertaSeriesConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=TOKENS + 2, project_dim=32, type_vocab_size=1, layer_norm_eps=1e-5,
        )
    )  # fmt: skip
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [("<mask>", 0.0)]
    tokenizer = XLMRobertaTokenizerFast(vocab=pieces, model_max_length=TOKENS)
    return diffusers.AltDiffusionPipeline(
        vae(4), encoder, tokenizer, unet(32), scheduler(), None, None, requires_safety_checker=False
    )


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def sd3() -> Any:
    torch.manual_seed(8)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=vae(4, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(CLIPTextModelWithProjection, 16, 1), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 32, 2, "gelu"), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(64), tokenizer_3=word_tokenizer(),
    )  # fmt: skip


def flux(guidance: bool = True) -> Any:
    torch.manual_seed(9)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(CLIPTextModel, 32, 1), tokenizer=clip_tokenizer(), text_encoder_2=t5(32),
        tokenizer_2=word_tokenizer(), transformer=transformer,
    )  # fmt: skip


def chroma() -> Any:
    torch.manual_seed(10)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=2,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=t5(32), tokenizer=word_tokenizer(), transformer=transformer,
    )  # fmt: skip


def qwen_tokenizer() -> Any:
    """Words, signs and line ends, with the special tokens of Qwen's chats."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    mistral = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    chat = ["user", "assistant", "system", "<think>", "</think>"]
    words = Tokenizer(
        models.WordLevel({name: n for n, name in enumerate([*special, *mistral, *chat, *WORDS])}, "<unk>")
    )
    words.pre_tokenizer, words.normalizer = Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True), Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=special[0], eos_token=special[2], unk_token="<unk>",
        bos_token=special[0], model_max_length=CHAT_TOKENS, additional_special_tokens=[*special[1:3], *mistral],
    )  # fmt: skip


def qwen3(width: int, layers: int, kind: type = Qwen3ForCausalLM) -> Any:
    torch.manual_seed(11)
    return kind(
        Qwen3Config(
            vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, head_dim=4,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, tie_word_embeddings=True,
        )
    )  # fmt: skip


def flux2_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(6)
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=64,
    )  # fmt: skip
    torch.nn.init.normal_(made.bn.running_mean)
    torch.nn.init.uniform_(made.bn.running_var, 0.5, 2)
    return made


def flux2_transformer(text: int, guidance: bool) -> Flux2Transformer2DModel:
    torch.manual_seed(12)
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def klein(is_distilled: bool = False) -> Any:
    return diffusers.Flux2KleinPipeline(
        flow(use_dynamic_shifting=True, shift=3.0), flux2_vae(), qwen3(8, 27), qwen_tokenizer(),
        flux2_transformer(24, False), is_distilled,
    )  # fmt: skip


def mistral(kind: type = Mistral3ForConditionalGeneration, width: int = 8, layers: int = 30) -> Any:
    torch.manual_seed(11)
    text = {
        "model_type": "mistral", "vocab_size": 32, "hidden_size": width, "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "initializer_range": 0.3,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return kind(Mistral3Config(text_config=text, vision_config=vision))


def flux2() -> Any:
    return diffusers.Flux2Pipeline(
        flow(use_dynamic_shifting=True, shift=3.0), flux2_vae(), mistral(), qwen_tokenizer(),
        flux2_transformer(24, True),
    )  # fmt: skip


def z_image() -> Any:
    torch.manual_seed(13)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        flow(shift=6.0),
        vae(4, shift_factor=0.1, scaling_factor=0.4),
        qwen3(16, 3, Qwen3Model),
        qwen_tokenizer(),
        transformer,
    )


def qwen_vl(width: int) -> Any:
    torch.manual_seed(11)
    text = {
        "vocab_size": 32, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(6)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.5, 0.2, 0.1, 0.4], latents_std=[2.0, 1.5, 0.7, 1.1],
    )  # fmt: skip


def qwen_image() -> Any:
    torch.manual_seed(14)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        flow(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02, base_image_seq_len=256),
        qwen_vae(),
        qwen_vl(16),
        qwen_tokenizer(),
        transformer,
    )


def umt5(width: int) -> UMT5EncoderModel:
    torch.manual_seed(5)
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    encoder.shared.weight.data.mul_(0.3)
    return encoder


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(6)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.5, 0.2, 0.1, 0.4], latents_std=[2.0, 1.5, 0.7, 1.1], scale_factor_spatial=4,
        scale_factor_temporal=2,
    )  # fmt: skip


def wan_transformer(seed: int, channels: int = 4) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=32,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def unipc(shift: float) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def wan() -> Any:
    return diffusers.WanPipeline(word_tokenizer(), umt5(32), wan_vae(), unipc(3.0), wan_transformer(15))


def wan22(boundary: float = 0.875) -> Any:
    """Two experts: the one for much noise, and the one for little."""
    high, low = wan_transformer(15), wan_transformer(17)
    return diffusers.WanPipeline(word_tokenizer(), umt5(32), wan_vae(), unipc(3.0), high, low, boundary_ratio=boundary)


def wan_5b_vae() -> AutoencoderKLWan:
    torch.manual_seed(6)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, patch_size=2, in_channels=12,
        out_channels=12, is_residual=True, temperal_downsample=[False, True], scale_factor_spatial=8,
        scale_factor_temporal=2,
        latents_mean=[-0.5, 0.2, 0.1, 0.4, 0.0, 0.3, -0.1, 0.2], latents_std=[2.0, 1.5, 0.7, 1.1, 1.0, 0.8, 1.2, 0.9],
    )  # fmt: skip


def wan_5b() -> Any:
    return diffusers.WanPipeline(
        word_tokenizer(), umt5(32), wan_5b_vae(), unipc(5.0), wan_transformer(18, 8), expand_timesteps=True
    )


def ernie_image() -> Any:
    torch.manual_seed(15)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return diffusers.ErnieImagePipeline(
        transformer, flux2_vae(), mistral(Mistral3Model, 16, 3), qwen_tokenizer(), flow(shift=4.0)
    )


def qwen3_vl(width: int, layers: int) -> Any:
    torch.manual_seed(11)
    text = {
        "vocab_size": 32, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def krea2(is_distilled: bool = False) -> Any:
    torch.manual_seed(16)
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        flow(use_dynamic_shifting=True, max_image_seq_len=6400),
        qwen_vae(),
        qwen3_vl(16, 3),
        qwen_tokenizer(),
        transformer,
        (1, 2),
        is_distilled,
    )


def hidream(**options: Any) -> Any:
    torch.manual_seed(17)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[24, 16], text_emb_dim=48, axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16), llama_layers=[0, 1, 2, 2], **options,
    )  # fmt: skip
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, bos_token_id=3, eos_token_id=1,
        )
    )  # fmt: skip
    return diffusers.HiDreamImagePipeline(
        scheduler=unipc(3.0), vae=vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(CLIPTextModelWithProjection, 16, 1), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 32, 2, "gelu"), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(24), tokenizer_3=word_tokenizer(), text_encoder_4=llama, tokenizer_4=word_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def pieces(kind: str = "bpe") -> bytes:
    """A model of sentencepiece, trained on WORDS."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 9), model_writer=made, vocab_size=48, model_type=kind,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def chatglm_tokenizer() -> Any:
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    file = Path(KEPT.name) / "tokenizer.model"  # it is read again when the tokenizer is saved
    file.write_bytes(pieces())
    return ChatGLMTokenizer(str(file))


def kolors() -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    torch.manual_seed(18)
    config = ChatGLMConfig(
        num_layers=3, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=32, kv_channels=8, num_attention_heads=2,
        seq_length=256, add_qkv_bias=True, multi_query_attention=True, multi_query_group_num=1, original_rope=True,
    )  # fmt: skip
    encoder = ChatGLMModel(config, empty_init=False)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    denoiser = unet(
        32, use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16, encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    noise = scheduler(beta_end=0.014, num_train_timesteps=1080, timestep_spacing="trailing")
    return diffusers.KolorsPipeline(vae(4, force_upcast=True), encoder, chatglm_tokenizer(), denoiser, noise)


def anima() -> Any:
    torch.manual_seed(17)
    transformer = CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )  # fmt: skip
    torch.manual_seed(18)
    conditioner = AnimaTextConditioner(
        source_dim=16, target_dim=16, model_dim=16, num_layers=2, num_attention_heads=2, target_vocab_size=32,
        min_sequence_length=TOKENS,
    )  # fmt: skip
    pipeline = diffusers.AnimaModularPipeline()
    pipeline.register_components(
        text_encoder=qwen3(16, 3, Qwen3Model), tokenizer=qwen_tokenizer(), t5_tokenizer=word_tokenizer(),
        text_conditioner=conditioner, transformer=transformer, vae=qwen_vae(), scheduler=flow(shift=3.0),
    )  # fmt: skip
    return pipeline


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1": sd1, "sd2": sd2, "sdxl": sdxl, "alt": alt, "sd3": sd3, "flux": flux, "chroma": chroma,
    "klein": klein, "z-image": z_image, "qwen": qwen_image, "ernie": ernie_image, "krea2": krea2, "wan": wan,
    "hidream": hidream, "anima": anima,
    "wan22": wan22, "wan-5b": wan_5b,
}  # fmt: skip


# families of others with one thing changed: another text encoder, guidance as an input
MORE: dict[str, Callable[[], Any]] = {"flux2": flux2, "kolors": kolors}


def make(name: str, folder: Path) -> BaseModel:
    """A family's nano model, saved and loaded as any base model is."""
    path = folder / name
    if not path.exists():
        pipeline = (FAMILIES | MORE)[name]()
        for part in ("unet", "transformer"):
            if getattr(pipeline, part, None) is not None:
                for parameter in getattr(pipeline, part).parameters():  # away from the zeros of fresh output layers
                    if parameter.abs().max() == 0:
                        torch.nn.init.normal_(parameter, std=0.3 / math.sqrt(parameter.shape[-1]))
        pipeline.save_pretrained(str(path), safe_serialization=True)
    return load_base(locate_base(str(path)))
