"""A short vector of what an adapter changes: two re-saves of one adapter have nearly the same, two adapters do not.

With dW_l the change of layer l, entry j is the sum over layers of p_lj^T dW_l q_lj, where p and q are fixed vectors of
signs: the inner product of two sketches estimates sum_l <dW_l, dW'_l>, without dW ever being made (of factors U D it is
(p^T U)(D q)). So the cosine of two sketches estimates that of the two changes, up to about 1 / sqrt(SIZE) where they
are unrelated and far closer where they are nearly equal. It does not see precision, a common scale (alpha), how a rank
is split between the factors, or names of the file.

Signs depend on the sides of a layer and on the layer's name without its spelling (dots, underscores, kohya's prefix).
Read with numpy alone, by the checked header: crawlers make sketches too, and have no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from audit.models.formats.names import Algorithm, Group, read_names
from audit.models.formats.scaling import Scaling, read_scaling
from audit.models.safetensors_header import Header, TensorInfo

KIND = "signs-1"  # raised when the same file comes to have another sketch: only equal ones are compared
SIZE = 512
NEAR = 0.9  # cosine from which two are re-saves of one adapter (docs/models.md has how it was measured)
LONGEST_SIDE = 1 << 15
MOST_ELEMENTS = 1 << 24  # of one product or tensor
MOST_RANK = 4096
MOST_WORK = 10**12  # multiplications of one file; a LoRA of rank 128 of all of SDXL takes a tenth
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_READ = (Algorithm.lora, Algorithm.full, Algorithm.loha, Algorithm.lokr)


@dataclass(frozen=True)
class Sketch:
    """``vector``: float32 [SIZE], of length 1. ``norm``: the estimated Frobenius norm of all changes; ``modules``: how
    many are in it, ``left_out``: how many change in a way that has no sketch.
    """

    vector: np.ndarray
    norm: float
    modules: int
    left_out: int


def sketch_of(files: Iterable[tuple[Path, Header]]) -> Sketch | None:
    """The sketch of an adapter in checked safetensors files; None where it has no change that can be sketched.

    Raises ValueError where its tensors do not fit each other, or are not finite.
    """
    total, modules, left_out, work = np.zeros(SIZE), 0, 0, 0
    for path, header in files:
        read = _Reader(path, header)
        scalings = read_scaling(header.metadata)
        for group in read_names(header.tensors).groups:
            work += sum(math.prod(header.tensors[name].shape) for name in group.tensors.values()) * SIZE
            if work > MOST_WORK:
                left_out += 1
                continue
            with np.errstate(all="ignore"):  # what overflows is refused below
                found = _entry(group, read, scalings.get(group.part, Scaling()))
            if found is None:
                left_out += 1
                continue
            if not np.isfinite(found).all():
                raise ValueError(f"{group.module[:120]} is not finite")
            total += found
            modules += 1
    length = float(np.linalg.norm(total))
    if not modules or not 0 < length < math.inf:
        return None
    return Sketch((total / length).astype(np.float32), length / SIZE**0.5, modules, left_out)


class _Reader:
    """Tensors of one file as float32."""

    def __init__(self, path: Path, header: Header) -> None:
        self.info: Mapping[str, TensorInfo] = header.tensors
        self._content = np.memmap(path, np.uint8, "r")
        self._header = header

    def get(self, name: str) -> np.ndarray | None:
        """None for a type that is no plain number, and for a tensor that is too large."""
        info = self.info[name]
        if info.dtype not in _TYPES or math.prod(info.shape) > MOST_ELEMENTS:
            return None
        start = self._header.data_start
        stored = self._content[start + info.start : start + info.end].view(_TYPES[info.dtype])
        if info.dtype == "BF16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32).reshape(info.shape)


def _entry(group: Group, read: _Reader, scaling: Scaling) -> np.ndarray | None:
    """float64 [SIZE]: what the group adds to the sketch; None where it has none."""
    if group.algorithm not in _READ or {"mid", "hada_t1", "hada_t2", "lokr_t2"} & set(group.tensors):
        return None
    values = {}
    for role, name in group.tensors.items():
        value = read.get(name)
        if value is None:
            return None
        values[role] = value
    if group.algorithm is Algorithm.lora:
        return _of_factors(group, values, scaling)
    whole = _whole(group.algorithm, values)
    if whole is None or max(whole.shape) > LONGEST_SIDE:
        return None
    scale = 1.0
    if group.algorithm is Algorithm.loha:
        alpha = float(values["alpha"].flat[0]) if "alpha" in values else scaling.of(group.module)
        scale = alpha / values["hada_w1_b"].shape[0] if alpha else 1.0
    p, q = _signs(group, *whole.shape)
    return ((whole @ q) * p).sum(0, dtype=np.float64) * scale


def _of_factors(group: Group, values: Mapping[str, np.ndarray], scaling: Scaling) -> np.ndarray | None:
    up = values["up"].reshape(len(values["up"]), -1)
    down = values["down"].reshape(len(values["down"]), -1)
    rank = len(down)
    if up.shape[1] != rank:
        raise ValueError(f"{group.module[:120]}: its factors do not fit each other")
    if max(len(up), down.shape[1]) > LONGEST_SIDE or rank > MOST_RANK:
        return None
    alpha = float(values["alpha"].flat[0]) if "alpha" in values else scaling.of(group.module)
    scale = alpha / (rank**0.5 if scaling.rank_stabilised else rank) if alpha else 1.0
    p, q = _signs(group, len(up), down.shape[1])
    return np.asarray(((up.T @ p) * (down @ q)).sum(0, dtype=np.float64) * scale)


def _whole(algorithm: Algorithm, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The change itself, as a matrix, without its scale; None where it would be too large."""
    if algorithm is Algorithm.full:
        whole = values.get("diff")
    elif algorithm is Algorithm.loha:
        a, b, c, d = (values[f"hada_{one}"] for one in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if len(a) * b.reshape(len(b), -1).shape[1] > MOST_ELEMENTS or len(a) != len(c) or b.shape != d.shape:
            return None
        whole = (a @ b.reshape(len(b), -1)) * (c @ d.reshape(len(d), -1))
    else:
        one, other = (_half(values, which) for which in ("1", "2"))
        if one.size * other.size > MOST_ELEMENTS:
            return None
        whole = np.kron(one, other)
    return None if whole is None or whole.ndim < 1 else whole.reshape(len(whole), -1)


def _half(values: Mapping[str, np.ndarray], which: str) -> np.ndarray:
    whole = values.get(f"lokr_w{which}")
    if whole is None:
        a, b = values[f"lokr_w{which}_a"], values[f"lokr_w{which}_b"]
        whole = a @ b.reshape(len(b), -1)
    return whole.reshape(len(whole), -1)


def _signs(group: Group, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [outputs, SIZE] and [inputs, SIZE]; those of the outputs have the sign of the layer's name in them."""
    name = _bits(f"{group.part}|{spelling(group.module)}", 1)
    return (_kept("left", outputs) * name).astype(np.float32), _kept("right", inputs).astype(np.float32)


def spelling(module: str) -> str:
    """A module's name without what differs between the ways to write it."""
    return re.sub(r"[^a-z0-9]+", "", module.lower().replace("processor", ""))


def _bits(key: str, rows: int) -> np.ndarray:
    """int8 [rows, SIZE] of -1 and 1, by SHAKE-256 of ``key``: the same on every machine for ever."""
    stream = hashlib.shake_256(f"{KIND}|{key}|{rows}".encode()).digest(rows * SIZE // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(rows, SIZE)
    return bits.astype(np.int8) * 2 - 1


_kept = lru_cache(maxsize=24)(_bits)  # a file has few different sides
