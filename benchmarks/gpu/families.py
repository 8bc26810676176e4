"""The nano model of every family in half precision against float32 on the host, and waits within the sampling loop."""

from __future__ import annotations

import traceback
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import subject
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures

# The most that the latents may differ, relative to their norm. What a CPU has in half precision is a tenth to a
# quarter of it: .0013 with the UNets, .0066 (Stable Diffusion 3), .019 (Flux), .034 (Chroma).
BOUNDS = {
    "sd1": 0.01, "sd2": 0.01, "sdxl": 0.01, "alt": 0.01, "sd3": 0.05, "flux": 0.1, "chroma": 0.15, "klein": 0.15,
    "z-image": 0.15, "qwen": 0.15, "ernie": 0.15, "krea2": 0.15, "wan": 0.15,
    "hidream": 0.15, "anima": 0.15,
    "wan22": 0.15, "wan-5b": 0.15,
}  # fmt: skip
CAPTIONS = ("a photo of sks dog", "painting of the red cat")
STEPS, TINY_STEPS = 6, 3
ROOT = Path(__file__).parents[2]


def measure(bench: Bench) -> None:
    """One step a family."""
    from tests.models.nano import FAMILIES

    for name in FAMILIES:
        bench.record.step(name, 40 / len(FAMILIES), partial(_family, bench, name))


def _family(bench: Bench, name: str) -> Figures:
    from tests.models import nano
    from tests.models.files import full_change

    torch.manual_seed(0)
    with torch.enable_grad():  # the classes draw their weights in place
        base = nano.make(name, bench.folder / "families")
    checkpoint = full_change(base, bench.folder / f"families/{name}-tuned")
    steps = bench.size(STEPS, TINY_STEPS)
    latents = {}
    for half, device in ((False, "cpu"), (True, bench.device)):
        pair = subject.family_pair(base, checkpoint, device, half)
        sampler = subject.sampler_of(pair, steps=steps, captions=CAPTIONS, seed=3)
        latents[half] = sampler.latents([0, 1]).float().cpu()
    pair.decode(sampler.latents([0, 1]))
    waits = _waits(bench, sampler)
    error = float((latents[True] - latents[False]).norm() / latents[False].norm())
    bench.record.bound(f"{name} in half precision", error, at_most=BOUNDS[name])
    return {"dtype": str(pair.dtype).removeprefix("torch."), "error": error, "waits_at": waits}


def _waits(bench: Bench, sampler: subject.Sampler) -> str:
    """Where the loop first waits for the device: the project's line and the innermost one; "nowhere"."""
    if not bench.cuda:
        subject.watch_loop(sampler, 2, lambda: None)
        return "not seen on a CPU"
    try:
        subject.watch_loop(sampler, 2, lambda: torch.cuda.set_sync_debug_mode("error"))
    except RuntimeError as error:
        if "synchroniz" not in str(error).lower():
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "audit")]
        return " via ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [frames[-1], *own[-1:]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nowhere"
