"""Headers that a child has parsed, checked again for their form: the child may not be what it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from audit.errors import CheckpointError
from audit.models.safetensors_header import Header, TensorInfo
from audit.untrusted.pool import RefusedError, pool


def checked_header(path: Path, parser: str, raw: bytes, size: int, files: Sequence[IO[bytes]] = ()) -> Header:
    """What ``parser`` makes of ``raw``, or of the open ``files``: the header of ``path``, which has ``size`` bytes.

    Raises CheckpointError naming the file.
    """
    try:
        reply = pool().ask(parser, {"name": str(path), "bytes": size}, raw, files)
    except RefusedError as error:
        raise CheckpointError(str(error) if error.by_child else f"{path} is {error}") from error
    try:
        return _header(reply.answer, size)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is refused: what parses it gives no header") from error


def _header(said: dict[str, Any], size: int) -> Header:
    names, types, shapes = said["names"], said["types"], said["shapes"]
    starts, ends, metadata, data_start = said["starts"], said["ends"], said["metadata"], said["data_start"]
    texts = all(type(one) is str for one in (*names, *types, *metadata, *metadata.values()))
    numbers = all(type(one) is int and 0 <= one <= size for one in (*starts, *ends, data_start))
    sides = all(type(side) is int and side >= 0 for shape in shapes for side in shape)
    if not (texts and numbers and sides and len(set(names)) == len(names)):
        raise ValueError
    tensors = {
        name: TensorInfo(kind, tuple(shape), start, end)
        for name, kind, shape, start, end in zip(names, types, shapes, starts, ends, strict=True)
    }
    return Header(tensors, metadata, data_start, size)
