"""Stable Diffusion 1.5 and XL at their published sizes with random weights: what each part of an audit costs.

Putting a LoRA of rank 64 into effect, the UNet and the decoder by batch size, and an extraction as an audit runs it
beside diffusers' own pipeline with the LoRA fused, both in the same run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.gpu import models, subject
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures
from benchmarks.gpu.measure import cost_of, release, tera_operations, wait
from benchmarks.gpu.models import Kind

RANK, TINY_RANK = 64, 4
Work = Callable[[], object]
MOST_OTHER_SHARE = 0.05
LEAST_TIMES_FASTER = 1.5


@dataclass(frozen=True)
class Sweep:
    """Batch sizes, how many images are extracted and drawn by diffusers, and seconds that the steps take."""

    evaluations: tuple[int, ...]
    decodings: tuple[int, ...]
    images: int
    pipeline_batches: tuple[int, ...]
    pipeline_images: int
    build: float
    step: float
    extraction: float
    pipeline: float


SWEEPS = {
    Kind.sd15: Sweep((1, 4, 16, 64), (1, 8, 32, 64), 128, (8, 16, 32), 64, 16.0, 2.5, 16.0, 16.0),
    Kind.sdxl: Sweep((1, 4, 16, 64), (1, 4, 16, 64), 32, (2, 4, 8), 16, 40.0, 6.0, 24.0, 18.0),
}
TINY = Sweep((1, 2), (1, 2), 4, (1, 2), 2, 1.0, 1.0, 1.0, 1.0)


def measure_sd15(bench: Bench) -> None:
    """Stable Diffusion 1.5 at 512 pixels."""
    _measure(bench, Kind.sd15)


def measure_sdxl(bench: Bench) -> None:
    """Stable Diffusion XL at 1024 pixels; the other one's memory is given back first."""
    bench.forget()
    _measure(bench, Kind.sdxl)
    bench.forget()


def _measure(bench: Bench, kind: Kind) -> None:
    sweep = bench.size(SWEEPS[kind], TINY)
    if not bench.record.step("checkpoint", sweep.build, lambda: _checkpoint(bench, kind)):
        return
    real = pair_of(bench, kind)
    pair = real.pair
    _sweep(bench, "UNet", sweep.evaluations, sweep.step, lambda batch: subject.evaluation(pair, batch))
    _sweep(bench, "decoder", sweep.decodings, sweep.step, lambda batch: subject.decoding(pair, batch))
    release(bench.device)
    rates: list[float] = []
    bench.record.step("extraction", sweep.extraction, lambda: _extraction(bench, kind, sweep, real, rates))
    bench.record.step("diffusers", sweep.pipeline, lambda: _diffusers(bench, kind, sweep, real, rates))


def pair_of(bench: Bench, kind: Kind) -> subject.RealPair:
    """The pair of ``kind``, made where no part before has left it."""

    def make() -> subject.RealPair:
        pipeline = models.make_pipeline(kind, bench.device, bench.tiny)
        release(bench.device)
        lora = bench.folder / f"{kind}.safetensors"
        models.make_lora(pipeline.unet, lora, bench.size(RANK, TINY_RANK))
        return subject.real_pair(pipeline, lora, bench.device, lambda: wait(bench.device))

    return bench.pair(kind, make)


def _checkpoint(bench: Bench, kind: Kind) -> Figures:
    real = pair_of(bench, kind)
    return {
        "first_s": real.first_seconds,
        "second_s": real.second_seconds,
        "lora_mib": real.lora.stat().st_size / 2**20,
        "unet_parameters": models.parameters([real.pair.base.unet]),
        "prediction_change": real.pair.effect.prediction,
        "resident_gib": torch.cuda.memory_allocated() / 2**30 if bench.cuda else None,
    }


