"""Headers of safetensors and GGUF files. Crawlers need no more of a file, so nothing heavy is imported here."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

from audit.errors import CheckpointError
from audit.models.safetensors_header import MAX_RANK, MAX_TENSORS, Header, TensorInfo, check_names, read_header

GGUF_MAGIC = b"GGUF"
MAX_GGUF_FIELDS = 10_000
MAX_GGUF_VALUES = 200_000  # in arrays; a text model's words are more, a denoiser has a few shapes
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by the type's number
GGUF_TEXT, GGUF_ARRAY = 8, 9


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
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).check(tensors, fields)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is a damaged GGUF file: {str(error)[:200]}; download it again") from error
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


class _Walk:
    """Goes through a GGUF header before the library does, which believes every length and makes arrays of nothing."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.elements = file, size, 0

    def check(self, tensors: int, fields: int) -> None:
        """Raise ValueError where a length leads out of the file, or there are more values than are read."""
        self.file.seek(24)
        for _ in range(fields):
            self._text()
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._text()
            rank = self._number("<I")
            if rank > MAX_RANK:
                raise ValueError(f"a tensor of {rank} dimensions")
            self._skip(8 * rank + 4 + 8)

    def _number(self, form: str) -> int:
        length = struct.calcsize(form)
        raw = self.file.read(length)
        if len(raw) < length:
            raise ValueError("it ends within its header")
        return int(struct.unpack(form, raw)[0])

    def _skip(self, length: int) -> None:
        if self.file.tell() + length > self.size:
            raise ValueError(f"a length of {length} bytes leads out of the file")
        self.file.seek(length, 1)

    def _text(self) -> None:
        self._skip(self._number("<Q"))

    def _value(self, kind: int) -> None:
        if kind == GGUF_TEXT:
            self._text()
        elif kind in GGUF_SIZES:
            self._skip(GGUF_SIZES[kind])
        elif kind == GGUF_ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            self.elements += count
            if self.elements > MAX_GGUF_VALUES:
                raise ValueError(f"{self.elements} values in arrays, at most {MAX_GGUF_VALUES} are read")
            if inner in GGUF_SIZES:
                self._skip(GGUF_SIZES[inner] * count)
            elif inner == GGUF_TEXT:
                for _ in range(count):
                    self._text()
            else:
                raise ValueError(f"an array of values of type {inner}")
        else:
            raise ValueError(f"a value of type {kind}")


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
