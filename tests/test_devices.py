"""What errors of devices mean, a row a text; what an error holds is released."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from audit.devices import Fault, fault_of, raise_fault, release
from audit.engine.work import kind_of
from audit.errors import (
    CheckpointError,
    ConfigError,
    DescriptorError,
    DeviceLostError,
    DeviceMemoryError,
    WorkspaceError,
)

TEXTS = [
    ("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported", Fault.lost),
    ("CUDA error: an illegal memory access was encountered", Fault.lost),
    ("CUDA error: an illegal instruction was encountered", Fault.lost),
    ("CUDA error: misaligned address", Fault.lost),
    ("CUDA error: unspecified launch failure", Fault.lost),
    ("CUDA error: the launch timed out and was terminated", Fault.lost),
    ("CUDA error: uncorrectable ECC error encountered", Fault.lost),
    ("CUDA error: uncorrectable NVLink error detected during the execution", Fault.lost),
    ("CUDA error: invalid program counter", Fault.lost),
    ("CUDA error: hardware stack error", Fault.lost),
    ("CUDA error: unknown error", Fault.lost),
    ("CUDA error: initialization error", Fault.lost),
    ("CUDA error: all CUDA-capable devices are busy or unavailable", Fault.lost),
    ("CUDA error: no CUDA-capable device is detected", Fault.lost),
    ("CUDA error: no kernel image is available for execution on the device", Fault.lost),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", Fault.lost),
    ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", Fault.lost),
    ("cuDNN error: CUDNN_STATUS_MAPPING_ERROR", Fault.lost),
    ("Unable to determine the device handle for GPU0: GPU is lost. Reboot the system to recover this GPU", Fault.lost),
    ("Found no NVIDIA driver on your system.", Fault.lost),
    ("Torch not compiled with CUDA enabled", Fault.lost),
    ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB", Fault.memory),
    ("CUDA error: out of memory", Fault.memory),
    ("CUDA driver error: out of memory", Fault.memory),
    ("HIP out of memory. Tried to allocate 20.00 MiB", Fault.memory),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Fault.memory),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", Fault.memory),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", Fault.memory),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", Fault.memory),
    ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", Fault.memory),
    ("FIND was unable to find an engine to execute this computation", Fault.memory),
    ("GET was unable to find an engine to execute this computation", Fault.memory),
    ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", Fault.memory),
    ("cuFFT error: CUFFT_ALLOC_FAILED", Fault.memory),
    ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)", Fault.memory),
    ("DefaultCPUAllocator: not enough memory: you tried to allocate 40 bytes.", Fault.memory),
    ("Failed to allocate memory for requested buffer of size 1610612736", Fault.memory),
    ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", None),
    ("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!", None),
    ("The size of tensor a (77) must match the size of tensor b (32) at non-singleton dimension 1", None),
    ("CUDA error: invalid argument", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "fault"), TEXTS, ids=[text[:50] for text, _ in TEXTS])
def test_an_error_of_a_device_is_told_by_its_text(text: str, fault: Fault | None) -> None:
    assert fault_of(RuntimeError(text)) is fault
    wanted = {Fault.lost: "device-lost", Fault.memory: "out-of-memory", None: "error"}[fault]
    assert kind_of(RuntimeError(text)) == wanted


@pytest.mark.parametrize(
    ("code", "fault"),
    [(2, Fault.memory), (214, Fault.lost), (700, Fault.lost), (710, Fault.lost), (719, Fault.lost), (1, None)],
)
def test_an_error_of_a_device_is_told_by_its_code(code: int, fault: Fault | None) -> None:
    error = torch.AcceleratorError("CUDA error: in other words")
    error.error_code = code
    assert fault_of(error) is fault


def test_types_alone_are_enough() -> None:
    assert fault_of(torch.OutOfMemoryError("")) is Fault.memory
    assert fault_of(MemoryError()) is Fault.memory
    assert fault_of(ValueError("out of memory")) is None  # a stranger's words are no device's


def test_a_fault_is_found_behind_the_error_that_it_caused() -> None:
    outer = ValueError("module x")
    outer.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert fault_of(outer) is Fault.memory


def test_what_a_stranger_wrote_into_a_message_is_no_fault() -> None:
    assert fault_of(CheckpointError("the file 'device-side assert out of memory' does not fit")) is None
    assert kind_of(CheckpointError("out of memory")) == "input"
    assert kind_of(WorkspaceError("the disk is full")) == "storage"
    assert (
        kind_of(DescriptorError("not here")) == kind_of(ConfigError("another base here")) == "error"
    )  # of the machine


def test_faults_become_errors_in_words() -> None:
    with pytest.raises(DeviceMemoryError, match="the networks does not fit into the memory of cuda:0"):
        raise_fault(torch.OutOfMemoryError("CUDA out of memory"), "the networks", "cuda:0")
    with pytest.raises(DeviceLostError, match="cuda:0 was lost"):
        raise_fault(RuntimeError("CUDA error: device-side assert triggered"), "auditing x", "cuda:0")
    raise_fault(RuntimeError("shapes"), "auditing x", "cuda:0")  # not a device's: the caller raises it again
    assert kind_of(DeviceLostError("x")) == "device-lost"
    assert kind_of(DeviceMemoryError("x")) == "out-of-memory"


def test_what_the_frames_of_an_error_hold_is_released() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    kept = None
    try:
        fail()
    except RuntimeError as error:
        kept = error
    gc.collect()
    assert held[0]() is not None  # the traceback holds it
    release("cpu", kept)
    assert held[0]() is None
