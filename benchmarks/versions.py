"""Versions of a picture: what a reference may be beside the training picture, and the views that are measured of it."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Change = Callable[[np.ndarray], np.ndarray]  # uint8 [N, H, W, 3] to the same


def _each(change: Callable[[Image.Image], Image.Image]) -> Change:
    def changed(pictures: np.ndarray) -> np.ndarray:
        size = pictures.shape[2], pictures.shape[1]
        return np.stack(
            [np.asarray(change(Image.fromarray(one)).convert("RGB").resize(size, Image.Resampling.LANCZOS))
             for one in pictures]
        )  # fmt: skip

    return changed


def cropped(share: float) -> Change:
    """The middle ``share`` of each side."""

    def crop(picture: Image.Image) -> Image.Image:
        cut = (1 - share) / 2
        width, height = picture.size
        return picture.crop((round(cut * width), round(cut * height), round((1 - cut) * width),
                             round((1 - cut) * height)))  # fmt: skip

    return _each(crop)


def padded(share: float) -> Change:
    """The picture in the middle ``share`` of each side, its edges drawn out."""

    def pad(pictures: np.ndarray) -> np.ndarray:
        side = pictures.shape[1]
        inner = round(share * side)
        before, after = (side - inner) // 2, side - inner - (side - inner) // 2
        small = np.stack(
            [np.asarray(Image.fromarray(one).resize((inner, inner), Image.Resampling.LANCZOS)) for one in pictures]
        )
        return np.pad(small, ((0, 0), (before, after), (before, after), (0, 0)), mode="edge")

    return pad


def _jpeg(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=30)
    return Image.open(buffer)


VERSIONS: dict[str, Change] = {
    "whole": lambda pictures: pictures,
    "mirrored": _each(ImageOps.mirror),
    "crop 75 %": cropped(0.75),
    "JPEG q30": _each(_jpeg),
    "brightness 1.3": _each(lambda picture: ImageEnhance.Brightness(picture).enhance(1.3)),
    "grey": _each(ImageOps.grayscale),
}
VIEWS: dict[str, Change] = {
    "whole": VERSIONS["whole"], "mirrored": VERSIONS["mirrored"], "crop 75 %": VERSIONS["crop 75 %"],
    "padded 75 %": padded(0.75),
}  # fmt: skip
VIEW_SETS = (
    ("whole",), ("whole", "mirrored"), ("whole", "mirrored", "padded 75 %"), ("whole", "mirrored", "crop 75 %"),
    ("whole", "mirrored", "padded 75 %", "crop 75 %"),
)  # fmt: skip
