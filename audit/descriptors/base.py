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

from audit.descriptors.facts import IMAGENET_MEAN, IMAGENET_STD, Spec
from audit.descriptors.pictures import MAX_PIXELS as MAX_PIXELS
from audit.descriptors.pictures import open_image as open_image
from audit.descriptors.pictures import read_picture as read_picture
from audit.fits import Fits


class Descriptor(ABC):
    """Turns images into unit vectors. Preprocessing is part of it: thresholds do not carry over to another.

    ``name`` identifies model and preprocessing in every table. ``threshold`` is the cosine from which two images
    count as a match (SSCD, arXiv 2202.10261: 0.75 is about 90 % precision for sscd_disc_mixup on DISC).
    """

    name: str
    dimensions: int
    threshold: float
    input_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
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

    def _take(self, spec: Spec, sha256: str) -> None:
        """Be what ``spec`` says, of the file with this hash."""
        self.name, self.threshold, self.input_size = spec.name(sha256), spec.threshold, spec.input_size
        self.mean, self.std = spec.mean, spec.std

    def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """float32 [3, S, S], squeezed to a square (SSCD's "skew" preprocessing) and normalised."""
        pixels = self._squeezed(image).astype(np.float32) / 255
        return ((pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).transpose(2, 0, 1)

    def _squeezed(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """uint8 [S, S, 3]: the whole picture in a square."""
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        size = (self.input_size, self.input_size)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
        return np.asarray(picture.convert("RGB"))

    @abstractmethod
    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        """float32 [N, dimensions] of prepared images, one behind the other."""


def to_png(image: np.ndarray | Image.Image) -> bytes:
    """Lossless PNG bytes of uint8 [H, W, 3] or a PIL image."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def stacked(images: Sequence[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3] of PIL images resized to ``size`` (width, height)."""
    return np.stack([np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images])
