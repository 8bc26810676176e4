"""Tensors of a stranger's adapter as float32, with numpy alone: safetensors, 8 bits with scales too, and GGUF.

Crawlers sketch what they store, and have no torch. ``formats.tensors`` reads the same numbers for audits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from audit.models.formats.headers import is_gguf
from audit.models.formats.quantised import (
    MARKER,
    MAX_MARKER_BYTES,
    check_marker,
    header_markers,
    marker_of,
    scale_name,
)
from audit.models.safetensors_header import Header, TensorInfo

MOST_ELEMENTS = 1 << 24  # of one tensor or product
_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_FLAGS = {"BOOL": "u1", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


class Reader:
    """Tensors of one checked file. Raises ValueError where it says that they are stored in a way that is not read."""

    def __init__(self, path: Path, header: Header) -> None:
        self.info: Mapping[str, TensorInfo] = header.tensors
        self._content = np.memmap(path, np.uint8, "r")
        self._header, self._gguf = header, is_gguf(path)
        for name in self.info:
            if name.endswith(MARKER):
                stored = self._stored(name)
                if self.info[name].dtype != "U8" or len(stored) > MAX_MARKER_BYTES:
                    raise ValueError(f"{name[:120]} is no marker of a quantisation")
                check_marker(name, marker_of(name, stored.tobytes()))
        for name, claims in header_markers(header.metadata).items():
            check_marker(name, claims)

    def get(self, name: str) -> np.ndarray | None:
        """float32 of the tensor's shape. None for a type that is no plain number, and for a tensor that is too large.

        Raises ValueError for a scale that does not fit.
        """
        info = self.info[name]
        if math.prod(info.shape) > MOST_ELEMENTS:
            return None
        if self._gguf:
            return self._unpacked(info, self._stored(name))
        found = _number(info.dtype, self._stored(name))
        beside = scale_name(name, self.info)
        if info.dtype == "I8" and beside is not None:
            found = self._stored(name).view("i1").astype(np.float32)
        if found is None:
            return None
        found = found.reshape(info.shape)
        if beside is not None:
            scale = self.get(beside) if self.info[beside].dtype in (*_PLAIN, "BF16") else None
            if scale is None:
                return None
            found = found * _spread(name, scale, info.shape)
        return found

    def flag(self, name: str) -> bool | None:
        """Whether a marker is set; None for a type that cannot say so."""
        info = self.info[name]
        if self._gguf or info.dtype not in _FLAGS or math.prod(info.shape) != 1:
            value = self.get(name)
            return None if value is None or value.size != 1 else bool(value.flat[0])
        return bool(self._stored(name).view(_FLAGS[info.dtype])[0])

    def _stored(self, name: str) -> np.ndarray:
        info = self.info[name]
        return self._content[self._header.data_start + info.start : self._header.data_start + info.end]

    @staticmethod
    def _unpacked(info: TensorInfo, stored: np.ndarray) -> np.ndarray:
        """As ``formats.tensors`` unpacks it: the gguf package is given numbers, not the file."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType[info.dtype]
        if info.dtype in ("F16", "F32"):
            return stored.view(_PLAIN[info.dtype]).astype(np.float32).reshape(info.shape)
        values = stored.reshape(quant_shape_to_byte_shape(info.shape, kind))
        return np.array(dequantize(values, kind), dtype=np.float32).reshape(info.shape)


def _number(dtype: str, stored: np.ndarray) -> np.ndarray | None:
    """float32 of bytes of a type that is a plain number; None for others."""
    if dtype == "BF16":
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        return _E4M3[stored]
    if dtype not in _PLAIN:
        return None
    return stored.view(_PLAIN[dtype]).astype(np.float32)


def _e4m3() -> np.ndarray:
    """float32 [256]: the numbers of float8 e4m3fn, which has no infinity, by their bits (arXiv 2209.05433)."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    found = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    found[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -found, found).astype(np.float32)


_E4M3 = _e4m3()


def _spread(name: str, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``scale``, one number or one a row or block, so that it multiplies a weight of ``shape``. Raises ValueError."""
    sizes = list(scale.shape)
    while len(sizes) > max(len(shape), 1) and sizes[-1] == 1:
        sizes.pop()
    if scale.size == 1:
        return scale.reshape(())
    if len(sizes) == 1 and shape and sizes[0] == shape[0]:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if len(sizes) == len(shape) and all(part and not whole % part for whole, part in zip(shape, sizes, strict=True)):
        found = scale.reshape(sizes)
        for axis, (whole, part) in enumerate(zip(shape, sizes, strict=True)):
            found = found.repeat(whole // part, axis=axis)
        return found
    raise ValueError(f"the scale of {name[:120]} has the shape {tuple(scale.shape)}, the weight {tuple(shape)}")
