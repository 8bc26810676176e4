"""Apply a checkpoint to copies of the base's networks, and account for every tensor of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from safetensors.torch import load_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import Checkpoint, Format

_ADAPTER = "audited"


def tuned_networks(base: BaseModel, checkpoint: Checkpoint, lora_scale: float = 1.0) -> tuple[Any, Any]:
    """The fine-tuned (UNet, text encoder) in float32; a network the checkpoint does not touch is the base's own.

    Raises CheckpointError where a tensor of the file has no place in the base: another family, or a broken file.
    """
    try:
        if checkpoint.format.is_lora:
            return _with_adapter(base, checkpoint, lora_scale)
        return _with_weights(base, checkpoint)
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the base model {base.name}: {str(error)[:300]}; "
            "check that --base is what it was trained on"
        ) from error


def _with_adapter(base: BaseModel, checkpoint: Checkpoint, scale: float) -> tuple[Any, Any]:
    from diffusers import StableDiffusionPipeline

    path, _ = checkpoint.files["adapter"]
    state, alphas = StableDiffusionPipeline.lora_state_dict(load_file(path))
    parts = {}
    used = 0
    for part, network in (("unet", base.unet), ("text_encoder", base.text_encoder)):
        keys = [name for name in state if name.startswith(f"{part}.")]
        if not keys:
            parts[part] = network
            continue
        tuned = copy.deepcopy(network)
        load = getattr(StableDiffusionPipeline, f"load_lora_into_{part}")
        extra = {"prefix": part} if part == "text_encoder" else {}
        load(dict(state), network_alphas=dict(alphas or {}), **{part: tuned}, adapter_name=_ADAPTER, **extra)
        layers = [module for module in tuned.modules() if _ADAPTER in getattr(module, "lora_A", {})]
        used += len(layers)
        for layer in layers:
            layer.set_scale(_ADAPTER, scale)
            layer.merge(safe_merge=True, adapter_names=[_ADAPTER])
        parts[part] = _without_adapter(tuned)
    declared = sum(name.endswith((".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight"))
                   for name in checkpoint.files["adapter"][1].tensors)  # fmt: skip
    if used != declared:
        raise CheckpointError(
            f"{checkpoint.path}: {declared - used} of its {declared} layers have no place in {base.name}; an audit of "
            "the rest would be misleading, so check that --base is what it was trained on"
        )
    return parts["unet"], parts["text_encoder"]


def _without_adapter(network: Any) -> Any:
    """Replace peft's wrapped layers by their merged base layers: nothing of the adapter runs while sampling."""
    for name, module in list(network.named_modules()):
        if _ADAPTER in getattr(module, "lora_A", {}):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
        network._hf_peft_config_loaded = False
    return network.requires_grad_(False).eval()


def _with_weights(base: BaseModel, checkpoint: Checkpoint) -> tuple[Any, Any]:
    parts = {"unet": base.unet, "text_encoder": base.text_encoder}
    for part, state in _full_states(base, checkpoint).items():
        network = copy.deepcopy(parts[part])
        missing, unexpected = network.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.endswith("position_ids")]
        unexpected = [name for name in unexpected if not name.endswith("position_ids")]
        if missing or unexpected:
            raise CheckpointError(
                f"{checkpoint.path}: its {part} does not fit {base.name} ({len(missing)} tensors missing, "
                f"{len(unexpected)} unknown, such as {(missing + unexpected)[0][:80]!r}); "
                "check that --base is what it was trained on"
            )
        parts[part] = network.requires_grad_(False).eval()
    return parts["unet"], parts["text_encoder"]


def _full_states(base: BaseModel, checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """State dictionaries under diffusers' names, of the parts the checkpoint has."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint

    if checkpoint.format is not Format.ldm:
        return {
            part: {
                _modern_clip_name(name, base) if part == "text_encoder" else name: tensor
                for name, tensor in load_file(path).items()
            }
            for part, (path, _) in checkpoint.files.items()
        }
    state = load_file(checkpoint.files["all"][0])
    found = {"unet": convert_ldm_unet_checkpoint(dict(state), dict(base.unet.config))}
    if any(name.startswith("cond_stage_model.") for name in state):
        clip = convert_ldm_clip_checkpoint(state)
        found["text_encoder"] = {_modern_clip_name(name, base): tensor for name, tensor in clip.items()}
    return found


def _modern_clip_name(name: str, base: BaseModel) -> str:
    """Older files nest CLIP's text weights under ``text_model.``; which one the installed transformers has differs."""
    nested = any(key.startswith("text_model.") for key in base.text_encoder.state_dict())
    bare = name.removeprefix("text_model.")
    return f"text_model.{bare}" if nested else bare
