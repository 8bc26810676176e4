"""The header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), read within bounds.

It is read here, and not by the gguf package, which believes every length, makes arrays of nothing, and maps the file.
"""

from __future__ import annotations

import math
import os
import struct
from typing import IO, Any

from audit.errors import CheckpointError
from audit.models.safetensors_header import MAX_RANK, MAX_TENSORS, Header, TensorInfo, check_names

GGUF_MAGIC = b"GGUF"
MAX_GGUF_FIELDS = 10_000
MAX_GGUF_VALUES = 200_000  # in arrays; a text model's words are more, a denoiser has a few shapes
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by the type's number
GGUF_UINT32, GGUF_TEXT, GGUF_ARRAY = 4, 8, 9
_MAX_TEXT = 1 << 16  # bytes of a name; those of fields and tensors are far shorter
_ALIGNMENT = 32  # bytes, where no field says otherwise


def parse_gguf(path: str, file: IO[bytes]) -> Header:
    """The header of the GGUF file ``file`` called ``path``; no tensor is read. Raises CheckpointError.

    It runs in a child process (``audit.untrusted``).
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(24)
    if len(start) < 24:
        raise CheckpointError(f"{path} ends within its GGUF header: it is truncated; download it again")
    _, version, tensors, fields = struct.unpack("<4sIQQ", start)
    if version not in (2, 3) or tensors > MAX_TENSORS or fields > MAX_GGUF_FIELDS:
        raise CheckpointError(f"{path} is a GGUF file of version {version} with {tensors} tensors: it is not read")
    try:
        found, data_start = _Walk(file, size).read(tensors, fields)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is a damaged GGUF file: {str(error)[:200]}; download it again") from error
    try:
        check_names(found)
    except ValueError as error:
        raise CheckpointError(f"{path} is not read: {error}") from error
    if not found:
        raise CheckpointError(f"{path} holds no tensors: there is nothing to audit")
    return Header(found, {}, data_start, size)


class _Walk:
    """Goes through a GGUF header; every length is checked before anything of it is read."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.elements, self.alignment = file, size, 0, _ALIGNMENT

    def read(self, tensors: int, fields: int) -> tuple[dict[str, TensorInfo], int]:
        """The tensors by name, and where their data start. Raises ValueError where they are not within the file."""
        self._fields(fields)
        told = [self._tensor() for _ in range(tensors)]
        data_start = -(-self.file.tell() // self.alignment) * self.alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in told:
            if name in found:
                raise ValueError(f"the tensor {name[:100]!r} occurs twice")
            type_name, length = _stored(name, shape, kind)
            if data_start + offset + length > self.size:
                raise ValueError(f"the tensor {name[:100]!r} leads out of the file")
            found[name] = TensorInfo(type_name, shape, offset, offset + length)
        return found, data_start

    def _fields(self, fields: int) -> None:
        names = set()
        for _ in range(fields):
            name = self._name()
            if name in names:
                raise ValueError(f"the field {name[:100]!r} occurs twice")
            names.add(name)
            kind = self._number("<I")
            if name != "general.alignment":
                self._value(kind)
                continue
            if kind != GGUF_UINT32:
                raise ValueError("general.alignment is no number")
            self.alignment = self._number("<I")
            if self.alignment == 0 or self.alignment & (self.alignment - 1):
                raise ValueError(f"general.alignment is {self.alignment}, which is no power of two")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of one tensor."""
        name, rank = self._name(), self._number("<I")
        if rank > MAX_RANK:
            raise ValueError(f"a tensor of {rank} dimensions")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

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

    def _name(self) -> str:
        length = self._number("<Q")
        if self.file.tell() + length > self.size:
            raise ValueError(f"a length of {length} bytes leads out of the file")
        if length > _MAX_TEXT:
            raise ValueError(f"a name of {length} bytes")
        return self.file.read(length).decode("utf-8")

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


def _stored(name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """The name of the type with the number ``kind``, and the bytes of a tensor of it. Raises ValueError."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known: Any = GGMLQuantizationType(kind)
    block, length = GGML_QUANT_SIZES[known]
    if any(side >= 1 << 48 for side in shape) or (shape and shape[-1] % block):
        raise ValueError(f"the tensor {name[:100]!r} has an impossible shape")
    return str(known.name), math.prod(shape) * length // block
