"""Bases derived from nano, as Pony and Illustrious are from SDXL, and LoRAs that were trained on them.

    python -m testbed.derived --output DIR [--steps 1600]

"child" and "sibling" are nano with all weights of its UNet trained further, each on pictures of its own; "merged" is
the mean of both, as people merge models. No picture of a set of ``SETS`` was shown to them: those are the few-shot sets
of the LoRAs. Fine-tunes of nano itself ("parent") are the shipped ones. What is there is kept, and a stopped run goes
on. Nothing of it is shipped.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from audit.demo import ASSETS, FINE_TUNES, load_set
from testbed.codec import encode_all
from testbed.controls import controls, near_misses
from testbed.finetune import Recipe, Strength, Tuning, make
from testbed.sets import few_shot_set, training_captions
from testbed.train_base import token_ids, velocity_loss
from testbed.training import fit, prepare_cpu, shuffled

PARENT = ASSETS / "base"
SETS = ("fluent-animals", "stamps-fruit", "cartoon-animals")
LESSONS = {
    "child": ("photo-wildlife", "photo-monuments", "paint-vangogh", "paint-elves"),
    "sibling": ("fluent-food", "fluent-vehicles", "stamps-birds"),
}
STEPS = 1600
RATE = 5e-4
BATCH = 8
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class FineTune:
    """One fine-tune: the base it was trained on, its recipe, and the seed of its adapter, order and noise."""

    base: str
    recipe: Recipe
    seed: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.recipe.name} on {self.base}" + (f", seed {self.seed}" if self.seed else "")


_LORAS = {name: Recipe(name, Tuning.lora_kohya) for name in SETS}
TRAINED = (
    FineTune("child", _LORAS["fluent-animals"]),
    FineTune("child", _LORAS["stamps-fruit"]),
    FineTune("sibling", _LORAS["fluent-animals"]),
    FineTune("parent", Recipe("fluent-animals", Tuning.lora_kohya, Strength.weak), 1),
    FineTune("child", Recipe("stamps-fruit", Tuning.dreambooth, Strength.weak)),
    FineTune("child", _LORAS["cartoon-animals"]),
)
SHIPPED = {
    "fluent-animals-lora-kohya on parent": FINE_TUNES["lora-kohya"].path,
    "stamps-fruit-lora-peft on parent": FINE_TUNES["lora-peft"].path,
    "stamps-birds-dreambooth on parent": FINE_TUNES["dreambooth"].path,
}


@dataclass(frozen=True)
class Derived:
    """Where the bases and the fine-tunes of each are, below one folder."""

    folder: Path

    def base(self, name: str) -> Path:
        """The diffusers folder of "parent", "child", "sibling" or "merged"."""
        return PARENT if name == "parent" else self.folder / "bases" / name

    def place(self, one: FineTune) -> Path:
        """The folder that ``one`` is published in."""
        return self.folder / "fine-tunes" / f"{one.base}-{one.seed}"

    def file(self, one: FineTune) -> Path:
        """What an audit opens."""
        return one.recipe.file(self.place(one))


def lesson(name: str) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 [N, 64, 64, 3] that a base is trained on, and a caption each."""
    pictures, captions = [], []
    for one in LESSONS[name]:
        few_shot = few_shot_set(one)
        train, further = load_set(one, "train"), np.concatenate([controls(one), near_misses(one)])
        pictures += [train, further]
        captions += [*training_captions(one), *[few_shot.captions[0]] * len(further)]
    return np.concatenate(pictures), captions


def make_base(name: str, derived: Derived, steps: int, threads: int) -> Path:
    """Train all weights of the UNet further on the lesson; the folder of the new base."""
    folder = derived.base(name)
    if folder.is_dir():
        return folder
    prepare_cpu(threads, 1 + sorted(LESSONS).index(name))
    pipeline = StableDiffusionPipeline.from_pretrained(PARENT, safety_checker=None, dtype=torch.float32)
    pictures, captions = lesson(name)
    latents = encode_all(pipeline.vae, torch.from_numpy(pictures))
    with torch.no_grad():
        states = pipeline.text_encoder(token_ids(pipeline.tokenizer, captions)).last_hidden_state
    order, unet = shuffled(len(latents), BATCH), pipeline.unet.train()

    def loss() -> torch.Tensor:
        chosen = next(order)
        return velocity_loss(unet, pipeline.scheduler, latents[chosen], states[chosen])

    state = derived.folder / "states" / f"{name}-{steps}.pt"
    fit({"unet": unet}, list(unet.parameters()), loss, steps, RATE, state)
    _publish(folder, {key: one.to(torch.float16).contiguous() for key, one in unet.state_dict().items()})
    return folder


def merge_bases(derived: Derived, names: tuple[str, str] = ("child", "sibling"), share: float = 0.5) -> Path:
    """The mean of two bases' UNets, ``share`` of the first; the folder of the new base."""
    folder = derived.base("merged")
    if not folder.is_dir():
        first, second = (load_file(derived.base(name) / UNET) for name in names)
        mixed = {key: torch.lerp(second[key].float(), first[key].float(), share).half() for key in first}
        _publish(folder, mixed)
    return folder


def _publish(folder: Path, unet: dict[str, Any]) -> None:
    """The parent with these weights in the place of its UNet's."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(PARENT, part)
    save_file(unet, part / UNET, metadata={"format": "pt"})
    part.replace(folder)


def make_fine_tune(one: FineTune, derived: Derived, threads: int) -> Path:
    """Train ``one`` on its base; its file or folder."""
    folder = derived.place(one)
    if not (folder / one.recipe.name / "training.json").is_file():
        prepare_cpu(threads, one.seed)
        make(one.recipe, derived.base(one.base), folder, derived.folder / "states" / folder.name, seed=one.seed)
    return derived.file(one)


def main(
    output: Path = typer.Option(..., help="The folder of the bases and the fine-tunes."),
    steps: int = typer.Option(STEPS, help="Optimiser steps of each base."),
    threads: int = typer.Option(1, help="torch threads."),
) -> None:
    """Make the derived bases, and the fine-tunes of each."""
    derived = Derived(output)
    for name in LESSONS:
        print(make_base(name, derived, steps, threads), flush=True)
    print(merge_bases(derived), flush=True)
    for one in TRAINED:
        print(make_fine_tune(one, derived, threads), flush=True)


if __name__ == "__main__":
    typer.run(main)
