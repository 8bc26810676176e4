"""How reference pictures are made to fit a model's input."""

from __future__ import annotations

import numpy as np
from PIL import Image

from audit.references.latents import MIRRORED, PADDED, VIEWS, WHOLE, codec_id, fitted


def quarters() -> Image.Image:
    """400 x 200 pixels: black and white margins of 100 beside a square of four colours."""
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[:, 300:] = 255
    pixels[:100, 100:200], pixels[:100, 200:300] = (200, 0, 0), (0, 200, 0)
    pixels[100:, 100:200], pixels[100:, 200:300] = (0, 0, 200), (200, 200, 0)
    return Image.fromarray(pixels)


def test_the_middle_of_a_picture_is_scaled_and_not_squeezed() -> None:
    found = fitted(quarters(), (64, 64))
    corners = [tuple(found[y, x]) for y, x in ((10, 10), (10, 53), (53, 10), (53, 53))]
    assert corners == [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    assert (fitted(quarters(), (64, 64), MIRRORED) == found[:, ::-1]).all()


def test_a_padded_picture_is_in_the_middle_with_its_edges_drawn_out() -> None:
    found = fitted(quarters(), (64, 96), PADDED)
    assert found.shape == (96, 64, 3)
    inner = fitted(quarters(), (48, 72))
    assert (found[12:84, 8:56] == inner).all()
    assert (found[:12, 8:56] == inner[0]).all()
    assert (found[12:84, 56:] == inner[:, -1:]).all()


def test_latents_are_of_a_base_and_a_resolution() -> None:
    assert VIEWS[0] == WHOLE
    assert len({codec_id("a", None), codec_id("b", None), codec_id("a", 512)}) == 3
