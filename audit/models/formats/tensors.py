"""Tensors out of checked files, one at a time and as float32: safetensors in any precision, and GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from audit.models.formats.headers import is_gguf
from audit.models.formats.quantised import (
    FLOAT8,
    MARKER,
    SCALES,
    check_kind,
    check_marker,
    expanded,
    header_markers,
    parsed_marker,
    scale_name,
)
from audit.models.safetensors_header import DTYPE_BITS, Header, TensorInfo

_SMALL = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_PLAIN = {"F16": np.float16, "F32": np.float32}  # numbers of a GGUF file that are no blocks of bytes
_FLAGS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


class TensorNotFiniteError(ValueError):
    """A tensor holds numbers that are not finite: whatever is computed from it says nothing."""


class Tensors:
    """The tensors of one or more files under one set of names. Use as a context manager."""

    def __init__(self, files: list[tuple[Path, Header]]) -> None:
        self.info: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._getters: dict[str, Callable[[str], torch.Tensor]] = {}
        self._files = files
        self._open = ExitStack()

    def __enter__(self) -> Tensors:
        for path, header in self._files:
            get = self._gguf(path, header) if is_gguf(path) else self._safetensors(path, header)
            self.info |= header.tensors
            self.metadata |= header.metadata
            self._getters |= dict.fromkeys(header.tensors, get)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _safetensors(self, path: Path, header: Header) -> Callable[[str], torch.Tensor]:
        opened = self._open.enter_context(safe_open(path, framework="pt"))
        return lambda name: opened.get_tensor(header.stored_as.get(name, name))

    @staticmethod
    def _gguf(path: Path, header: Header) -> Callable[[str], torch.Tensor]:
        """By the checked header: the package that reads GGUF files is given numbers, not the file."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        content = np.memmap(path, np.uint8, "r")

        def get(name: str) -> torch.Tensor:
            info = header.tensors[header.stored_as.get(name, name)]
            kind = GGMLQuantizationType[info.dtype]
            stored = content[header.data_start + info.start : header.data_start + info.end]
            if info.dtype in _PLAIN:
                values = stored.view(_PLAIN[info.dtype]).reshape(info.shape)
            else:
                values = stored.reshape(quant_shape_to_byte_shape(info.shape, kind))
            return torch.from_numpy(np.array(dequantize(values, kind), dtype=np.float32)).reshape(info.shape)

        return get

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def raw(self, name: str) -> torch.Tensor:
        """A tensor in the file's own precision (float32 of a GGUF file)."""
        return self._getters[name](name)

    def get(self, name: str) -> torch.Tensor:
        """A tensor as float32, a weight of 8 bits multiplied by the scale that stands beside it.

        Raises TensorNotFiniteError where a number is not finite, ValueError for a scale that does not fit.
        """
        value = self.raw(name).float()
        scale = self.scale_of(name)
        value = value if scale is None else value * scale
        if not torch.isfinite(value).all():
            raise TensorNotFiniteError(f"{name[:120]} is not finite")
        return value

    def weight(self, name: str) -> torch.Tensor:
        """As ``get``; raises ValueError where its numbers are not what they stand for (packed, or without scale)."""
        if self.info[name].dtype in DTYPE_BITS:
            check_kind(name, self.info[name], scale_name(name, self.info) is not None)
        return self.get(name)

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Raise TensorNotFiniteError naming the first of ``names``, or of all, that is not finite."""
        for name in self.info if names is None else names:
            if self.info[name].dtype in _FLAGS:
                continue
            value = self.raw(name)
            small = value.dtype.itemsize == 1  # of those torch cannot tell
            if not torch.isfinite(value.float() if small else value).all():
                raise TensorNotFiniteError(f"{name[:120]} is not finite")

    def check_quantisation(self) -> None:
        """Raise ValueError where a marker of ComfyUI's says that weights are stored in a way that is not read."""
        for name in self.info:
            if name.endswith(MARKER):
                check_marker(name, parsed_marker(name, self.raw(name)))
        for name, claims in header_markers(self.metadata).items():
            check_marker(name, claims)
        for name in self.info:
            weight = next((name.removesuffix(s) + ".weight" for s in SCALES if name.endswith(s)), None)
            if weight in self.info and scale_name(weight, self.info) != name and (self.raw(name).float() != 1).any():
                raise ValueError(f"{name[:120]} scales a weight of type {self.info[weight].dtype}, which is not read")

    def scale_of(self, name: str) -> torch.Tensor | None:
        """The scale of a weight of 8 bits, where it has one, so that it multiplies the weight."""
        beside = scale_name(name, self.info)
        if beside is None:
            return None
        check_kind(beside, self.info[beside], False)
        return expanded(name, self.raw(beside).float(), self.info[name].shape)

    def as_stored(self, name: str, value: torch.Tensor) -> torch.Tensor | None:
        """``value`` (float32) rounded as the file would store it under ``name``; None where that is not known.

        What equals this was not changed by whoever wrote the file.
        """
        kind = self.info[name].dtype
        if kind in ("F32", "F64"):
            return value
        if kind in ("F16", "BF16"):
            return value.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
        if kind in FLOAT8 or kind == "I8":
            return self._rounded(kind, value, self.scale_of(name))
        if kind in DTYPE_BITS:  # integers of a safetensors file: their scale is nobody's standard
            return None
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quantize

        quantisation = GGMLQuantizationType[kind]
        try:
            packed = quantize(value.contiguous().numpy(), quantisation)
        except NotImplementedError:  # the K quantisations, which only llama.cpp writes
            return None
        return torch.from_numpy(np.array(dequantize(packed, quantisation), dtype=np.float32)).reshape(value.shape)

    @staticmethod
    def _rounded(kind: str, value: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor | None:
        small = value if scale is None else value / scale
        if kind in FLOAT8:
            small = small.to(_SMALL[kind]).float()
        elif scale is None:
            return None
        else:
            small = small.round().clamp(-128, 127)
        return small if scale is None else small * scale
