"""Devices: what their errors mean, and what they are asked about memory.

PyTorch tells most failures of a GPU by the text of a RuntimeError alone. They are told apart here and nowhere else:
``fault_of`` is the one place that reads such texts.
"""

from __future__ import annotations

import gc
import platform
import re
import traceback
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from audit.errors import AuditError, DeviceLostError, DeviceMemoryError


class Fault(StrEnum):
    """What a device's error means.

    ``memory``: it does not fit; less at once may. ``lost``: the device answers nothing any more, in this process at
    least: CUDA keeps an error of its kernels until the process ends, and every later call fails with it.
    """

    memory = "memory"
    lost = "lost"


# CUDA's runtime codes (cudaError_t in driver_types.h), which torch.AcceleratorError carries as ``error_code``.
_CODES = {
    2: Fault.memory,  # cudaErrorMemoryAllocation
    46: Fault.lost,  # cudaErrorDevicesUnavailable
    100: Fault.lost,  # cudaErrorNoDevice
    101: Fault.lost,  # cudaErrorInvalidDevice
    209: Fault.lost,  # cudaErrorNoKernelImageForDevice
    214: Fault.lost,  # cudaErrorECCUncorrectable
    700: Fault.lost,  # cudaErrorIllegalAddress
    702: Fault.lost,  # cudaErrorLaunchTimeout
    710: Fault.lost,  # cudaErrorAssert
    714: Fault.lost,  # cudaErrorHardwareStackError
    715: Fault.lost,  # cudaErrorIllegalInstruction
    716: Fault.lost,  # cudaErrorMisalignedAddress
    717: Fault.lost,  # cudaErrorInvalidAddressSpace
    718: Fault.lost,  # cudaErrorInvalidPc
    719: Fault.lost,  # cudaErrorLaunchFailure
    999: Fault.lost,  # cudaErrorUnknown
}

# The texts, in order: "illegal memory access" is no lack of memory.
_TEXTS = tuple(
    (re.compile(text, re.IGNORECASE), fault)
    for text, fault in (
        (r"device-side assert", Fault.lost),
        (r"illegal memory access|illegal address", Fault.lost),
        (r"illegal instruction was encountered|misaligned address|invalid program counter", Fault.lost),
        (r"operation not supported on global/shared address space|hardware stack error", Fault.lost),
        (r"unspecified launch failure|launch timed out and was terminated", Fault.lost),
        (r"uncorrectable (?:ECC|NVLink) error", Fault.lost),
        (r"fallen off the bus|GPU is lost|CUDA-capable devices? (?:is|are)\b", Fault.lost),
        (r"no kernel image is available|error: (?:unknown error|initialization error)", Fault.lost),
        (r"CUBLAS_STATUS_EXECUTION_FAILED|CUDNN_STATUS_EXECUTION_FAILED|CUDNN_STATUS_MAPPING_ERROR", Fault.lost),
        (r"not compiled with CUDA|Found no NVIDIA driver|NVIDIA driver on your system is too old", Fault.lost),
        (r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", Fault.memory),
        (r"failed to allocate memory", Fault.memory),
        (r"(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED", Fault.memory),
        # without workspace memory these libraries do not start, or find no way to compute
        (r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED|CUSOLVER_STATUS_NOT_INITIALIZED", Fault.memory),
        (r"CUDNN_STATUS_INTERNAL_ERROR|unable to find an engine to execute", Fault.memory),
    )
)  # fmt: skip


def fault_of(error: BaseException) -> Fault | None:
    """What a device's error means; None for errors that are of no device. Causes are looked at too."""
    for one in _with_causes(error):
        if isinstance(one, DeviceLostError):
            return Fault.lost
        if isinstance(one, (DeviceMemoryError, MemoryError)):
            return Fault.memory
        if isinstance(one, AuditError) or not isinstance(one, (RuntimeError, AssertionError)):
            continue
        if type(one).__name__ == "OutOfMemoryError":  # torch's own, without importing torch
            return Fault.memory
        fault = _CODES.get(getattr(one, "error_code", None) or -1)
        text = str(one)
        fault = fault or next((fault for pattern, fault in _TEXTS if pattern.search(text)), None)
        if fault:
            return fault
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__


def raise_fault(error: BaseException, what: str, where: str) -> None:
    """Raise DeviceMemoryError or DeviceLostError where ``error`` means that, saying ``what`` was done ``where``."""
    fault = fault_of(error)
    if fault is None or isinstance(error, (DeviceMemoryError, DeviceLostError)):
        return
    text = " ".join(str(error).split())[:300]
    if fault is Fault.memory:
        raise DeviceMemoryError(
            f"{what} does not fit into the memory of {where}: use a device with more, or a smaller model ({text})"
        ) from error
    raise DeviceLostError(
        f"{where} was lost while {what}: this process cannot use it any more; start again, and look at the driver's "
        f"log if it happens again ({text})"
    ) from error


def release(device: Any, error: BaseException | None = None) -> None:
    """Give back what is cached on ``device``; of ``error``, also what the frames of its traceback hold."""
    import torch

    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def supports_bfloat16(device: Any) -> bool:
    """Whether the device computes in bfloat16 itself (NVIDIA: compute capability 8.0 and later)."""
    import torch

    where = torch.device(device)
    return where.type != "cuda" or torch.cuda.get_device_capability(where) >= (8, 0)


def free_memory(device: Any) -> int | None:
    """Bytes that can still be had on a GPU, what PyTorch holds unused included; None on a CPU."""
    import torch

    where = torch.device(device)
    if where.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(where)
    return int(free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where))


def reset_peak_memory(device: str) -> None:
    """Begin to measure ``peak_memory`` anew."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """The most memory used on a GPU since ``reset_peak_memory``, bytes; on a CPU this process's largest ever."""
    import resource

    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: str) -> str:
    """The card's name, or the kind of CPU and torch's threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.machine()}, {torch.get_num_threads()} threads"


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
