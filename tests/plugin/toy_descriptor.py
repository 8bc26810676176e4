"""A descriptor: small pictures, stretched out."""

from __future__ import annotations

import numpy as np

from audit.descriptors.base import Descriptor
from audit.descriptors.facts import DescriptorFacts
from audit.descriptors.kinds import DescriptorKind


class ToyDescriptor(Descriptor):
    """The picture in 8 x 8 pixels, without its mean."""

    name, dimensions, threshold, input_size = "toy-8", 192, 0.9, 8

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        return batch.reshape(len(batch), -1) - batch.mean(axis=(1, 2, 3), keepdims=False)[:, None]


class Toy(DescriptorKind):
    """It is code alone."""

    name = "toy"

    def facts(self) -> DescriptorFacts:
        """It is always there."""
        return DescriptorFacts(self.name, ToyDescriptor.name, ToyDescriptor.threshold, ToyDescriptor.input_size)

    def load(self, device: str) -> Descriptor:
        """It runs on the CPU."""
        return ToyDescriptor()


DESCRIPTOR = Toy()
