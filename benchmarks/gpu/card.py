"""The card itself: its rates and memory, and the versions of what runs on it."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import version

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures
from benchmarks.gpu.measure import GIB, seconds_of


def measure(bench: Bench) -> None:
    """Versions first, so that they are there whatever happens later; then matrix products and copies."""
    bench.record.step("versions", 1, lambda: _versions(bench))
    bench.record.step("rates", 5, lambda: _rates(bench))


def _versions(bench: Bench) -> Figures:
    names = ("diffusers", "transformers", "numpy")
    found: dict[str, float | int | str | bool | None] = {name: version(name) for name in names}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "device": bench.device}
    if not bench.cuda:
        return found | {"processor": platform.machine(), "threads": torch.get_num_threads()}
    free, total = torch.cuda.mem_get_info()
    return found | {
        "device": torch.cuda.get_device_name(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "free_gib": free / GIB,
        "total_gib": total / GIB,
    }


def _driver() -> str:
    """The driver's version as the kernel tells it."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            return next((word for word in file.readline().split() if word[0].isdigit()), "unknown")
    except OSError:
        return "unknown"


def _rates(bench: Bench) -> Figures:
    figures: dict[str, float] = {}
    side = bench.size(8192, 32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        first, second = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        seconds = seconds_of(partial(torch.matmul, first, second), bench.device, 10, 3)
        figures[f"{name}_tflop_s"] = 2 * side**3 / seconds / 1e12
    source = torch.randn(bench.size(2**29, 2**16), device=bench.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), bench.device, 5)
    return figures | {"copy_tb_s": 2 * source.numel() * source.element_size() / seconds / 1e12}
