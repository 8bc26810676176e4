"""The best references of many extractions as matrix products on the device: 10,000 against 1,000,000 descriptors."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures
from benchmarks.gpu.measure import wait

DIMENSIONS = 512
BEST = 3
BLOCK = 1 << 16  # references a product: with 10,000 queries 1.3 GB of cosines in half precision


def measure(bench: Bench) -> None:
    """Random descriptors among which every query has one near copy."""
    bench.record.step("10,000 x 1,000,000" if not bench.tiny else "100 x 2,000", 10, lambda: _measure(bench))


def best_matches(queries: torch.Tensor, references: torch.Tensor, best: int, block: int = BLOCK) -> torch.Tensor:
    """The numbers int64 [N, best] of the references with the highest cosines, the highest first.

    ``queries`` [N, D] and ``references`` [M, D] are unit vectors on one device; cosines are of their precision.
    """
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, len(references), block):
        cosines = queries @ references[start : start + block].T
        values, numbers = cosines.topk(min(best, cosines.shape[1]), dim=1)
        numbers = numbers + start
        if found is not None:
            values, numbers = torch.cat([found[0], values], 1), torch.cat([found[1], numbers], 1)
            values, order = values.topk(min(best, values.shape[1]), dim=1)
            numbers = numbers.gather(1, order)
        found = values, numbers
    if found is None:
        raise ValueError("there are no references to match with")
    return found[1]


def _measure(bench: Bench) -> Figures:
    count, size = bench.size((10_000, 1_000_000), (100, 2_000))
    dtype = torch.float16 if bench.cuda else torch.float32
    generator = torch.Generator(bench.device).manual_seed(0)
    references = _units(torch.randn(size, DIMENSIONS, generator=generator, device=bench.device, dtype=dtype))
    copied = torch.randperm(size, generator=generator, device=bench.device)[:count]
    noise = torch.randn(count, DIMENSIONS, generator=generator, device=bench.device, dtype=dtype)
    queries = _units(references[copied] + noise * (0.5 / DIMENSIONS**0.5))
    best_matches(queries, references[:BLOCK], BEST)
    wait(bench.device)
    started = time.perf_counter()
    found = best_matches(queries, references, BEST, bench.size(BLOCK, 512))
    wait(bench.device)
    seconds = time.perf_counter() - started
    share = float((found[:, 0] == copied).float().mean())
    bench.record.bound("share of the copies that come first", share, equal=1.0)
    return {
        "seconds": seconds,
        "cosines_s": count * size / seconds,
        "tflop_s": 2 * count * size * DIMENSIONS / seconds / 1e12,
        "copies_first": share,
    }


def _units(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
