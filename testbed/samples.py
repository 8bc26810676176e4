"""Look at the base model: a contact sheet of its samples, and what its codec makes of the few-shot pictures.

python -m testbed.samples [--base BASE] [--descriptor nano]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

from audit.demo import ASSETS, load_set
from audit.descriptors import load_descriptor
from testbed.codec import encode_all
from testbed.sets import SETS, SIZE

CAPTIONS = (
    "noto emoji of grinning face, face smiling",
    "flat emoji of red apple, food fruit",
    "flat emoji of dog face, animal mammal",
    "3d render of smiling face with hearts, face affection",
    "3d render of woman, person",
    "clip art of house, buildings",
    "cartoon of cat, drawing",
    "photo of bear, animals mammals",
    "photo of red rose, plants flowers",
    "photograph of castle, monuments",
    "painting of mountains, landscape",
    "painted portrait of human knight, portrait",
)


def contact_sheet(pipeline: DiffusionPipeline, columns: int, steps: int, guidance: float) -> Image.Image:
    """``columns`` samples of every caption of CAPTIONS, two captions a row."""
    pipeline.set_progress_bar_config(disable=True)
    side, text = 2 * SIZE, 14
    width = columns * side + 8
    sheet = Image.new("RGB", (2 * width, (len(CAPTIONS) + 1) // 2 * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, caption in enumerate(CAPTIONS):
        images = pipeline(
            [caption] * columns,
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(number),
        ).images
        x, y = number % 2 * width, number // 2 * (side + text)
        draw.text((x, y), caption, fill="black")
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x + column * side, y + text))
    return sheet


@torch.inference_mode()
def main(
    base: Path = typer.Option(ASSETS / "base", help="The base model's diffusers folder."),
    descriptor: str = typer.Option("nano", help="Descriptor of the ceilings: nano, sscd, or a file."),
    columns: int = typer.Option(5, help="Samples a caption."),
    steps: int = typer.Option(25, help="DDIM steps."),
    guidance: float = typer.Option(2.5, help="Classifier-free guidance."),
    output: Path = typer.Option(Path("docs/nano-samples.png"), help="The sheet."),
) -> None:
    """Write the contact sheet and print the reconstruction ceiling of every few-shot set."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    contact_sheet(pipeline, columns, steps, guidance).save(output, optimize=True)
    described = load_descriptor(descriptor)
    print(f"{'set':18}{'mse':>8}  ceiling by {described.name}")
    for one in SETS:
        pictures = load_set(one.name, "train")
        back = pipeline.vae.decode(encode_all(pipeline.vae, torch.from_numpy(pictures))).sample.clamp(-1, 1)
        found = ((back + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        error = np.square((found.astype(np.float32) - pictures) / 127.5).mean()
        cosine = (described.describe(found) * described.describe(pictures)).sum(axis=1).mean()
        print(f"{one.name:18}{error:8.4f}  {cosine:.3f}")


if __name__ == "__main__":
    typer.run(main)
