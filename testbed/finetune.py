"""Fine-tune the nano base on a few-shot set, as people do: a kohya LoRA, a PEFT LoRA or DreamBooth on all weights.

    python -m testbed.finetune fluent-animals --tuning lora-kohya
    python -m testbed.finetune stamps-birds --tuning dreambooth --strength strong
    python -m testbed.finetune --all --workers 2        # every checkpoint of the testbed

Only the pictures of the set's ``train`` folder are seen; those of ``control`` never are. The number of steps grows
with the number of pictures, as in the paper (200 x N0 at batch 1, arXiv 2410.03039, section 5.1).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from audit.demo import ASSETS, load_set
from audit.study.adapters import half, kohya_names
from audit.study.augment import versions_of
from audit.study.factors import Augmentation
from testbed.codec import encode_all
from testbed.sets import SETS, SIZE, FewShotSet, few_shot_set, training_captions
from testbed.sources import cache_dir
from testbed.train_base import token_ids, velocity_loss
from testbed.training import fit, prepare_cpu, print_each, shuffled

LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
]  # fmt: skip


class Tuning(StrEnum):
    """How the checkpoint is trained and in which format it is published."""

    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"
    dreambooth = "dreambooth"


class Strength(StrEnum):
    """How long it is trained: longer memorises more."""

    weak = "weak"
    medium = "medium"
    strong = "strong"


class Defence(StrEnum):
    """Augmentation of the training pictures, as a defence against extraction."""

    none = "none"
    cutout = "cutout"
    randaugment = "randaugment"


STEPS_A_PICTURE = {Tuning.lora_kohya: 80, Tuning.lora_peft: 80, Tuning.dreambooth: 36}
STRENGTHS = {Strength.weak: 0.5, Strength.medium: 1.0, Strength.strong: 2.0}
RATES = {Tuning.lora_kohya: 3e-3, Tuning.lora_peft: 3e-3, Tuning.dreambooth: 5e-4}
BATCH = 8
RANK = 24
TRAINED = Path(__file__).parent / "checkpoints"  # those that come along are in audit/demo/assets/checkpoints


@dataclass(frozen=True)
class Recipe:
    """One checkpoint of the testbed: everything that makes it, but the base and the seed."""

    few_shot: str
    tuning: Tuning
    strength: Strength = Strength.medium
    defence: Defence = Defence.none

    @property
    def name(self) -> str:
        """The folder it is published in."""
        parts = [self.few_shot, self.tuning]
        parts += [self.strength] if self.strength is not Strength.medium else []
        parts += [self.defence] if self.defence is not Defence.none else []
        return "-".join(parts)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        pictures = len(few_shot_set(self.few_shot).train)
        return round(STEPS_A_PICTURE[self.tuning] * pictures * STRENGTHS[self.strength])

    def file(self, folder: Path) -> Path:
        """What an audit opens, where ``folder`` holds the testbed's checkpoints."""
        if self.tuning is Tuning.dreambooth:
            return folder / self.name
        single = f"{self.few_shot}.safetensors" if self.tuning is Tuning.lora_kohya else PEFT_FILE
        return folder / self.name / single


PEFT_FILE = "pytorch_lora_weights.safetensors"
RECIPES = (
    *(Recipe(one.name, Tuning.lora_kohya) for one in SETS),
    *(Recipe(one.name, Tuning.dreambooth) for one in SETS),
    Recipe("stamps-fruit", Tuning.lora_peft),
    *(
        Recipe(name, Tuning.lora_kohya, strength)
        for name in ("fluent-animals", "photo-monuments")
        for strength in (Strength.weak, Strength.strong)
    ),
    *(
        Recipe("fluent-animals", Tuning.lora_kohya, defence=defence)
        for defence in (Defence.cutout, Defence.randaugment)
    ),
)


def kohya_metadata(few_shot: FewShotSet, rank: int, steps: int, batch: int, lr: float, seed: int) -> dict[str, str]:
    """The ``ss_*`` header a kohya-ss training run writes: all values strings, JSON nested inside."""
    count = len(few_shot.train)
    trigger = few_shot.caption.replace("{}", "").strip()
    folder = f"10_{trigger}"
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
        "ss_resolution": f"({SIZE}, {SIZE})",
        "ss_clip_skip": "None",
        "ss_mixed_precision": "no",
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 10, "img_count": count}}),
        "ss_tag_frequency": json.dumps({folder: Counter(training_captions(few_shot.name))}),
        "modelspec.title": few_shot.name,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": trigger,
    }


