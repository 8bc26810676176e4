"""Tensors out of checked files, one at a time and as float32: safetensors in any precision, and GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from audit.models.formats.headers import gguf_reader, is_gguf
from audit.models.safetensors_header import DTYPE_BITS, Header, TensorInfo

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")  # of float8 weights, as ComfyUI and others write them


class Tensors:
    """The tensors of one or more files under one set of names. Use as a context manager."""

    def __init__(self, files: list[tuple[Path, Header]]) -> None:
        self.info: dict[str, TensorInfo] = {}
        self._getters: dict[str, Callable[[str], torch.Tensor]] = {}
        self._files = files
        self._open = ExitStack()

    def __enter__(self) -> Tensors:
        for path, header in self._files:
            get = self._gguf(path) if is_gguf(path) else self._safetensors(path)
            self.info |= header.tensors
            self._getters |= dict.fromkeys(header.tensors, get)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _safetensors(self, path: Path) -> Callable[[str], torch.Tensor]:
        return self._open.enter_context(safe_open(path, framework="pt")).get_tensor

    @staticmethod
    def _gguf(path: Path) -> Callable[[str], torch.Tensor]:
        from gguf.quants import dequantize

        by_name = {str(tensor.name): tensor for tensor in gguf_reader(path).tensors}

        def get(name: str) -> torch.Tensor:
            tensor = by_name[name]
            values = dequantize(tensor.data, tensor.tensor_type)
            shape = tuple(int(size) for size in reversed(tensor.shape))
            return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)

        return get

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def raw(self, name: str) -> torch.Tensor:
        """A tensor in the file's own precision (float32 of a GGUF file)."""
        return self._getters[name](name)

    def get(self, name: str) -> torch.Tensor:
        """A tensor as float32, a float8 weight multiplied by the scale that stands beside it."""
        value = self.raw(name).float()
        scale = self.scale_of(name)
        return value if scale is None else value * scale

    def scale_of(self, name: str) -> torch.Tensor | None:
        """The scale of a float8 weight, where it has one."""
        if self.info[name].dtype not in _FLOAT8 or not name.endswith(".weight"):
            return None
        beside = next((n for s in _SCALES if (n := name.removesuffix(".weight") + s) in self.info), None)
        if beside is None:
            return None
        scale = self.raw(beside).float()
        return scale.reshape(-1, *[1] * (len(self.info[name].shape) - 1)) if scale.numel() > 1 else scale.reshape(())

    def as_stored(self, name: str, value: torch.Tensor) -> torch.Tensor | None:
        """``value`` (float32) rounded as the file would store it under ``name``; None where that is not known.

        What equals this was not changed by whoever wrote the file.
        """
        kind = self.info[name].dtype
        if kind in ("F32", "F64"):
            return value
        if kind in ("F16", "BF16"):
            return value.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
        if kind in _FLOAT8:
            small = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[kind]
            scale = self.scale_of(name)
            if scale is None:
                return value.to(small).float()
            return (value / scale).to(small).float() * scale
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
