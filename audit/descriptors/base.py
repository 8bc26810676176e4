"""The interface of a descriptor, and pictures as arrays and files."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice

import numpy as np
from PIL import Image

from audit.descriptors.pictures import MAX_PIXELS as MAX_PIXELS
from audit.descriptors.pictures import open_image as open_image
from audit.descriptors.pictures import read_picture as read_picture
from audit.fits import Fits

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class Descriptor(ABC):
    """Turns images into unit vectors. Preprocessing is part of it: thresholds do not carry over to another.

    ``name`` identifies model and preprocessing in every table. ``threshold`` is the cosine from which two images
    count as a match (SSCD, arXiv 2202.10261: 0.75 is about 90 % precision for sscd_disc_mixup on DISC).
    """

    name: str
    dimensions: int
    threshold: float
    input_size: int
    batch_size: int = 64
    device: str = "cpu"

    def describe(
        self, images: Iterable[Image.Image | np.ndarray], threads: ThreadPoolExecutor | None = None
    ) -> np.ndarray:
        """Unit vectors float32 [N, dimensions] of PIL images or uint8 arrays [H, W, 3], in order.

        ``threads`` prepare the images where they are given. Batches are as large as fits into the device's memory.
        Raises DeviceMemoryError where a single image does not.
        """
        vectors: list[np.ndarray] = []
        remaining = iter(images)
        while some := list(islice(remaining, self.batch_size)):
            vectors.append(self.describe_prepared(list((threads.map if threads else map)(self.prepare, some))))
        return np.concatenate(vectors) if vectors else np.empty((0, self.dimensions), np.float32)

    def prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """What ``describe`` needs of an image: small, however large the image is."""
        return self._prepare(image)

    def describe_prepared(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors float32 [N, dimensions] of one batch of what ``prepare`` has made, one at least."""
        batch = np.stack(prepared)
        slices = self._fits.slices("describe", batch, self._vectors, len(batch), self.device)
        found = np.concatenate([part for _, part in slices]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)

    @cached_property
    def _fits(self) -> Fits:
        return Fits()

    def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """float32 [3, S, S], squeezed to a square (SSCD's "skew" preprocessing), ImageNet-normalised."""
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        size = (self.input_size, self.input_size)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
        pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
        return ((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)

    @abstractmethod
    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        """float32 [N, dimensions] of prepared images [N, 3, S, S]."""


def to_png(image: np.ndarray | Image.Image) -> bytes:
    """Lossless PNG bytes of uint8 [H, W, 3] or a PIL image."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def stacked(images: Sequence[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3] of PIL images resized to ``size`` (width, height)."""
    return np.stack([np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images])
