"""nano-128, a testbed of 128x128 pixels: its pictures in one file, its codec, and what an independent judge says of it.

python -m testbed.nano128 pack                                          # needs the network, once
python -m testbed.nano128 train --device cuda --batch 64 --steps 4000   # needs that one file only
python -m testbed.nano128 judge                                         # SSCD of pictures and reconstructions
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from audit.descriptors.facts import Spec
from audit.descriptors.networks import OnnxDescriptor
from audit.descriptors.sscd_int8 import DESCRIPTOR, LABEL, SHA256
from testbed import data
from testbed.codec128 import SIZE, new_codec, reconstructed, train_codec
from testbed.packed import LOSSLESS, read_packed, write_packed
from testbed.sets import SETS, prepared
from testbed.sources import cache_dir
from testbed.training import prepare_cpu

MEBIBYTE = 2**20
MOST = 50 * MEBIBYTE
QUALITY = 92
PART = "15MB"  # below 16 MiB
LEAST_MEAN, LEAST_SET = 0.80, 0.65

app = typer.Typer(no_args_is_help=True, add_completion=False, help=(__doc__ or "").split("\n")[0])
PICTURES = typer.Option(cache_dir() / "nano128-pictures.safetensors", help="The packed file of pictures.")
CODEC = typer.Option(cache_dir() / "nano128" / "vae", help="The codec's diffusers folder.")


@app.command()
def pack(pictures: Path = PICTURES, crops: int = typer.Option(2, help="Times the usual crops of scenes.")) -> None:
    """Collect the pretraining pictures and the few-shot sets at 128 pixels and write them into one file."""
    groups = {"pretraining": data.collect(SIZE, crops)}
    for one in SETS:
        for part, names in (("train", one.train), ("control", one.control)):
            images = np.stack([np.asarray(prepared(one, path, SIZE)) for path in one.paths(names)])
            captions = [one.caption_of(name) for name in names]
            groups[f"{one.name}/{part}"] = data.Pictures(images, captions, [one.source] * len(names))
    write_packed(pictures, groups, {name: QUALITY if name == "pretraining" else LOSSLESS for name in groups})
    size = pictures.stat().st_size
    print(f"{pictures}: {len(groups['pretraining'].images)} pretraining pictures, {size / MEBIBYTE:.1f} MiB")
    if size > MOST:
        raise typer.BadParameter(f"{pictures} is over {MOST // MEBIBYTE} MiB: fewer --crops")


@app.command()
def train(
    pictures: Path = PICTURES,
    output: Path = CODEC,
    state: Path = typer.Option(cache_dir() / "training" / "nano128.pt", help="What an interrupted run goes on from."),
    steps: int = typer.Option(3000, help="Steps in all."),
    batch: int = typer.Option(8, help="Pictures a step."),
    lr: float = typer.Option(6e-5, help="The highest learning rate."),
    noise: float = typer.Option(
        0.03, help="Noise on the latents, in their deviations: what the decoder learns to bear."
    ),
    latents: int = typer.Option(32, help="Latent channels."),
    width: int = typer.Option(1, help="Channels, in multiples of 16, 40, 64, 128."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int = typer.Option(1, help="torch threads; 0: one a core."),
    every: int = typer.Option(50, help="Steps between two saved states."),
    seed: int = typer.Option(0, help="Seed of weights, order and noise."),
) -> None:
    """Train the codec and write it in safetensors parts of at most 16 MiB; an interrupted run goes on."""
    prepare_cpu(threads, seed)
    images = torch.from_numpy(read_packed(pictures, "pretraining").images)
    codec = train_codec(
        new_codec(latents, width), images, steps, state, batch=batch, lr=lr, noise=noise, device=device, every=every
    )
    save(codec, output)
    print(f"{output}: {sum(one.stat().st_size for one in output.glob('*.safetensors')) / MEBIBYTE:.1f} MiB")


def save(codec: AutoencoderKL, output: Path) -> None:
    """Write a codec as a diffusers folder, in safetensors parts of at most 16 MiB."""
    codec.register_to_config(_name_or_path="nano-128")  # not the path of this machine
    codec.save_pretrained(output, max_shard_size=PART)


@app.command()
def judge(
    pictures: Path = PICTURES,
    codec: Path = CODEC,
    sheet: Path = typer.Option(Path("docs/nano128-codec.png"), help="The contact sheet to write."),
    table: Path = typer.Option(Path("benchmarks/results/nano128.json"), help="The table to write."),
    threads: int = typer.Option(1, help="torch threads; 0: one a core."),
) -> None:
    """Print and write, a few-shot set, what the codec keeps: SSCD's cosine and the mean squared error.

    Without the package of the judge it says which to install.
    """
    prepare_cpu(threads, 0)
    network = AutoencoderKL.from_pretrained(codec)
    views = {
        name: OnnxDescriptor(DESCRIPTOR.path(), Spec(LABEL, side, 1.0, SHA256), threads)
        for name, side in (("288", 288), ("native", SIZE))
    }
    found, shown = {}, []
    for one in SETS:
        images = read_packed(pictures, f"{one.name}/train").images
        again = reconstructed(network, torch.from_numpy(images))
        error = np.square((again.astype(np.float32) - images) / 127.5).mean()
        ceilings = {
            f"ceiling_{name}": float((view.describe(images) * view.describe(again)).sum(1).mean())
            for name, view in views.items()
        }
        found[one.name] = {**ceilings, "mse": float(error), "pictures": len(images)}
        shown.append((one.name, images, again))
        print(
            f"{one.name:18}" + "  ".join(f"{name} {value:.4g}" for name, value in found[one.name].items()), flush=True
        )
    at_288 = [one["ceiling_288"] for one in found.values()]
    met = bool(np.mean(at_288) >= LEAST_MEAN and min(at_288) >= LEAST_SET)
    said = {"mean_ceiling_288": float(np.mean(at_288)), "least_ceiling_288": min(at_288), "ceilings_suffice": met}
    print(f"mean {said['mean_ceiling_288']:.3f} of {LEAST_MEAN}, least {said['least_ceiling_288']:.3f} of {LEAST_SET}")
    about = {"latent_channels": network.config["latent_channels"], "channels": network.config["block_out_channels"]}
    table.write_text(json.dumps({**said, **about, "sets": found}, indent=1) + "\n")
    contact_sheet(shown).save(sheet, optimize=True)


def contact_sheet(sets: list[tuple[str, np.ndarray, np.ndarray]], pairs: int = 4) -> Image.Image:
    """A row a set: ``pairs`` pictures, each uint8 [H, W, 3] beside its reconstruction."""
    text = 14
    sheet = Image.new("RGB", (2 * pairs * SIZE, len(sets) * (SIZE + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images, again) in enumerate(sets):
        y = row * (SIZE + text)
        draw.text((2, y), name, fill="black")
        beside = [one for pair in zip(images[:pairs], again[:pairs], strict=True) for one in pair]
        for column, pixels in enumerate(beside):
            sheet.paste(Image.fromarray(pixels), (column * SIZE, y + text))
    return sheet


if __name__ == "__main__":
    app()
