"""Time, memory and operations of work on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30


def is_cuda(device: str) -> bool:
    """Whether ``device`` is a CUDA one."""
    return device.startswith("cuda")


def wait(device: str) -> None:
    """Until everything asked of the device is done."""
    if is_cuda(device):
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()


def seconds_of(work: Callable[[], object], device: str, repeats: int = 3, warm: int = 1) -> float:
    """The median wall time of ``work``, the device's included, after ``warm`` calls that do not count."""
    for _ in range(warm):
        work()
    wait(device)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@dataclass(frozen=True)
class Cost:
    """Seconds of a piece of work, and the GiB it needed above what was there before; None on a CPU."""

    seconds: float
    gib: float | None


def cost_of(work: Callable[[], object], device: str, repeats: int = 2) -> Cost | None:
    """What ``work`` costs; None where the device has not enough memory for it."""
    release(device)
    before = 0
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        seconds = seconds_of(work, device, repeats)
    except torch.OutOfMemoryError:
        return None
    finally:
        peak = torch.cuda.max_memory_allocated() if is_cuda(device) else 0
    return Cost(seconds, (peak - before) / GIB if is_cuda(device) else None)


def tera_operations(work: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products, convolutions and attention in ``work``, in 10^12.

    A multiplication and an addition are two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


class Clock:
    """Time the device spends within named calls: between two events of its stream, or wall time on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Within, the time of ``owner.name`` counts as ``part``."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self._counting(part):
                return inner(*arguments, **named)

        with replaced(owner, name, timed):
            yield

    @contextmanager
    def _counting(self, part: str) -> Iterator[None]:
        if is_cuda(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events[part].append((first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - started

    def seconds(self, part: str) -> float:
        """Seconds in ``part`` so far."""
        wait(self.device)
        return self._seconds[part] + sum(first.elapsed_time(last) for first, last in self._events[part]) / 1000


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, ``owner.name`` is ``value``; after it the owner is as it was."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
