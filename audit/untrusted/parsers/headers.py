"""Headers of safetensors and GGUF files, in columns: names, types, shapes, where each tensor starts and ends."""

from __future__ import annotations

from typing import Any

from audit.errors import CheckpointError
from audit.models.formats.gguf_header import parse_gguf
from audit.models.safetensors_header import Header, parse_header
from audit.untrusted.child import Item, RefusedError


def safetensors(item: Item) -> dict[str, Any]:
    """The header in ``item.data``, of a file of ``bytes`` bytes called ``name``."""
    try:
        return _columns(parse_header(item.said["name"], item.data, 8 + len(item.data), item.said["bytes"]))
    except CheckpointError as error:
        raise RefusedError(str(error)) from error


def gguf(item: Item) -> dict[str, Any]:
    """The header of an open GGUF file called ``name``."""
    try:
        return _columns(parse_gguf(item.said["name"], item.files[0]))
    except CheckpointError as error:
        raise RefusedError(str(error)) from error


def _columns(header: Header) -> dict[str, Any]:
    tensors = header.tensors.values()
    return {
        "names": list(header.tensors),
        "types": [one.dtype for one in tensors],
        "shapes": [one.shape for one in tensors],
        "starts": [one.start for one in tensors],
        "ends": [one.end for one in tensors],
        "metadata": header.metadata,
        "data_start": header.data_start,
    }


PARSERS = {"safetensors": safetensors, "gguf": gguf}
