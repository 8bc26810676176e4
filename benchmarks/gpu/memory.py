"""Memory that runs out: batches are halved, nothing is sampled twice, and an error of the card is not taken for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.gpu import subject
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures
from benchmarks.gpu.measure import release

CAP_MIB = 48  # above what is reserved: less than a batch of 256 needs, more than one of 1
STEPS, TINY_STEPS = 4, 2


def measure(bench: Bench) -> None:
    """A cap on the device's memory, one that only decoding meets, and an error that is none of memory."""
    pair = subject.nano_pair(bench.device)
    count, steps = bench.size((256, STEPS), (6, TINY_STEPS))
    whole = subject.images_of(subject.sampler_of(pair, bench.size(64, 6), steps), count)
    for name, measure_one in (("a cap on memory", _capped), ("decoding alone", _decoding)):
        bench.record.step(name, 4, partial(measure_one, bench, subject.sampler_of(pair, count, steps), whole))
    bench.record.step("sticky error", 12, lambda: _sticky(bench))


def _capped(bench: Bench, sampler: subject.Sampler, whole: np.ndarray) -> Figures:
    """On a CPU, whose memory has no cap, batches of more than two are refused."""
    if not bench.cuda:
        with subject.refusing(sampler, "latents", 2, _exhaust(bench)):
            return _halved(bench, "images kept under a cap", sampler, whole)
    release(bench.device)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + CAP_MIB * 2**20) / total)
    try:
        return _halved(bench, "images kept under a cap", sampler, whole)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _decoding(bench: Bench, sampler: subject.Sampler, whole: np.ndarray) -> Figures:
    most = max(1, len(whole) // 3)
    with subject.refusing(sampler, "vae", most, _exhaust(bench)):
        return _halved(bench, "images kept, decoding short of memory", sampler, whole)


def _exhaust(bench: Bench) -> Callable[[], None]:
    """Ask the device for more than it has; a CPU would give it, so that there the error is raised as it would be."""

    def exhaust() -> None:
        if not bench.cuda:
            raise torch.OutOfMemoryError("the CPU's memory is taken for exhausted here")
        torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device=bench.device)

    return exhaust


def _halved(bench: Bench, name: str, sampler: subject.Sampler, whole: np.ndarray) -> Figures:
    with subject.counting_samplings(sampler) as sampled:
        images = subject.images_of(sampler, len(whole))
    a_kept = sum(sampled) / len(whole)
    bench.record.bound(f"samplings of {name}", a_kept, equal=1.0)
    difference = np.abs(images.astype(int) - whole.astype(int))
    return {
        "images": len(whole),
        "samplings_an_image": a_kept,
        "largest_batch": max(sampled),
        "batch_left": sampler.batch_size,
        "levels_most": int(difference.max()),
    }


def _sticky(bench: Bench) -> Figures:
    """In a process of its own: after such an error nothing on the device can be used any more."""
    command = [sys.executable, "-m", "benchmarks.gpu.sticky", bench.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 if bench.cuda else None, check=False)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"the child process ended with {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])
