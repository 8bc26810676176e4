"""PDQ, Meta's 256-bit perceptual hash (ThreatExchange): corroborates a descriptor match."""

from __future__ import annotations

import numpy as np
from PIL import Image

from audit.descriptors.base import Descriptor
from audit.descriptors.facts import DescriptorFacts
from audit.descriptors.kinds import DescriptorKind

MATCH_DISTANCE = 31
MIN_QUALITY = 50


def pdq_hash(image: Image.Image | np.ndarray) -> tuple[bytes, int]:
    """The hash (32 bytes) and its quality (0 to 100; below 50 it says little) of a PIL image or uint8 [H, W, 3]."""
    import pdqhash

    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    bits, quality = pdqhash.compute(np.ascontiguousarray(pixels))
    return np.packbits(bits.astype(np.uint8)).tobytes(), int(quality)


def pdq_distance(first: bytes, second: bytes) -> int:
    """Differing bits, 0 to 256; at most 31 is a match."""
    return (int.from_bytes(first, "big") ^ int.from_bytes(second, "big")).bit_count()


class PdqDescriptor(Descriptor):
    """PDQ as a descriptor: each bit is +1/16 or -1/16, so that the cosine is 1 - distance / 128.

    The threshold is the cosine of distance 31. It finds copies, not crops or recoloured versions.
    """

    def __init__(self) -> None:
        self.name = "pdq"
        self.dimensions = 256
        self.threshold = 1 - MATCH_DISTANCE / 128
        self.input_size = 64  # what PDQ itself reduces a picture to

    def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        packed, _ = pdq_hash(image)
        return np.unpackbits(np.frombuffer(packed, np.uint8)).astype(np.float32) / 8 - 1 / 16

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        return batch


class Pdq(DescriptorKind):
    """It is code, and needs no file."""

    name = "pdq"

    def facts(self) -> DescriptorFacts:
        """It is always there."""
        made = PdqDescriptor()
        return DescriptorFacts(self.name, made.name, made.threshold, made.input_size)

    def load(self, device: str) -> Descriptor:
        """It runs on the CPU."""
        return PdqDescriptor()


DESCRIPTOR = Pdq()
