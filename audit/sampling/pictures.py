"""Whether what was sampled are pictures at all.

A wrong base model, or one whose configuration says another prediction type, does not fail: it samples noise, in which
no reference is found. "Nothing found" would be said of a model that nobody has looked into.
"""

from __future__ import annotations

import numpy as np

NOT_SAMPLED = "no picture was sampled: only membership was asked for"
NOISE = 0.85  # mean difference of neighbours over deviation, on the grid of the latents: white noise has 1.13
FLAT = 2.0  # levels of 255
MOST_OF_THEM = 0.5
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def statistics(image: np.ndarray, cell: int) -> tuple[float, float]:
    """(contrast, roughness) of uint8 [H, W, 3], averaged over cells of ``cell`` pixels, those of one latent.

    contrast: standard deviation of the luminance, in levels. roughness: mean absolute difference of neighbouring cells
    over that deviation; pictures have 0.1 to 0.7, independent latents about 1.
    """
    height, width = image.shape[0] // cell * cell, image.shape[1] // cell * cell
    grey = image[:height, :width].astype(np.float32) @ _LUMINANCE
    cells = grey.reshape(height // cell, cell, width // cell, cell).mean(axis=(1, 3))
    contrast = float(cells.std())
    steps = (np.abs(np.diff(cells, axis=0)).mean() + np.abs(np.diff(cells, axis=1)).mean()) / 2
    return contrast, float(steps) / max(contrast, 1e-6)


def not_pictures(contrast: np.ndarray, roughness: np.ndarray) -> str | None:
    """What is wrong with the sampled images [N] in words; None where most of them can be pictures."""
    flat, noise = contrast < FLAT, roughness > NOISE
    share = float((flat | noise).mean())
    if share <= MOST_OF_THEM:
        return None
    what = "noise" if noise.sum() >= flat.sum() else "of one colour"
    return (
        f"{share:.0%} of the sampled images are no pictures but {what}: check that --base is what the file was trained "
        "on, and the guidance weight"
    )
