"""Descriptors by name: ours, those of other packages, or the path of a TorchScript or ONNX file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import requests

from audit.descriptors.base import Descriptor
from audit.descriptors.facts import DescriptorFacts
from audit.descriptors.kinds import DescriptorKind
from audit.errors import DescriptorError
from audit.files import whole_file
from audit.registry import Registry

DESCRIPTORS: Registry[DescriptorKind] = Registry(
    DescriptorKind, "audit.descriptors", "DESCRIPTOR", "lora_audit.descriptors"
)


def kind_of(name: str) -> DescriptorKind:
    """What ``name`` is: a descriptor that is known by it, or a TorchScript or ONNX file. Raises DescriptorError."""
    if name in DESCRIPTORS:
        return DESCRIPTORS[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(DESCRIPTORS)
        raise DescriptorError(f"no descriptor {name!r}: use {known}, or the path of a TorchScript or ONNX file")
    from audit.descriptors.own import OwnFile

    return OwnFile(path)


def load_descriptor(name: str, device: str = "cpu") -> Descriptor:
    """The descriptor called ``name``: "nano", "sscd" (downloaded once, pinned), "pdq", or a .pt or .onnx file.

    Raises DescriptorError where it cannot be had.
    """
    return kind_of(name).load(device)


def descriptor_facts(name: str) -> DescriptorFacts:
    """What the descriptor ``name`` is, without loading its network. Raises DescriptorError where it cannot be had."""
    return kind_of(name).facts()


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
