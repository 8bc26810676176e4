"""Descriptors that are networks: TorchScript files (SSCD's own, nano's) and ONNX files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from audit.descriptors.base import Descriptor
from audit.devices import raise_fault
from audit.errors import DescriptorError


def file_sha256(path: Path) -> str:
    """SHA256 of a descriptor's file. Raises DescriptorError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DescriptorError(f"the descriptor {path} cannot be read: {error.strerror or error}") from error


def network_name(label: str, sha256: str, input_size: int) -> str:
    """What a network's vectors are called by in every table: its label, its file and its preprocessing."""
    return f"{label}@{sha256[:12]}/skew{input_size}"


class TorchScriptDescriptor(Descriptor):
    """A TorchScript file: normalised batch float32 [N, 3, S, S] in, unit vectors [N, D] out (SSCD's interface).

    TorchScript can run code: only load a file you trust, or pin it with ``sha256``. Raises DescriptorError where
    the file is missing, is not the pinned one, or does not load.
    """

    def __init__(
        self, path: Path, label: str, input_size: int, threshold: float, sha256: str | None = None, device: str = "cpu"
    ) -> None:
        import torch

        digest = file_sha256(path)
        if sha256 is not None and digest != sha256:
            raise DescriptorError(
                f"{path} is not the pinned {label} (SHA256 {digest}, expected {sha256}): download it again"
            )
        try:
            self._model = torch.jit.load(str(path), map_location=device).eval()
            with torch.inference_mode():
                self.dimensions = int(self._model(torch.zeros(1, 3, input_size, input_size, device=device)).shape[1])
        except RuntimeError as error:
            raise_fault(error, f"the descriptor {path}", device)
            raise DescriptorError(f"{path} does not load as a TorchScript descriptor: {str(error)[:200]}") from error
        self.device = device
        self.name = network_name(label, digest, input_size)
        self.input_size = input_size
        self.threshold = threshold

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(batch).to(self.device)).float().cpu().numpy()


class OnnxDescriptor(Descriptor):
    """The same as an ONNX file, through onnxruntime (the extra ``onnx``).

    Raises DescriptorError where onnxruntime is not installed, or the file is missing, not the pinned one, or broken.
    """

    def __init__(
        self, path: Path, label: str, input_size: int, threshold: float, sha256: str | None = None, threads: int = 0
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DescriptorError(f"{path} needs onnxruntime: pip install 'lora-audit[onnx]'") from error
        digest = file_sha256(path)
        if sha256 is not None and digest != sha256:
            raise DescriptorError(
                f"{path} is not the pinned {label} (SHA256 {digest}, expected {sha256}): download it again"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self._input = self._session.get_inputs()[0].name
            self.dimensions = int(self._run(np.zeros((1, 3, input_size, input_size), np.float32)).shape[1])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise DescriptorError(f"{path} does not load as an ONNX descriptor: {str(error)[:200]}") from error
        self.name = network_name(label, digest, input_size)
        self.input_size = input_size
        self.threshold = threshold

    def _run(self, batch: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(None, {self._input: batch})[0])

    def _vectors(self, batch: np.ndarray) -> np.ndarray:
        return self._run(batch)
