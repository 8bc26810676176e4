"""The fixed vectors of signs that a sketch is made with: p for the outputs of a layer, q for its inputs.

They depend on the sides of a layer, and those of the outputs on its name in one spelling too. A module that is several
of another layout's, their rows one under the other, has those of its parts: the sketch of the whole is their sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from audit.models.families.spelling import Place

KIND = "signs-2"  # raised when the same file comes to have another sketch: only equal ones are compared
SIZE = 512
_MLP = 4  # rows of Flux' mlp to one of each of q, k and v, where a file shows no inputs


def of_outputs(
    place: Place, outputs: int, inputs: int | None = None, space: str = "", side: str = "left"
) -> np.ndarray:
    """float32 [outputs, SIZE]: p. ``inputs`` of the layer tell how its rows are shared where its parts are not alike.

    ``space`` names what is no change of weights; where that has outputs on both sides, the other is the ``right`` one.
    Raises ValueError where the rows cannot be those of its parts.
    """
    parts = [
        _kept(side, rows) * _of_name(place.part, module, space)
        for module, rows in zip(place.modules, _rows(place, outputs, inputs), strict=True)
    ]
    found = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if place.swapped:
        found = np.concatenate([found[outputs // 2 :], found[: outputs // 2]])
    return found.astype(np.float32)


def of_inputs(inputs: int) -> np.ndarray:
    """float32 [inputs, SIZE]: q."""
    return _kept("right", inputs).astype(np.float32)


def of_shared_inputs(place: Place, inputs: int, space: str) -> np.ndarray:
    """float32 [inputs, SIZE]: signs for what a module does to its inputs, the sum of those of its parts."""
    named = [_of_name(place.part, module, space).astype(np.float32) for module in place.modules]
    return np.asarray(_kept("left", inputs) * np.sum(named, axis=0), dtype=np.float32)


def _rows(place: Place, outputs: int, inputs: int | None) -> Sequence[int]:
    """The rows of each part: alike, but where the last is Flux' mlp beside three that are as wide as its inputs."""
    count = len(place.modules)
    if count == 1:
        return [outputs]
    if place.modules[-1].endswith("proj_mlp"):
        width = inputs if inputs is not None else outputs // (count - 1 + _MLP)
        rows = [*[width] * (count - 1), outputs - width * (count - 1)]
    else:
        rows = [outputs // count] * count
    if sum(rows) != outputs or min(rows) < 1:
        raise ValueError(f"{outputs} rows are not those of {count} modules")
    return rows


def _of_name(part: str, module: str, space: str) -> np.ndarray:
    return _bits(f"{part}|{module}|{space}", 1)


def _bits(key: str, rows: int) -> np.ndarray:
    """int8 [rows, SIZE] of -1 and 1, by SHAKE-256 of ``key``: the same on every machine for ever."""
    stream = hashlib.shake_256(f"{KIND}|{key}|{rows}".encode()).digest(rows * SIZE // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(rows, SIZE)
    return bits.astype(np.int8) * 2 - 1


_kept = lru_cache(maxsize=24)(_bits)  # a file has few different sides
