"""Descriptors by name: "nano", "sscd", "pdq", or the path of a TorchScript or ONNX file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import requests

from audit.demo import DESCRIPTOR as NANO
from audit.descriptors.base import Descriptor
from audit.descriptors.facts import DescriptorFacts
from audit.descriptors.networks import OnnxDescriptor, TorchScriptDescriptor, file_sha256, network_name
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import DescriptorError
from audit.files import whole_file

NANO_THRESHOLD = 0.7

# github.com/facebookresearch/sscd-copy-detection (MIT): sscd_disc_mixup, ResNet-50, 512 dimensions
SSCD_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
SSCD_SHA256 = "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"
SSCD_BYTES = 98_791_638
SSCD_SIZE = 320
SSCD_THRESHOLD = 0.75


@dataclass(frozen=True)
class _Source:
    """Where a network's file is and how it is used; ``sha256`` where it is pinned."""

    path: Path
    label: str
    input_size: int
    threshold: float
    sha256: str | None = None


def _source_of(name: str) -> _Source | None:
    """Where the descriptor ``name`` is; None for PDQ, which is no network. Raises DescriptorError."""
    if name == "nano":
        return _Source(NANO, "nano", 64, NANO_THRESHOLD)
    if name == "sscd":
        path = download(SSCD_URL, SSCD_SHA256, SSCD_BYTES)
        return _Source(path, "sscd_disc_mixup", SSCD_SIZE, SSCD_THRESHOLD, SSCD_SHA256)
    if name == "pdq":
        return None
    path = Path(name)
    if not path.is_file():
        raise DescriptorError(f"no descriptor {name!r}: use nano, sscd, pdq, or the path of a TorchScript or ONNX file")
    return _Source(path, path.stem, SSCD_SIZE, SSCD_THRESHOLD)


def load_descriptor(name: str, device: str = "cpu") -> Descriptor:
    """The descriptor called ``name``: "nano", "sscd" (downloaded once, pinned), "pdq", or a .pt or .onnx file.

    Raises DescriptorError where it cannot be had.
    """
    source = _source_of(name)
    if source is None:
        return PdqDescriptor()
    if source.path.suffix == ".onnx":
        return OnnxDescriptor(source.path, source.label, source.input_size, source.threshold, source.sha256)
    return TorchScriptDescriptor(
        source.path, source.label, source.input_size, source.threshold, source.sha256, device=device
    )


def descriptor_facts(name: str) -> DescriptorFacts:
    """What the descriptor ``name`` is, without loading its network. Raises DescriptorError where it cannot be had."""
    source = _source_of(name)
    if source is None:
        return facts_of(PdqDescriptor(), name)
    digest = source.sha256 or file_sha256(source.path)
    return DescriptorFacts(
        name, network_name(source.label, digest, source.input_size), source.threshold, source.input_size
    )


def facts_of(descriptor: Descriptor, name: str) -> DescriptorFacts:
    """What a loaded descriptor is, which was asked for by ``name``."""
    return DescriptorFacts(name, descriptor.name, descriptor.threshold, descriptor.input_size)


def model_cache() -> Path:
    """Where downloaded descriptors are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora-audit" / "descriptors"


def download(url: str, sha256: str, size: int) -> Path:
    """The file at ``url``, downloaded once; it is kept only if it has exactly this size and SHA256.

    Raises DescriptorError where it cannot be downloaded or is another file.
    """
    path = model_cache() / f"{sha256[:16]}-{Path(url).name}"
    if path.is_file():
        return path
    digest = hashlib.sha256()
    try:
        with requests.get(url, stream=True, timeout=30) as response, whole_file(path) as file:
            response.raise_for_status()
            received = 0
            for chunk in response.iter_content(1 << 20):
                received += len(chunk)
                if received > size:
                    raise DescriptorError(f"{url} answers more than {size} bytes: it is not the pinned file")
                digest.update(chunk)
                file.write(chunk)
            if digest.hexdigest() != sha256:
                raise DescriptorError(f"{url} has SHA256 {digest.hexdigest()}, not the pinned {sha256}")
    except requests.RequestException as error:
        raise DescriptorError(
            f"{url} cannot be downloaded ({type(error).__name__}): check the network, or download it elsewhere and "
            f"place it at {path}"
        ) from error
    return path
