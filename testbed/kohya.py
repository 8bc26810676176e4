"""Adapters in kohya's format: what sd-scripts adapts, how it names tensors, and what it says in the header.

Names and fields as kohya-ss/sd-scripts writes them (networks/lora.py, train_network.py), written anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from audit.study.adapters import kohya_names
from testbed.design import BATCH, Recipe, Targets

# all of a Transformer2DModel; with conv_dim also of resnets, down- and upsamplers
ATTENTION = r".*attentions\..*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"
CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut|time_emb_proj|downsamplers\.0\.conv|upsamplers\.0\.conv)"
THREE_BY_THREE = r".*\.(conv1|conv2|downsamplers\.0\.conv|upsamplers\.0\.conv)"
TEXT_ENCODER = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
REPEATS = 10
TAG_DROPOUT = 0.1


def unet_lora(recipe: Recipe) -> LoraConfig:
    """The adapter of the UNet: alpha is half the rank; 3x3 convolutions have half the rank and alpha."""
    rank = recipe.rank
    if recipe.targets is Targets.attention:
        return LoraConfig(r=rank, lora_alpha=rank // 2, target_modules=ATTENTION)
    return LoraConfig(
        r=rank,
        lora_alpha=rank // 2,
        target_modules=f"{ATTENTION}|{CONVOLUTIONS}",
        rank_pattern={THREE_BY_THREE: rank // 2},
        alpha_pattern={THREE_BY_THREE: rank // 4},
    )


def text_encoder_lora(recipe: Recipe) -> LoraConfig:
    """The adapter of the text encoder: all linear layers of attention and MLP."""
    return LoraConfig(r=recipe.rank, lora_alpha=recipe.rank // 2, target_modules=TEXT_ENCODER)


def kohya_tensors(network: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The adapter of ``network`` under kohya's names, float16, with an alpha a module: half its rank."""
    state = {name: one.detach().half().contiguous() for name, one in get_peft_model_state_dict(network).items()}
    return kohya_names(state, prefix, alpha=0.5)


def save_kohya(
    path: Path, unet: torch.nn.Module, text_encoder: torch.nn.Module | None, metadata: dict[str, str]
) -> None:
    """Write the adapters of ``unet`` and, where it has one, ``text_encoder`` as one file."""
    tensors = kohya_tensors(unet, "lora_unet")
    if text_encoder is not None:
        tensors |= kohya_tensors(text_encoder, "lora_te_text_model")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How many captions have each tag, split at commas."""
    return dict(Counter(tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip()))


def metadata(
    recipe: Recipe,
    folder: str,
    captions: Sequence[str],
    class_pictures: tuple[str, int],
    rate: float,
    steps: int,
    seed: int,
) -> dict[str, str]:
    """The header of a run of ``steps`` on the folder ``folder`` whose pictures have ``captions``.

    ``class_pictures``: the regularisation pictures' class and their number, 0 without.
    """
    class_tokens, class_count = class_pictures
    directory, regular = f"{REPEATS}_{folder}", f"1_{class_tokens}"
    shuffled = recipe.captions == "shuffled"
    frequency = {directory: tag_frequency(captions)}
    if class_count:
        frequency[regular] = tag_frequency([class_tokens] * class_count)
    seen = REPEATS * len(captions)
    fields: dict[str, object] = {
        "ss_output_name": recipe.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": recipe.rank,
        "ss_network_alpha": float(recipe.rank // 2),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "nano",
        "ss_learning_rate": rate,
        "ss_unet_lr": rate,
        "ss_text_encoder_lr": rate if recipe.text_encoder else None,
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))",
        "ss_lr_scheduler": "cosine",
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_epoch": max(1, steps * BATCH // seen),
        "ss_num_epochs": max(1, steps * BATCH // seen),
        "ss_num_train_images": seen,
        "ss_num_reg_images": class_count,
        "ss_batch_size_per_device": BATCH,
        "ss_total_batch_size": BATCH,
        "ss_resolution": "(64, 64)",
        "ss_seed": seed,
        "ss_clip_skip": None,
        "ss_mixed_precision": "no",
        "ss_cache_latents": True,
        "ss_flip_aug": recipe.mirrored,
        "ss_color_aug": False,
        "ss_random_crop": False,
        "ss_shuffle_caption": shuffled,
        "ss_keep_tokens": int(shuffled),
        "ss_caption_tag_dropout_rate": TAG_DROPOUT if shuffled else 0.0,
        "ss_caption_dropout_rate": 0.0,
        "ss_prior_loss_weight": 1.0,
        "ss_dataset_dirs": json.dumps({directory: {"n_repeats": REPEATS, "img_count": len(captions)}}),
        "ss_reg_dataset_dirs": json.dumps({regular: {"n_repeats": 1, "img_count": class_count}} if class_count else {}),
        "ss_tag_frequency": json.dumps(frequency),
        "modelspec.title": recipe.name,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "64x64",
    }
    if recipe.targets is Targets.convolutions:
        conv = {"conv_dim": str(recipe.rank // 2), "conv_alpha": str(float(recipe.rank // 4))}
        fields["ss_network_args"] = json.dumps(conv)
    return {name: str(value) for name, value in fields.items()}
