"""Read the header of a safetensors file from a stranger: every size is bounded and checked before it is believed.

Format: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the
tensor bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from audit.errors import CheckpointError

MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_TENSORS = 200_000
MAX_RANK = 8
MAX_NAME = 500  # characters of a tensor's name; those of known formats have up to 150
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch .pt/.ckpt pickle, or a zipped folder)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"<!DOCTYPE", "a web page (perhaps a login page saved in place of the download)"),
    (b"<html", "a web page (perhaps a login page saved in place of the download)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header declares it; offsets are bytes from the start of the tensor data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. ``metadata`` is whatever the file's author wrote: claims.

    ``stored_as``: the names in the file of tensors that go by other ones here (the parts of a folder of adapters).
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int
    stored_as: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check the header of ``path`` in a child process; no tensor byte is read.

    Raises CheckpointError naming the file and the mend where the file is missing, truncated, of another format, or
    declares tensors that do not fit its size, overlap, or leave gaps.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            refuse_other_formats(path, size, start)
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} declares a header of {length} bytes (at most {MAX_HEADER_BYTES} are read): "
                    "it is damaged, not a safetensors file, or made to exhaust memory"
                )
            if 8 + length > size:
                raise CheckpointError(f"{path} ends within its header: it is truncated; download it again")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    from audit.untrusted.headers import checked_header

    return checked_header(path, "safetensors", raw, size)


def refuse_other_formats(path: Path | str, size: int, start: bytes) -> None:
    """Raise CheckpointError where ``start``, the first of ``size`` bytes, shows another format than safetensors.

    The length of a header may begin as a pickle does: then the JSON behind it shows what it is.
    """
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return
    for magic, what in _OTHER_FORMATS:
        if start.lstrip().startswith(magic) or start.startswith(magic):
            raise CheckpointError(
                f"{path} is {what}, not a safetensors file: only safetensors is read, since other formats can run "
                "code; ask for the .safetensors file, or convert it where that is safe"
            )
    if size < 10:
        raise CheckpointError(f"{path} has {size} bytes: it is empty or truncated; download it again")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def parse_header(path: Path | str, raw: bytes, data_start: int, size: int) -> Header:
    """The header whose JSON is ``raw``, of a file of ``size`` bytes called ``path``. Raises CheckpointError.

    It runs in a child process (``audit.untrusted``).
    """
    try:
        document = json.loads(raw, object_pairs_hook=_unique_keys)
        if not isinstance(document, dict):
            raise ValueError("it is not an object")
        metadata = document.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not an object of strings")
        if len(document) > MAX_TENSORS:
            raise ValueError(f"{len(document)} tensors are declared, at most {MAX_TENSORS} are read")
        check_names(document)
        tensors = {name: _tensor(name, entry) for name, entry in document.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header: {str(error)[:300]}; download it again"
        ) from error

    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise CheckpointError(
                f"{path}: the data of tensor {name[:100]!r} overlaps another or leaves a gap; the file is damaged"
            )
        position = tensor.end
    if data_start + position != size:
        problem = "is truncated" if data_start + position > size else "has bytes that no tensor declares"
        raise CheckpointError(f"{path} {problem} ({size} bytes, {data_start + position} declared); download it again")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: there is nothing to audit")
    return Header(tensors, metadata, data_start, size)


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a tensor's name that is longer than MAX_NAME."""
    longest = max(names, key=len, default="")
    if len(longest) > MAX_NAME:
        raise ValueError(
            f"the tensor {longest[:60]!r}... has a name of {len(longest)} characters, at most {MAX_NAME} are read"
        )


def _tensor(name: str, entry: object) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:100]!r} lacks dtype, shape or data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name[:100]!r} has the unknown type {str(dtype)[:20]!r}")
    numbers_fit = all(type(value) is int and 0 <= value < 2**48 for value in (*shape, *offsets))
    if len(shape) > MAX_RANK or len(offsets) != 2 or not numbers_fit:
        raise ValueError(f"tensor {name[:100]!r} has an impossible shape or offset")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise ValueError(f"the size of tensor {name[:100]!r} does not fit its shape")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])
