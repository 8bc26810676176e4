"""Putting a LoRA into effect on a real-size UNet, against diffusers' own way: time, and memory that it adds.

    python -m benchmarks.loading [--family sd15|sdxl] [--json FILE]
    python -m benchmarks.loading --large flux2-klein-4b [--json FILE]

The UNet has the published configuration of Stable Diffusion 1.5 (or XL) and random weights in float32; the LoRA is one
of rank 16 on attention and feed-forward layers by kohya's names, in float16. diffusers: a copy of the UNet, the
adapter loaded into it, fused, and taken off again. Both results are compared.

``--large``: a LoRA of rank 16 on all attention of a published transformer in bfloat16, whose weights are zeros of a
sparse file; by this package alone, since two copies of such a model do not fit into memory.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.families.registry import FAMILIES
from audit.models.tuning import tune
from benchmarks.gpu.models import Kind, fuse_by_diffusers, make_lora, make_unet
from benchmarks.mapped import measure_large

RANK = 16


def make_base(kind: Kind) -> BaseModel:
    """A Stable Diffusion pipeline around a random UNet of this kind; nothing else of it is used."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=4), unet=make_unet(kind),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                  num_attention_heads=1)),
        tokenizer=CLIPTokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return BaseModel("random", "0", FAMILIES["sd1"], pipeline)


def resident() -> float:
    """Resident memory of this process, MiB."""
    return psutil.Process().memory_info().rss / 2**20


def by_diffusers(unet: Any, path: Path) -> Any:
    """A copy of the UNet with the adapter fused."""
    tuned = copy.deepcopy(unet)
    fuse_by_diffusers(tuned, path)
    return tuned


def measure(make: Any) -> tuple[Any, float, float]:
    """What ``make`` returns, its seconds, and the MiB it added."""
    gc.collect()
    before, started = resident(), time.perf_counter()
    found = make()
    seconds = time.perf_counter() - started
    gc.collect()
    return found, seconds, resident() - before


def main(
    family: Annotated[Kind, typer.Option(help="sdxl needs 25 GB.")] = Kind.sd15,
    large: Annotated[str | None, typer.Option(help="A published transformer, such as qwen-image.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure both, compare the weights, print the table."""
    if large is not None:
        rows = [measure_large(large)]
        print("{name}: {layers} layers, {changed_millions:.0f} of {weights_millions:.0f} M weights: "
              "{seconds:.1f} s, {mib:.0f} MiB".format(**rows[0]))  # fmt: skip
        if json_file:
            json_file.write_text(json.dumps(rows, indent=2) + "\n")
        return
    base = make_base(family)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "lora.safetensors"
        layers = make_lora(base.denoiser, path, RANK)
        checkpoint = open_checkpoint(path)
        ours, our_seconds, our_mib = measure(lambda: tune(base, checkpoint).networks["unet"])
        theirs, their_seconds, their_mib = measure(lambda: by_diffusers(base.denoiser, path))
    worst = max(
        float((a - b).abs().max())
        for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    )
    print(f"{'':12}{'seconds':>9}{'MiB added':>11}   {family}, {layers} layers, largest difference {worst:.1e}")
    both = [("lora-audit", our_seconds, our_mib), ("diffusers", their_seconds, their_mib)]
    for name, seconds, mib in both:
        print(f"{name:12}{seconds:9.2f}{mib:11.0f}")
    if json_file:
        figures = [{"name": name, "seconds": seconds, "mib": mib, "layers": layers} for name, seconds, mib in both]
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