def _sweep(bench: Bench, name: str, batches: tuple[int, ...], cost: float, work_of: Callable[[int], Work]) -> None:
    """The work at each batch size, until one does not fit into memory."""
    operations = cache(lambda: tera_operations(work_of(1)))

    @torch.inference_mode()
    def swept(batch: int) -> Figures:
        found = cost_of(work_of(batch), bench.device)
        if found is None:
            return {"out_of_memory": True}
        return {
            "ms": found.seconds * 1e3,
            "a_second": batch / found.seconds,
            "tflop_s": batch * operations() / found.seconds,
            "activations_gib": found.gib,
        }

    for batch in batches:
        measured = bench.record.step(f"{name}, batch {batch}", cost, partial(swept, batch))
        if measured and bench.record.last.get("out_of_memory"):
            break


def _extraction(bench: Bench, kind: Kind, sweep: Sweep, real: subject.RealPair, rates: list[float]) -> Figures:
    found = subject.extract(real.pair, bench.device, bench.folder / f"extraction-{kind}", sweep.images)
    other = 1 - found.evaluation_share
    rates.append(found.images / found.seconds)
    bench.record.bound("share that is not network evaluation", other, at_most=MOST_OTHER_SHARE, speed=True)
    bench.record.bound("samplings of images kept", found.samplings / found.images, equal=1.0)
    return {
        "images": found.images,
        "seconds": found.seconds,
        "images_s": found.images / found.seconds,
        "not_evaluation_share": other,
        "decoding_share": found.decoding_share,
        "samplings_an_image": found.samplings / found.images,
        "batch_left": found.batch,
    }


def _diffusers(bench: Bench, kind: Kind, sweep: Sweep, real: subject.RealPair, rates: list[float]) -> Figures:
    """As many evaluations a step: classifier-free guidance is two, as model guidance is."""
    release(bench.device)
    pipeline = _plain_pipeline(real)
    rated = {batch: _short_rate(pipeline, batch, bench) for batch in sweep.pipeline_batches}
    best = max(rated, key=lambda batch: rated[batch])
    _draw(pipeline, best, 1, "pil")
    started = time.perf_counter()
    pictures: list[Any] = []
    while len(pictures) < sweep.pipeline_images:
        pictures += _draw(pipeline, best, subject.STEPS, "pil")
    sampling = time.perf_counter() - started
    subject.describe_and_keep(pictures, bench.device, bench.folder / f"pictures-{kind}")
    whole = time.perf_counter() - started
    figures = {
        "best_batch": best,
        "images": len(pictures),
        "images_s": len(pictures) / sampling,
        "images_s_described_and_kept": len(pictures) / whole,
    }
    if rates:
        times = rates[0] * sampling / len(pictures)
        bench.record.bound("times diffusers' images a second", times, at_least=LEAST_TIMES_FASTER, speed=True)
        figures |= {"ours_faster": times, "ours_faster_described_and_kept": rates[0] * whole / len(pictures)}
    return figures


def _plain_pipeline(real: subject.RealPair) -> Any:
    """diffusers' own, in the pair's precision, as it loads them: the LoRA fused, weights not channels-last."""
    from diffusers import DPMSolverMultistepScheduler

    pair = real.pair
    pipeline = copy.copy(pair.base)
    plain = torch.contiguous_format
    pipeline.unet = copy.deepcopy(pair.base.unet).to(memory_format=plain)
    pipeline.vae = copy.deepcopy(pair.vae).to(pair.dtype).to(memory_format=plain)
    models.fuse_by_diffusers(pipeline.unet, real.lora)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pair.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _short_rate(pipeline: Any, batch: int, bench: Bench) -> float:
    """Images a second of two steps without decoding, after a call that does not count; 0 where it does not fit."""
    try:
        _draw(pipeline, batch, 1, "latent")
        started = time.perf_counter()
        _draw(pipeline, batch, 2, "latent")
        wait(bench.device)
        return batch / (time.perf_counter() - started)
    except torch.OutOfMemoryError:
        release(bench.device)
        return 0.0


def _draw(pipeline: Any, batch: int, steps: int, form: str) -> Any:
    return pipeline(
        [subject.CAPTION] * batch, num_inference_steps=steps, guidance_scale=3.0, output_type=form, return_dict=False
    )[0]
