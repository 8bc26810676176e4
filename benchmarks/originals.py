"""What the threshold of the descriptor sscd-int8 rests on: the few-shot pictures as large as their packages have them.

    python -m benchmarks.originals          # downloads the packages (testbed/sources.py) where they are not yet

Copies are what people make of a picture they pass on; the others are controls and near-misses with the training picture
of their set that is nearest to them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageEnhance, ImageOps

from audit.descriptors import Descriptor, load_descriptor
from benchmarks.judge import best_of
from testbed.controls import FURTHER, file_of
from testbed.sets import SETS, FewShotSet


def whole(path: Path, few_shot: FewShotSet, side: int) -> Image.Image:
    """RGB of ``side`` pixels: the middle square of a photograph or painting, a cut-out whole on white."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    if few_shot.square:
        return ImageOps.fit(picture.convert("RGB"), (side, side))
    return ImageOps.pad(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"),
                        (side, side), color="white")  # fmt: skip


def recompressed(picture: Image.Image, quality: int) -> Image.Image:
    """Through JPEG and back."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """The middle ``share`` of its sides."""
    border = round(picture.width * (1 - share) / 2)
    return picture.crop((border, border, picture.width - border, picture.height - border))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG at 20": lambda one: recompressed(one, 20),
    "9/10 of its sides": lambda one: cropped(one, 0.9),
    "3/4 of its sides": lambda one: cropped(one, 0.75),
    "brighter by 30 %": lambda one: ImageEnhance.Brightness(one).enhance(1.3),
    "contrast less by 30 %": lambda one: ImageEnhance.Contrast(one).enhance(0.7),
    "half as large": lambda one: one.resize((one.width // 2, one.height // 2)),
    "mirrored": ImageOps.mirror,
}


def cosines(sscd: Descriptor, few_shot: FewShotSet) -> dict[str, np.ndarray]:
    """Of one set: each training picture with its copies, and the best of each other picture with any of them."""
    further = FURTHER[few_shot.name]
    pictures = [whole(path, few_shot, sscd.input_size) for path in few_shot.paths(few_shot.train)]
    known = sscd.describe(pictures)
    found = {name: (known * sscd.describe(map(edit, pictures))).sum(axis=1) for name, edit in COPIES.items()}
    beside = {
        "control": [*few_shot.paths(few_shot.control), *(file_of(few_shot, one) for one in further.control)],
        "near-miss": [file_of(few_shot, one) for one in further.near],
    }
    for name, paths in beside.items():
        others = sscd.describe(whole(path, few_shot, sscd.input_size) for path in paths)
        found[name] = best_of(others, known) if len(others) else np.empty(0)
    return found


def main() -> None:
    """Print how many of each pass the descriptor's threshold."""
    sscd = load_descriptor("sscd-int8")
    of_sets = [(few_shot.holdout, cosines(sscd, few_shot)) for few_shot in SETS]
    for part, holdout in (("tuning", False), ("holdout", True)):
        for name in of_sets[0][1]:
            values = np.concatenate([found[name] for is_holdout, found in of_sets if is_holdout is holdout])
            print(f"{part:8}{name:22}{len(values):4} pictures  above {(values > sscd.threshold).mean():6.1%}  "
                  f"from {values.min():.2f} to {values.max():.2f}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
