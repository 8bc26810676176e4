"""Augmentation of training pictures: a habit of trainers, or a defence against extraction.

Cutout (arXiv 1708.04552) blanks a square of half the side anywhere; RandAugment (arXiv 1909.13719) applies 2 operations
of magnitude 10 of 30.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from audit.study.factors import Augmentation

VERSIONS = 64  # of every picture under a defence
GREY = 127


def versions_of(
    pictures: np.ndarray, augmentation: Augmentation, seed: int = 0, versions: int = VERSIONS
) -> Iterator[np.ndarray]:
    """Versions of ``pictures`` uint8 [N, H, W, 3], one after the other and in their order: themselves without any.

    Mirrored are 2, the pictures and their mirror images; under a defence they are ``versions``.
    """
    if augmentation in (Augmentation.none, Augmentation.mirrored):
        yield pictures
        if augmentation is Augmentation.mirrored:
            yield np.ascontiguousarray(pictures[:, :, ::-1])
        return
    rng = np.random.default_rng(seed)
    change = _cutout if augmentation is Augmentation.cutout else _randaugment
    for _ in range(versions):
        yield np.stack([change(picture, rng) for picture in pictures])


def _cutout(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = len(picture)
    y, x = rng.integers(0, side, 2)
    out = picture.copy()
    out[max(0, y - side // 4) : y + side // 4, max(0, x - side // 4) : x + side // 4] = GREY
    return out


def _randaugment(picture: np.ndarray, rng: np.random.Generator, operations: int = 2, m: float = 10 / 30) -> np.ndarray:
    image = Image.fromarray(picture)
    sign = rng.choice([-1, 1])
    side = image.width

    def affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=(GREY,) * 3)

    def enhance(kind: type) -> Image.Image:
        return kind(image).enhance(1 + sign * 0.9 * m)

    choices: list[Callable[[], Image.Image]] = [
        lambda: image,
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: image.rotate(sign * 30 * m, fillcolor=(GREY,) * 3),
        lambda: ImageOps.solarize(image, round(256 * (1 - m))),
        lambda: enhance(ImageEnhance.Color),
        lambda: ImageOps.posterize(image, round(8 - 4 * m)),
        lambda: enhance(ImageEnhance.Contrast),
        lambda: enhance(ImageEnhance.Brightness),
        lambda: enhance(ImageEnhance.Sharpness),
        lambda: affine(1, sign * 0.3 * m, 0, 0, 1, 0),
        lambda: affine(1, 0, 0, sign * 0.3 * m, 1, 0),
        lambda: affine(1, 0, sign * 0.45 * m * side, 0, 1, 0),
        lambda: affine(1, 0, 0, 0, 1, sign * 0.45 * m * side),
    ]
    for _ in range(operations):
        sign = rng.choice([-1, 1])
        image = choices[rng.integers(len(choices))]()
    return np.asarray(image)
