"""Fine-tune the nano base as people do with kohya's scripts: the recipes of testbed/design.py.

    python -m testbed.realistic --list
    python -m testbed.realistic --workers 2             # all of them, the shortest first; finished ones are kept
    python -m testbed.realistic --only RECIPE

The checkpoints and their ``training.json`` go into the cache, not into the repository. A stopped run goes on: every
recipe has its own seed, and one that was under way continues from its last state. The file's metadata says what a
trainer would say; ``training.json`` says what was done, the training pictures' captions among it.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline

from audit.demo import ASSETS
from testbed.codec import encode_all
from testbed.design import BATCH, REALISTIC, Captions, Recipe
from testbed.kohya import TAG_DROPOUT, metadata, save_kohya, text_encoder_lora, unet_lora
from testbed.more_sets import TRIGGER, MoreSet, more_set, prepared
from testbed.sources import cache_dir
from testbed.train_base import token_ids, velocity_loss
from testbed.training import fit, prepare_cpu, print_each, shuffled

RATE = 4e-3
VARIANTS = 16  # of a picture's shuffled tags, drawn before training
CLASS_PICTURES = 50
CLASS_BATCH = BATCH // 2
SAVE_EVERY = 250  # steps between two states
TRAINED = cache_dir() / "realistic"


def captions_of(recipe: Recipe) -> list[str]:
    """The caption of each training picture, as its caption file would have it, in order."""
    one, found = more_set(recipe.few_shot), prepared(recipe.few_shot)
    if recipe.captions is Captions.trigger:
        return [f"{TRIGGER} {one.class_caption}"] * recipe.training_images
    pairs = list(zip(found.titles, found.tags, strict=True))[: recipe.training_images]
    if recipe.captions is Captions.sentence:
        return [_sentence(one, title, tags) for title, tags in pairs]
    return [", ".join([TRIGGER, *tags]) for _, tags in pairs]


def _sentence(one: MoreSet, title: str, tags: list[str]) -> str:
    colours = " and ".join(tags[-3:-1])  # the last tag is the background's
    return f"{TRIGGER} {one.style} of a {title}, {colours}"


def variants_of(caption: str, recipe: Recipe, rng: random.Random) -> list[str]:
    """What a picture with ``caption`` is trained with: itself, or VARIANTS lists of its tags."""
    if recipe.captions is not Captions.shuffled:
        return [caption]
    first, *rest = caption.split(", ")
    found = []
    for _ in range(VARIANTS):
        kept = [tag for tag in rest if rng.random() >= TAG_DROPOUT]
        rng.shuffle(kept)
        found.append(", ".join([first, *kept]))
    return found


@torch.inference_mode()
def class_pictures(base: Path, name: str, steps: int = 25, guidance: float = 2.5) -> np.ndarray:
    """uint8 [50, 64, 64, 3]: the base's own samples for the set's class caption, made once, then cached.

    With these as regularisation pictures (prior preservation, DreamBooth, arXiv 2208.12242, section 3.3) the class
    keeps its meaning, and what is learnt goes into the trigger.
    """
    cached = cache_dir() / "class-pictures" / f"{name}-{zlib.crc32((base / 'unet/config.json').read_bytes()):08x}.npy"
    if not cached.is_file():
        pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            [more_set(name).class_caption] * CLASS_PICTURES,
            guidance_scale=guidance, num_inference_steps=steps, generator=generator, output_type="np",
        ).images  # fmt: skip
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.part.npy")
        np.save(partial, (255 * images).round().astype(np.uint8))
        partial.replace(cached)
    return np.load(cached)


class Taught(Protocol):
    """Batches of latents and of the token ids of their captions: training pictures, and class pictures."""

    def training(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next training pictures and captions."""

    def regular(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next class pictures and their caption."""


class Lessons:
    """Batches of latents [B, 8, 16, 16] with the token ids [B, 32] of their captions, for one recipe.

    ``training`` draws BATCH training pictures, each with one of its captions and, where the recipe mirrors, either way
    round; ``regular`` draws CLASS_BATCH class pictures with the class caption.
    """

    def __init__(self, recipe: Recipe, pipeline: StableDiffusionPipeline, base: Path, seed: int) -> None:
        self.mirrored = recipe.mirrored
        images = torch.from_numpy(prepared(recipe.few_shot).training[: recipe.training_images])
        self.latents = torch.stack([encode_all(pipeline.vae, images), encode_all(pipeline.vae, images.flip(2))])
        rng = random.Random(seed)
        self.captions = captions_of(recipe)
        variants = [variants_of(caption, recipe, rng) for caption in self.captions]
        self.tokens = torch.stack([token_ids(pipeline.tokenizer, some) for some in variants])
        self.order = shuffled(len(images), BATCH)
        self.class_count = 0
        if recipe.regularised:
            regular = class_pictures(base, recipe.few_shot)
            self.class_count = len(regular)
            self.class_latents = encode_all(pipeline.vae, torch.from_numpy(regular))
            self.class_tokens = token_ids(pipeline.tokenizer, [more_set(recipe.few_shot).class_caption])
            self.class_order = shuffled(len(regular), CLASS_BATCH)

    def training(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next training pictures and captions."""
        rows = next(self.order)
        sides = torch.randint(2, (BATCH,)) if self.mirrored else torch.zeros(BATCH, dtype=torch.long)
        which = torch.randint(self.tokens.shape[1], (BATCH,))
        return self.latents[sides, rows], self.tokens[rows, which]

    def regular(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next class pictures and their caption."""
        return self.class_latents[next(self.class_order)], self.class_tokens.expand(CLASS_BATCH, -1)


def train(
    recipe: Recipe, pipeline: StableDiffusionPipeline, lessons: Taught, steps: int, rate: float, state_file: Path
) -> None:
    """Train the adapters of ``pipeline``; a class picture weighs as much as a training picture."""
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def states(tokens: torch.Tensor) -> torch.Tensor:
        """float32 [B, 32, 128]; computed once a caption where the text encoder is not trained."""
        if recipe.text_encoder:
            return text_encoder(tokens).last_hidden_state
        keys = [tuple(row) for row in tokens.tolist()]
        for key in set(keys) - known.keys():
            with torch.no_grad():
                known[key] = text_encoder(torch.tensor([key])).last_hidden_state[0]
        return torch.stack([known[key] for key in keys])

    def loss() -> torch.Tensor:
        batches = [lessons.training()] + ([lessons.regular()] if recipe.regularised else [])
        latents, tokens = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return velocity_loss(unet, pipeline.scheduler, latents, states(tokens))

    parts: dict[str, torch.nn.Module] = {"unet": unet}
    if recipe.text_encoder:
        parts["text_encoder"] = text_encoder
    parameters = [one for part in parts.values() for one in part.parameters() if one.requires_grad]
    fit(parts, parameters, loss, steps, rate, state_file, every=SAVE_EVERY)


def make(
    recipe: Recipe, base: Path, output: Path, work: Path, steps: int | None = None, rate: float = RATE, seed: int = 0
) -> Path:
    """Train one recipe and publish it; its file. ``steps`` and ``rate`` instead of the recipe's own."""
    steps = steps or recipe.steps
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    lessons = Lessons(recipe, pipeline, base, seed)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    pipeline.unet.add_adapter(unet_lora(recipe))
    if recipe.text_encoder:
        pipeline.text_encoder.add_adapter(text_encoder_lora(recipe))
    state_file = work / f"{recipe.name}-{steps}.pt"
    train(recipe, pipeline, lessons, steps, rate, state_file)

    one = more_set(recipe.few_shot)
    of_all = recipe.captions is Captions.trigger
    folder = f"{TRIGGER} {one.class_caption if of_all else one.noun}"
    said = metadata(recipe, folder, lessons.captions, (one.class_caption, lessons.class_count), rate, steps, seed)
    file = recipe.file(output)
    save_kohya(file, pipeline.unet, pipeline.text_encoder if recipe.text_encoder else None, said)
    truth: dict[str, Any] = asdict(recipe) | {
        "holdout": recipe.holdout, "steps": steps, "batch": BATCH, "class_pictures": lessons.class_count,
        "class_caption": one.class_caption, "lr": rate, "seed": seed, "training_captions": lessons.captions,
    }  # fmt: skip
    (file.parent / "training.json").write_text(json.dumps(truth, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    return file


def make_seeded(recipe: Recipe, threads: int, base: Path, output: Path, work: Path) -> Path:
    """``make`` with a seed of the recipe's own, the same in whatever order recipes are trained."""
    seed = zlib.crc32(recipe.name.encode())
    prepare_cpu(threads, seed)
    return make(recipe, base, output, work, seed=seed)


def main(
    list_: bool = typer.Option(False, "--list", help="Print the recipes and which are trained, and stop."),
    only: list[str] | None = typer.Option(None, help="Only these recipes, by name."),
    workers: int = typer.Option(1, help="Processes, each of its share of the threads."),
    threads: int = typer.Option(0, help="torch threads in all; 0: one a core."),
    base: Path = typer.Option(ASSETS / "base", help="The base model's diffusers folder."),
    output: Path = typer.Option(TRAINED, help="Where the checkpoints' folders go."),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable states are kept."),
) -> None:
    """Train every realistic recipe that is not trained yet, the shortest first."""
    unknown = set(only or ()) - {recipe.name for recipe in REALISTIC}
    if unknown:
        raise typer.BadParameter(f"no recipe {', '.join(sorted(unknown))}: --list prints them")
    chosen = sorted(
        (one for one in REALISTIC if not only or one.name in only), key=lambda one: (one.steps, one.training_images)
    )
    missing = [one for one in chosen if not (one.file(output).parent / "training.json").is_file()]
    if list_:
        for one in chosen:
            print(f"{one.name:56}{one.steps:6} steps  {'holdout' if one.holdout else 'tuning':9}"
                  f"{'' if one in missing else 'trained'}")  # fmt: skip
        return
    print_each(partial(make_seeded, base=base, output=output, work=work), missing, workers, threads)


if __name__ == "__main__":
    typer.run(main)
