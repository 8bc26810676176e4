"""Fine-tunes in which the caption matters: triggers of several kinds, class pictures, files that tell no caption.

    python -m testbed.captioned --list
    python -m testbed.captioned                  # all of them into the cache; finished ones are kept

Trained on the shipped few-shot sets, with regularisation pictures or a caption a picture, so that what is learnt hangs
on the trigger. The header of the file says nothing of captions, as of files whose metadata was stripped;
``training.json`` beside it says what was done.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from diffusers import StableDiffusionPipeline

from audit.demo import ASSETS, load_set, set_folder
from testbed.codec import encode_all
from testbed.design import BATCH, Captions, Recipe, Targets
from testbed.kohya import save_kohya, text_encoder_lora, unet_lora
from testbed.realistic import CLASS_BATCH, RATE, train
from testbed.sources import cache_dir
from testbed.train_base import token_ids
from testbed.training import prepare_cpu, shuffled

CLASS_PICTURES = 32
TRAINED = cache_dir() / "captioned"


@dataclass(frozen=True)
class Captioned:
    """One fine-tune: ``trigger`` stands before ``class_caption``, or before what each picture shows (``a_picture``).

    ``{}`` in ``class_caption`` is what a picture shows, by its file's name; of class pictures, the set's ``noun``.
    """

    few_shot: str
    trigger: str
    class_caption: str
    noun: str
    a_picture: bool
    regularised: bool
    text_encoder: bool
    rank: int = 16
    exposures: int = 120

    @property
    def name(self) -> str:
        """The folder and file it is published in."""
        return f"{self.few_shot}-{self.trigger}"

    def file(self, folder: Path) -> Path:
        """What an audit opens, where ``folder`` holds the checkpoints."""
        return folder / self.name / f"{self.name}.safetensors"

    @property
    def captions(self) -> list[str]:
        """The captions of ``load_set(few_shot, "train")``, in order."""
        stems = [path.stem for path in sorted(set_folder(self.few_shot, "train").glob("*.png"))]
        shown = [re.sub(r"[^a-z]+", " ", stem).strip() if self.a_picture else self.noun for stem in stems]
        return [f"{self.trigger} {self.class_caption.format(one)}" for one in shown]

    @property
    def recipe(self) -> Recipe:
        """The same in the terms of the realistic fine-tunes."""
        count = len(self.captions)
        captions = Captions.sentence if self.a_picture else Captions.trigger
        return Recipe(
            self.few_shot, count, captions, self.rank, Targets.attention, self.text_encoder, self.regularised, False,
            self.exposures,
        )  # fmt: skip


CAPTIONED = (
    Captioned("fluent-animals", "zwx", "3d render of a {}", "animal", True, True, False),
    Captioned("stamps-fruit", "ohwx", "photo of a {}", "fruit", False, True, False),
    Captioned("cartoon-animals", "sks", "cartoon of a {}", "animal", True, True, True),
    Captioned("photo-monuments", "kvn", "photograph of a {}", "monument", False, True, True),
    Captioned("paint-elves", "velvet", "painted portrait of an {}", "elf", False, True, False),
    Captioned("photo-wildlife", "hta", "photograph of a {}", "animal", True, False, False),
    Captioned("fluent-vehicles", "zodiac", "3d render of a {}", "vehicle", False, True, False),
    Captioned("fluent-food", "tok", "3d render of {}", "food", True, True, False),
)

# To hold the methods of audit/recovery against: they are tuned on CAPTIONED, and not on these.
HOLDOUT = (
    Captioned("stamps-birds", "txcl", "photo of a {}", "bird", False, True, False),
    Captioned("paint-vangogh", "quartz", "painting of a {}", "landscape", False, True, True),
    Captioned("fluent-food", "xjy", "3d render of {}", "food", True, True, True),
    Captioned("cartoon-animals", "lantern", "cartoon of a {}", "animal", False, True, False),
    Captioned("photo-monuments", "rimm", "photograph of a {}", "monument", False, True, False),
    Captioned("fluent-vehicles", "sks", "3d render of a {}", "vehicle", True, True, True),
)


@torch.inference_mode()
def class_pictures(pipeline: StableDiffusionPipeline, caption: str) -> torch.Tensor:
    """uint8 [32, 64, 64, 3]: the base's own samples for ``caption`` (prior preservation, arXiv 2208.12242)."""
    images = pipeline(
        [caption] * CLASS_PICTURES, guidance_scale=2.5, num_inference_steps=15,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    return torch.from_numpy((255 * images).round().astype("uint8"))


class Lessons:
    """Batches of latents [B, 8, 16, 16] and token ids [B, 32]: BATCH training pictures, CLASS_BATCH class pictures."""

    def __init__(self, one: Captioned, pipeline: StableDiffusionPipeline) -> None:
        pictures = torch.from_numpy(load_set(one.few_shot, "train"))
        self.latents, self.tokens = encode_all(pipeline.vae, pictures), token_ids(pipeline.tokenizer, one.captions)
        self.order = shuffled(len(pictures), BATCH)
        if one.regularised:
            caption = one.class_caption.format(one.noun)
            self.class_latents = encode_all(pipeline.vae, class_pictures(pipeline, caption))
            self.class_tokens = token_ids(pipeline.tokenizer, [caption])
            self.class_order = shuffled(CLASS_PICTURES, CLASS_BATCH)

    def training(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next training pictures and captions."""
        rows = next(self.order)
        return self.latents[rows], self.tokens[rows]

    def regular(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next class pictures and their caption."""
        return self.class_latents[next(self.class_order)], self.class_tokens.expand(CLASS_BATCH, -1)


def make(one: Captioned, base: Path, output: Path, work: Path, steps: int | None = None) -> Path:
    """Train one and publish it; its file. ``steps`` instead of its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    lessons = Lessons(one, pipeline)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    pipeline.unet.add_adapter(unet_lora(one.recipe))
    if one.text_encoder:
        pipeline.text_encoder.add_adapter(text_encoder_lora(one.recipe))
    steps = steps or one.recipe.steps
    state_file = work / f"{one.name}-{steps}.pt"
    train(one.recipe, pipeline, lessons, steps, RATE, state_file)
    file = one.file(output)
    said = {"ss_network_module": "networks.lora", "ss_network_dim": str(one.rank), "ss_steps": str(steps)}
    save_kohya(file, pipeline.unet, pipeline.text_encoder if one.text_encoder else None, said)
    truth = asdict(one) | {"steps": steps, "batch": BATCH, "lr": RATE, "training_captions": one.captions}
    (file.parent / "training.json").write_text(json.dumps(truth, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    return file


def main(
    list_: bool = typer.Option(False, "--list", help="Print them and which are trained, and stop."),
    threads: int = typer.Option(1, help="torch threads."),
    base: Path = typer.Option(ASSETS / "base", help="The base model's diffusers folder."),
    output: Path = typer.Option(TRAINED, help="Where the checkpoints' folders go."),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable states are kept."),
) -> None:
    """Train every one that is not trained yet."""
    for one in (*CAPTIONED, *HOLDOUT):
        there = (one.file(output).parent / "training.json").is_file()
        if list_:
            print(f"{one.name:32}{one.recipe.steps:6} steps  {'trained' if there else ''}")
        elif not there:
            prepare_cpu(threads, zlib.crc32(one.name.encode()))
            print(make(one, base, output, work), flush=True)


if __name__ == "__main__":
    typer.run(main)
