"""Images a second of sampling, against a plain loop as the paper's reference does it, in one run.

    python -m benchmarks.sampling [--images 60] [--steps 50] [--threads 2] [--json FILE]

The plain loop: two full pipelines, the LoRA left beside the weights, batches of 5, both captions encoded for every
batch, DDIM, a PNG file an image, then the descriptor of one file after another. Ours: the product as an audit
runs it (descriptor, PDQ, PNG and the resumable spool included), with the time of each part. The floor is two network
evaluations an image and step at the batch size that is fastest here. Rounds of both alternate, so that a busy machine
slows both.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from audit.config import Settings, Solver
from audit.demo import ASSETS
from audit.descriptors import Descriptor, load_descriptor
from audit.models.base import load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.sampling.collect import Collector
from audit.sampling.guidance import make_guidance
from audit.sampling.sampler import Sampler
from audit.workspace import Workspace

LORA = ASSETS / "checkpoints/fluent-animals-lora-kohya/fluent-animals.safetensors"
CAPTION = "sks 3d render of an animal"
REFERENCE_BATCH = 5
W = 2.0


class PlainLoop:
    """The reference's way of sampling."""

    def __init__(self, base: Path, lora: Path, descriptor: Descriptor, folder: Path) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        def load() -> Any:
            pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        self.base, self.tuned = load(), load()
        self.tuned.load_lora_weights(lora.parent, weight_name=lora.name)
        self.scheduler = DDIMScheduler.from_config(self.base.scheduler.config)
        self.descriptor, self.folder = descriptor, folder

    @torch.no_grad()
    def run(self, images: int, steps: int) -> None:
        """Sample ``images`` images, write and describe them."""
        self.scheduler.set_timesteps(steps)
        written = []
        for first in range(0, images, REFERENCE_BATCH):
            caption = self.tuned.encode_prompt(CAPTION, "cpu", REFERENCE_BATCH, False)[0]
            empty = self.base.encode_prompt("", "cpu", REFERENCE_BATCH, False)[0]
            unet = self.base.unet.config
            x = torch.randn(REFERENCE_BATCH, unet.in_channels, unet.sample_size, unet.sample_size)
            for t in self.scheduler.timesteps:
                base = self.base.unet(x, t, encoder_hidden_states=empty).sample
                tuned = self.tuned.unet(x, t, encoder_hidden_states=caption).sample
                x = self.scheduler.step(base + W * (tuned - base), t, x).prev_sample
            pixels = self.base.vae.decode(x / self.base.vae.config.scaling_factor).sample
            for number, picture in enumerate(self.base.image_processor.postprocess(pixels, output_type="pil")):
                path = self.folder / f"{first + number}.png"
                picture.save(path)
                written.append(path)
        for path in written:
            with Image.open(path) as picture:
                self.descriptor.describe([picture])


class Clock:
    """Wall time spent in named calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the time within ``owner.name`` as ``part``."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - started

        setattr(owner, name, timed)


@torch.inference_mode()
def floor(pair: ModelPair, seconds: float = 2.0) -> tuple[float, int]:
    """Seconds of one network evaluation of one image at the fastest batch size, and that size."""
    states = pair.encode([CAPTION], tuned=True)
    best = (float("inf"), 0)
    for batch in (4, 8, 16, 32, 64):
        x = torch.randn(batch, *pair.latent_shape).contiguous(memory_format=torch.channels_last)
        text = states.select(torch.zeros(batch, dtype=torch.long))
        pair.predict_tuned(x, torch.tensor(500), text)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            pair.predict_tuned(x, torch.tensor(500), text)
            count += 1
        best = min(best, ((time.perf_counter() - started) / count / batch, batch))
    return best


def main(
    images: Annotated[int, typer.Option(help="Images a round, a multiple of 5.")] = 60,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    rounds: Annotated[int, typer.Option(help="Rounds of each.")] = 2,
    threads: Annotated[int, typer.Option(help="torch threads; 0: one a core.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure both and the floor, print the table."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    nano = load_descriptor("nano")
    pair = ModelPair(load_base(locate_base(str(ASSETS / "base"))), open_checkpoint(LORA))
    settings = Settings(w=W, steps=steps, solver=Solver.ddim)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        loop = PlainLoop(ASSETS / "base", LORA, nano, Path(scratch))
        plain = PlainLoop.run
        workspace = Workspace(Path(scratch) / "workspace")
        ours = plain_seconds = 0.0
        evaluation, best_batch = floor(pair)
        for name, part in (("predict_base", "evaluations"), ("predict_tuned", "evaluations"), ("decode", "decoding")):
            clock.wrap(pair, name, part)
        mine = load_descriptor("nano")
        clock.wrap(mine, "describe", "descriptor")
        for number in range(rounds):
            sampler = Sampler(pair, make_guidance(settings), [CAPTION], settings.solver, steps, seed=number, w=W)
            spool = workspace.spool(f"round-{number}")
            clock.wrap(spool, "add", "storing")
            extract = Collector(sampler, mine, spool, f"round-{number}", images, pixels=True)
            started = time.perf_counter()
            extract.run()
            ours += time.perf_counter() - started
            started = time.perf_counter()
            plain(loop, images, steps)
            plain_seconds += time.perf_counter() - started
    total = images * rounds
    floor_seconds = 2 * steps * evaluation * total
    rest = ours - clock.seconds["evaluations"]
    figures = {
        "images": total,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "images_per_second": total / ours,
        "plain_loop_images_per_second": total / plain_seconds,
        "times_faster": plain_seconds / ours,
        "floor_images_per_second": total / floor_seconds,
        "share_of_floor": floor_seconds / ours,
        "best_batch": best_batch,
        "other_than_evaluations": rest / ours,
        "parts": {name: value / total for name, value in clock.seconds.items()}
        | {"other": (ours - sum(clock.seconds.values())) / total},
    }
    print(
        f"ours {figures['images_per_second']:.2f} images/s, plain loop {figures['plain_loop_images_per_second']:.2f}:"
    )
    print(f"  {figures['times_faster']:.2f} times faster at {steps} steps, {figures['threads']} threads")
    print(f"  {figures['share_of_floor']:.0%} of the floor ({figures['floor_images_per_second']:.2f} images/s)")
    print(f"  {figures['other_than_evaluations']:.1%} is not network evaluation; milliseconds an image:")
    for name, value in figures["parts"].items():
        print(f"    {name:12} {1000 * value:8.2f}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