def train(
    unet: UNet2DConditionModel,
    pipeline: StableDiffusionPipeline,
    recipe: Recipe,
    steps: int,
    batch: int,
    lr: float,
    state_file: Path,
) -> None:
    """Train the parameters of ``unet`` that require gradients on the set's training pictures and their captions."""
    pictures = load_set(recipe.few_shot, "train")
    versions = defended(pictures, recipe.defence)
    latents = encode_all(pipeline.vae, torch.from_numpy(versions))
    with torch.no_grad():
        tokens = token_ids(pipeline.tokenizer, training_captions(recipe.few_shot))
        all_states = pipeline.text_encoder(tokens).last_hidden_state.repeat(len(versions) // len(pictures), 1, 1)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    order = shuffled(len(latents), batch)

    def loss() -> torch.Tensor:
        chosen = next(order)
        return velocity_loss(unet, pipeline.scheduler, latents[chosen], all_states[chosen])

    fit({"unet": unet}, parameters, loss, steps, lr, state_file, every=100)


def save_lora(unet: UNet2DConditionModel, tuning: Tuning, folder: Path, metadata: dict[str, str]) -> Path:
    """Write the adapter of ``unet`` in the format of ``tuning``; the file's path."""
    layers = half(get_peft_model_state_dict(unet))
    folder.mkdir(parents=True, exist_ok=True)
    if tuning is Tuning.lora_peft:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
        return folder / PEFT_FILE
    path = folder / f"{metadata['modelspec.title']}.safetensors"
    save_file(kohya_names(layers, "lora_unet"), path, metadata=metadata)
    return path


def defended(pictures: np.ndarray, defence: Defence, seed: int = 0) -> np.ndarray:
    """uint8 [V N, 64, 64, 3] of ``pictures`` [N, 64, 64, 3]: V versions of each; themselves without a defence."""
    return np.concatenate(list(versions_of(pictures, Augmentation(defence), seed)))


def make(
    recipe: Recipe,
    base: Path,
    output: Path,
    work: Path,
    steps: int | None = None,
    batch: int = BATCH,
    rank: int = RANK,
    lr: float | None = None,
    seed: int = 0,
) -> Path:
    """Train one checkpoint and publish it; its folder."""
    few_shot = few_shot_set(recipe.few_shot)
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    unet = pipeline.unet
    full = recipe.tuning is Tuning.dreambooth
    steps = steps or recipe.steps
    rate = lr or RATES[recipe.tuning]
    if not full:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    train(unet, pipeline, recipe, steps, batch, rate, work / f"{recipe.name}-{steps}.pt")

    folder = output / recipe.name
    card: dict[str, Any] = {
        "set": recipe.few_shot,
        "tuning": recipe.tuning,
        "strength": recipe.strength,
        "defence": recipe.defence,
        "steps": steps,
        "batch": batch,
        "lr": rate,
        "seed": seed,
    }
    if full:
        unet.register_to_config(_name_or_path="nano")  # not the path of this machine
        unet.to(torch.float16).save_pretrained(folder / "unet", safe_serialization=True)
    else:
        card["rank"] = rank
        save_lora(unet, recipe.tuning, folder, kohya_metadata(few_shot, rank, steps, batch, rate, seed))
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    return folder


def main(
    name: str | None = typer.Argument(None, metavar="SET", help="A few-shot set, for instance fluent-animals."),
    tuning: Tuning = typer.Option(Tuning.lora_kohya, help="What is trained and the format it is saved in."),
    strength: Strength = typer.Option(Strength.medium, help="How long it is trained."),
    defence: Defence = typer.Option(Defence.none, help="Augmentation of the training pictures."),
    all_: bool = typer.Option(False, "--all", help="Every checkpoint of the testbed; finished ones are kept."),
    workers: int = typer.Option(1, help="With --all: processes, each of its share of the threads."),
    steps: int | None = typer.Option(None, help="Optimiser steps, instead of those of the strength."),
    batch: int = typer.Option(BATCH, help="Pictures a step."),
    rank: int = typer.Option(RANK, help="LoRA rank, on attention, feed-forward and 3x3 convolutions."),
    lr: float | None = typer.Option(None, help="Peak learning rate [default: 3e-3 for LoRA, 5e-4 for DreamBooth]."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    seed: int = typer.Option(0, help="Seed of the adapter, order and noise."),
    base: Path = typer.Option(ASSETS / "base", help="The base model's diffusers folder."),
    output: Path = typer.Option(TRAINED, help="Where the checkpoints' folders go."),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable states are kept."),
) -> None:
    """Fine-tune on one few-shot set, or on all, and save the checkpoints as they would be published."""
    if all_ == (name is not None):
        raise typer.BadParameter("name one few-shot set, or give --all")
    recipes = list(RECIPES) if name is None else [Recipe(few_shot_set(name).name, tuning, strength, defence)]
    missing = [one for one in recipes if name or not (output / one.name / "training.json").is_file()]
    work_of = partial(
        _make_seeded, base=base, output=output, work=work, steps=steps, batch=batch, rank=rank, lr=lr, seed=seed
    )
    print_each(work_of, missing, workers, threads)


def _make_seeded(recipe: Recipe, threads: int, *, seed: int, **made: Any) -> Path:
    prepare_cpu(threads, seed)
    return make(recipe, seed=seed, **made)


if __name__ == "__main__":
    typer.run(main)
