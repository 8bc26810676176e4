"""Headers of safetensors and GGUF files. Crawlers need no more of a file, so nothing heavy is imported here."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from audit.errors import CheckpointError
from audit.models.safetensors_header import MAX_TENSORS, Header, TensorInfo, check_names, read_header

GGUF_MAGIC = b"GGUF"
MAX_GGUF_FIELDS = 10_000


def is_gguf(path: Path) -> bool:
    """Whether ``path`` begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(4) == GGUF_MAGIC


def read_any_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file. Raises CheckpointError for anything damaged or unknown."""
    try:
        gguf = is_gguf(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return _gguf_header(path) if gguf else read_header(path)


def _gguf_header(path: Path) -> Header:
    """Counts are bounded before the library loops over them; it maps the file and reads no tensor."""
    with path.open("rb") as file:
        start = file.read(24)
    if len(start) < 24:
        raise CheckpointError(f"{path} ends within its GGUF header: it is truncated; download it again")
    _, version, tensors, fields = struct.unpack("<4sIQQ", start)
    if version not in (2, 3) or tensors > MAX_TENSORS or fields > MAX_GGUF_FIELDS:
        raise CheckpointError(f"{path} is a GGUF file of version {version} with {tensors} tensors: it is not read")
    found = {}
    reader = gguf_reader(path)
    for tensor in reader.tensors:
        first = int(tensor.data_offset) - int(reader.data_offset)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[str(tensor.name)] = TensorInfo(tensor.tensor_type.name, shape, first, first + int(tensor.n_bytes))
    try:
        check_names(found)
    except ValueError as error:
        raise CheckpointError(f"{path} is not read: {error}") from error
    if not found:
        raise CheckpointError(f"{path} holds no tensors: there is nothing to audit")
    return Header(found, {}, int(reader.data_offset), path.stat().st_size)


def gguf_reader(path: Path) -> Any:
    """The gguf package's reader of ``path``. Raises CheckpointError."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{path} is a GGUF file: install lora-audit[gguf] to read it") from None
    try:
        return GGUFReader(path)
    except Exception as error:
        raise CheckpointError(f"{path} is a damaged GGUF file: {str(error)[:200]}; download it again") from error
