"""Descriptors that are networks: TorchScript files (SSCD's own, nano's) and ONNX files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from audit.descriptors.base import Descriptor
from audit.descriptors.facts import Spec
from audit.devices import raise_fault
from audit.errors import DescriptorError


def file_sha256(path: Path) -> str:
    """SHA256 of a descriptor's file. Raises DescriptorError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DescriptorError(f"the descriptor {path} cannot be read: {error.strerror or error}") from error


class TorchScriptDescriptor(Descriptor):
    """A TorchScript file: normalised batch float32 [N, 3, S, S] in, unit vectors [N, D] out (SSCD's interface).

    TorchScript can run code: only load a file you trust, or pin it. Raises DescriptorError where the file is missing,
    is not the pinned one, or does not load.
    """

    def __init__(self, path: Path, spec: Spec, device: str = "cpu") -> None:
        import torch

        digest = _pinned(path, spec)
        size = spec.input_size
        try:
            self._model = torch.jit.load(str(path), map_location=device).eval()
            with torch.inference_mode():
                found = self._model(torch.zeros(1, 3, size, size, device=device))
        except RuntimeError as error:
            raise_fault(error, f"the descriptor {path}", device)
            raise DescriptorError(f"{path} does not load as a TorchScript descriptor: {str(error)[:200]}") from error
        self.device = device
        self._take(spec, digest)
        self.dimensions = _width(path, getattr(found, "shape", ()))

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(batch).to(self.device)).float().cpu().numpy()


class OnnxDescriptor(Descriptor):
    """The same as an ONNX file, through onnxruntime (the extra ``onnx``).

    Type, layout and batch of its input are the file's: float32 or float16, normalised, or uint8, whose normalisation is
    within; [N, 3, S, S] or [N, S, S, 3]; of any number of pictures, or of as many as it was exported for. Raises
    DescriptorError where onnxruntime is not installed, or the file is missing, not the pinned one, broken, or takes or
    gives something else.
    """

    def __init__(self, path: Path, spec: Spec, threads: int = 0) -> None:
        digest = _pinned(path, spec)
        self._session = _session(path, threads)
        self._input = _input_of(path, self._session)
        if self._input.size not in (None, spec.input_size):
            raise DescriptorError(f"{path} takes pictures of {self._input.size} pixels a side, not {spec.input_size}")
        self._take(spec, digest)
        try:
            found = self._run(np.stack([self.prepare(np.zeros((spec.input_size, spec.input_size, 3), np.uint8))]))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise DescriptorError(f"{path} does not load as an ONNX descriptor: {str(error)[:200]}") from error
        self.dimensions = _width(path, found.shape)

    def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """As the file's input is: uint8 or float32, [3, S, S] or [S, S, 3]."""
        if self._input.kind == "uint8":
            found = self._squeezed(image)
            return np.ascontiguousarray(found if self._input.channels_last else found.transpose(2, 0, 1))
        found = super()._prepare(image)
        return np.ascontiguousarray(found.transpose(1, 2, 0)) if self._input.channels_last else found

    def _run(self, batch: np.ndarray) -> np.ndarray:
        given = batch.astype(self._input.kind, copy=False)
        most = self._input.batch or len(given)
        parts = []
        for first in range(0, len(given), most):
            some = given[first : first + most]
            padding = np.zeros((most - len(some), *some.shape[1:]), some.dtype) if self._input.batch else some[:0]
            found = np.asarray(self._session.run(None, {self._input.name: np.concatenate([some, padding])})[0])
            parts.append(found[: len(some)])
        return np.concatenate(parts).astype(np.float32)

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        return self._run(batch)


@dataclass(frozen=True)
class _Input:
    """An ONNX file's input: its name, numpy's name of its type, and of its shape what is fixed."""

    name: str
    kind: str
    channels_last: bool
    batch: int | None
    size: int | None


_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


def fixed_size(path: Path) -> int | None:
    """The side of the pictures that an ONNX file takes, None where it takes any. Raises DescriptorError."""
    return _input_of(path, _session(path, 1)).size


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DescriptorError(f"{path} needs onnxruntime: pip install 'lora-audit[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise DescriptorError(f"{path} does not load as an ONNX descriptor: {str(error)[:200]}") from error


def _input_of(path: Path, session: Any) -> _Input:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise DescriptorError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs: export it with the picture as the one input "
            "and the vector as the one output"
        )
    [one] = inputs
    if one.type not in _TYPES:
        raise DescriptorError(f"{path} takes {one.type}: a picture is {', '.join(_TYPES)}")
    shape = [side if isinstance(side, int) else None for side in one.shape]
    first, last = len(shape) == 4 and shape[1] == 3, len(shape) == 4 and shape[3] == 3
    if first == last:
        raise DescriptorError(f"{path} takes {one.shape}: a picture is [N, 3, S, S] or [N, S, S, 3]")
    height, width = shape[1:3] if last else shape[2:4]
    if height != width:
        raise DescriptorError(f"{path} takes pictures of {width} x {height}: only squares are prepared")
    return _Input(one.name, _TYPES[one.type], last, shape[0], height)


def _pinned(path: Path, spec: Spec) -> str:
    """The SHA256 of the file. Raises DescriptorError where it is not the pinned one."""
    digest = file_sha256(path)
    if spec.sha256 is not None and digest != spec.sha256:
        raise DescriptorError(
            f"{path} is not the pinned {spec.label} (SHA256 {digest}, expected {spec.sha256}): download it again"
        )
    return digest


def _width(path: Path, shape: Sequence[int]) -> int:
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
        raise DescriptorError(f"{path} answers {list(shape)} for one picture: a descriptor gives one vector, [1, D]")
    return int(shape[1])
