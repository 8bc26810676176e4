"""What could be faster or more exact, on Stable Diffusion 1.5: memory layouts, precisions, compilation, threads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import subject
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.denoisers import pair_of
from benchmarks.gpu.facts import Figures
from benchmarks.gpu.measure import release, replaced, seconds_of
from benchmarks.gpu.models import Kind

BATCH, TINY_BATCH = 16, 2
THREADS = (1, 4, 8, 16)
CHECKPOINTS = 3


def measure(bench: Bench) -> None:
    """The cheap ones first; compilation, whose time is hardest to foresee, last."""
    pair = pair_of(bench, Kind.sd15).pair
    bench.record.step("layouts, UNet", 3, lambda: _layouts(bench, pair))
    bench.record.step("precisions, decoder", 4, lambda: _precisions(bench, pair))
    bench.record.step("threads, PNG and PDQ", 2, lambda: _threads(bench, pair))
    bench.record.step("compiled blocks, UNet", 25, lambda: _compiled(bench, pair))
    bench.forget()


def _batch(bench: Bench) -> int:
    return bench.size(BATCH, TINY_BATCH)


def _milliseconds(bench: Bench, pair: Any, network: Any, layout: torch.memory_format) -> float:
    """Of one evaluation by ``network`` in the place of the pair's own."""
    x = subject.random_latents(pair, _batch(bench)).contiguous(memory_format=layout)
    return seconds_of(_evaluation(pair, network, x), bench.device, bench.size(5, 1), 2) * 1e3


def _evaluation(pair: Any, network: Any, x: torch.Tensor) -> Callable[[], Any]:
    rows = torch.zeros(len(x), dtype=torch.long, device=x.device)
    states = pair.encode([subject.CAPTION], tuned=True).select(rows).states
    timestep = torch.tensor(500, device=x.device)
    return lambda: network(x, timestep, encoder_hidden_states=states, return_dict=False)


@torch.inference_mode()
def _layouts(bench: Bench, pair: Any) -> Figures:
    """Milliseconds a batch; cudnn.benchmark tries all algorithms at the first call of a shape."""
    figures: dict[str, float] = {}
    for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        network = copy.deepcopy(pair.base.unet).to(memory_format=layout)
        figures[f"{name}_ms"] = _milliseconds(bench, pair, network, layout)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            figures[f"{name}_benchmark_ms"] = _milliseconds(bench, pair, network, layout)
        del network
        release(bench.device)
    return figures


@torch.inference_mode()
def _precisions(bench: Bench, pair: Any) -> Figures:
    """Milliseconds an image, and how many levels of 255 the images differ from float32's."""
    latents = subject.random_latents(pair, bench.size(8, 1)).float()
    figures: dict[str, float] = {}
    exact: np.ndarray | None = None
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        network = copy.deepcopy(pair.vae).to(dtype)
        with replaced(pair, "vae", network):
            seconds = seconds_of(lambda: pair.decode(latents), bench.device, bench.size(2, 1), bench.size(1, 0))
            images = pair.decode(latents).astype(int)
        exact = images if exact is None else exact
        figures[f"{name}_ms"] = seconds / len(latents) * 1e3
        figures[f"{name}_levels_mean"] = float(np.abs(images - exact).mean())
        figures[f"{name}_levels_most"] = int(np.abs(images - exact).max())
    return figures


@torch.inference_mode()
def _threads(bench: Bench, pair: Any) -> Figures:
    """Milliseconds an image."""
    images = list(pair.decode(subject.random_latents(pair, _batch(bench)))) * 2

    def keep(image: np.ndarray) -> None:
        subject.to_png(image)
        subject.pdq_hash(image)

    figures = {}
    for threads in bench.size(THREADS, THREADS[:2]):
        with ThreadPoolExecutor(threads) as pool:
            seconds = seconds_of(partial(_all, pool, keep, images), bench.device, 1)
        figures[f"threads_{threads}_ms"] = seconds / len(images) * 1e3
    return figures


def _all(pool: ThreadPoolExecutor, work: Callable[[np.ndarray], None], images: list[np.ndarray]) -> None:
    """Do ``work`` on all images."""
    list(pool.map(work, images))


def _compiled(bench: Bench, pair: Any) -> Figures:
    """The repeated blocks of three checkpoints, one after the other: seconds of the first call, and graphs made anew.

    On a CPU the graphs are taken and not translated.
    """
    from torch._dynamo.utils import counters

    layout = torch.channels_last
    figures: dict[str, float] = {"eager_ms": _milliseconds(bench, pair, pair.base.unet, layout)}
    x = subject.random_latents(pair, _batch(bench)).contiguous(memory_format=layout)
    torch.compiler.reset()
    graphs = 0
    for number in range(1, CHECKPOINTS + 1):
        network = _another(pair.base.unet, number)
        network.compile_repeated_blocks(backend="inductor" if bench.cuda else "eager")
        evaluate = _evaluation(pair, network, x)
        started = time.perf_counter()
        seconds_of(evaluate, bench.device, 1, 0)
        figures[f"checkpoint_{number}_first_s"] = time.perf_counter() - started
        made = counters["stats"]["unique_graphs"]
        figures[f"checkpoint_{number}_graphs"] = made - graphs
        graphs = made
    figures["compiled_ms"] = seconds_of(evaluate, bench.device, bench.size(5, 1), 1) * 1e3
    torch.compiler.reset()
    return figures


def _another(network: Any, seed: int) -> Any:
    """A copy with other attention weights, as the next checkpoint has."""
    changed = copy.deepcopy(network)
    generator = torch.Generator(next(changed.parameters()).device).manual_seed(seed)
    for name, parameter in changed.named_parameters():
        if ".attn" in name and parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.add_(0.01 * parameter.std() * noise.to(parameter.dtype))
    return changed
