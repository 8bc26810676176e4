"""What can be asked for by ``--descriptor``: an entry of this folder, of another package, or a file of one's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from audit.descriptors.base import Descriptor
from audit.descriptors.facts import DescriptorFacts, Spec
from audit.descriptors.networks import OnnxDescriptor, TorchScriptDescriptor, file_sha256


class DescriptorKind(ABC):
    """A descriptor by its name, in one file, as its constant DESCRIPTOR."""

    name: ClassVar[str]

    @abstractmethod
    def facts(self) -> DescriptorFacts:
        """What it is, without loading it. Raises DescriptorError where it cannot be had."""

    @abstractmethod
    def load(self, device: str) -> Descriptor:
        """Load it. Raises DescriptorError where it cannot be had."""


class NetworkKind(DescriptorKind):
    """A network in a file."""

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """How its file is used."""

    @abstractmethod
    def path(self) -> Path:
        """Its file; it is downloaded where it has to be. Raises DescriptorError."""

    def facts(self) -> DescriptorFacts:
        """By its file's hash."""
        path, spec = self.path(), self.spec
        digest = spec.sha256 or file_sha256(path)
        return DescriptorFacts(str(self.name), spec.name(digest), spec.threshold, spec.input_size)

    def load(self, device: str) -> Descriptor:
        """TorchScript, or ONNX by its ending."""
        path = self.path()
        if path.suffix == ".onnx":
            return OnnxDescriptor(path, self.spec)
        return TorchScriptDescriptor(path, self.spec, device)
