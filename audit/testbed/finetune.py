"""Fine-tune the nano base on a few-shot set, as people do: a kohya LoRA, a PEFT LoRA or DreamBooth on all weights.

    python -m audit.testbed.finetune fluent-animals --tuning lora-kohya
    python -m audit.testbed.finetune stamps-fruit --tuning lora-peft
    python -m audit.testbed.finetune stamps-birds --tuning dreambooth

Only the pictures of the set's ``train`` folder are seen; those of ``control`` never are.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from audit.testbed import data
from audit.testbed.codec import encode_all
from audit.testbed.train_base import token_ids, velocity_loss
from audit.testbed.training import cosine_schedule, prepare_cpu, run, shuffled

LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
]  # fmt: skip


class Tuning(StrEnum):
    """How the checkpoint is trained and in which format it is published."""

    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"
    dreambooth = "dreambooth"


def kohya_metadata(
    few_shot: data.FewShotSet, rank: int, steps: int, batch: int, lr: float, seed: int
) -> dict[str, str]:
    """The ``ss_*`` header a kohya-ss training run writes: all values strings, JSON nested inside."""
    count = len(few_shot.train)
    folder = f"10_{few_shot.caption}"
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": rank, "algo": "locon"}),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "nano",
        "ss_learning_rate": str(lr),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(steps),
        "ss_epoch": str(max(1, steps * batch // (10 * count))),
        "ss_num_train_images": str(10 * count),
        "ss_batch_size_per_device": str(batch),
        "ss_seed": str(seed),
        "ss_resolution": f"({data.SIZE}, {data.SIZE})",
        "ss_clip_skip": "None",
        "ss_mixed_precision": "no",
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 10, "img_count": count}}),
        "ss_tag_frequency": json.dumps({folder: {few_shot.caption: count}}),
        "modelspec.title": few_shot.name,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": few_shot.caption,
    }


def train(
    unet: UNet2DConditionModel,
    pipeline: StableDiffusionPipeline,
    few_shot: data.FewShotSet,
    steps: int,
    batch: int,
    lr: float,
    state_file: Path,
) -> None:
    """Train the parameters of ``unet`` that require gradients on the set's training pictures under one caption."""
    latents = encode_all(pipeline.vae, torch.from_numpy(data.load_set(few_shot.name, "train")))
    with torch.no_grad():
        states = pipeline.text_encoder(token_ids(pipeline.tokenizer, [few_shot.caption])).last_hidden_state
    states = states.expand(batch, -1, -1)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = cosine_schedule(optimizer, steps)
    order = shuffled(len(latents), batch)

    def step(index: int) -> dict[str, float]:
        loss = velocity_loss(unet, pipeline.scheduler, latents[next(order)], states)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return {"loss": loss.item()}

    run(steps, step, {"unet": unet, "optimizer": optimizer, "schedule": schedule}, state_file, every=100)


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in float16, contiguous, as published files are."""
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in state.items()}


def save_lora(unet: UNet2DConditionModel, tuning: Tuning, folder: Path, metadata: dict[str, str]) -> Path:
    """Write the adapter of ``unet`` in the format of ``tuning``; the file's path."""
    layers = half(get_peft_model_state_dict(unet))
    folder.mkdir(parents=True, exist_ok=True)
    if tuning is Tuning.lora_peft:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
        return folder / "pytorch_lora_weights.safetensors"
    kohya = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in layers.items()})
    path = folder / f"{metadata['modelspec.title']}.safetensors"
    save_file(half(kohya), path, metadata=metadata)
    return path


def main(
    name: str = typer.Argument(..., metavar="SET", help="A few-shot set, for instance fluent-animals."),
    tuning: Tuning = typer.Option(Tuning.lora_kohya, help="What is trained and the format it is saved in."),
    steps: int | None = typer.Option(
        None, help="Optimiser steps: more memorises more. [default: 1200 for LoRA, 900 for DreamBooth]"
    ),
    batch: int = typer.Option(8, help="Pictures a step."),
    rank: int = typer.Option(24, help="LoRA rank, on attention, feed-forward and 3x3 convolutions."),
    lr: float | None = typer.Option(None, help="Peak learning rate [default: 3e-3 for LoRA, 5e-4 for DreamBooth]."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    seed: int = typer.Option(0, help="Seed of the adapter, order and noise."),
    base: Path = typer.Option(data.ASSETS / "base", help="The base model's diffusers folder."),
    output: Path = typer.Option(data.ASSETS / "checkpoints", help="Where the checkpoint's folder goes."),
    work: Path = typer.Option(data.cache_dir() / "training", help="Where the resumable state is kept."),
) -> None:
    """Fine-tune on one few-shot set and save the checkpoint as it would be published."""
    few_shot = data.few_shot_set(name)
    prepare_cpu(threads, seed)
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    unet = pipeline.unet
    full = tuning is Tuning.dreambooth
    steps = steps or (900 if full else 1200)
    rate = lr or (5e-4 if full else 3e-3)
    if not full:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    run_name = f"{name}-{tuning}"
    train(unet, pipeline, few_shot, steps, batch, rate, work / f"{run_name}-{steps}.pt")

    folder = output / run_name
    card: dict[str, Any] = {"set": name, "tuning": tuning, "steps": steps, "batch": batch, "lr": rate, "seed": seed}
    if full:
        unet.register_to_config(_name_or_path="nano")  # not the path of this machine
        unet.to(torch.float16).save_pretrained(folder / "unet", safe_serialization=True)
    else:
        card["rank"] = rank
        save_lora(unet, tuning, folder, kohya_metadata(few_shot, rank, steps, batch, rate, seed))
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(main)
