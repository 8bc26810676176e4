"""Networks of the published sizes whose weights are pages of a sparse file: zeros, which take no memory until read."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.families.registry import of_pipeline
from audit.models.published import PublishedModel, build, published
from audit.models.tuning import tune
from benchmarks.gpu.models import parameters

RANK = 16
DTYPE = torch.bfloat16


def mapped_base(model: PublishedModel, folder: Path) -> BaseModel:
    """A base model of which there is the denoiser alone, its weights bfloat16 zeros in a sparse file in ``folder``."""
    family = of_pipeline(model.pipeline)
    assert family is not None
    network = build(model.networks[family.denoiser], DTYPE)
    numbers = sum(one.numel() for one in network.parameters())
    file = folder / "weights"
    with file.open("wb") as sparse:
        sparse.truncate(numbers * DTYPE.itemsize)
    weights = torch.from_file(str(file), shared=True, size=numbers, dtype=DTYPE)
    start = 0
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = weights[start : start + parameter.numel()].view(parameter.shape)
            setattr(module, name, nn.Parameter(part, requires_grad=False))
            start += parameter.numel()
    pipeline: Any = SimpleNamespace(**dict.fromkeys(family.networks), scheduler=None)
    setattr(pipeline, family.denoiser, network)
    return BaseModel("zeros", "0", family, pipeline)


def write_lora(network: nn.Module, path: Path) -> int:
    """A LoRA on all layers of attention by diffusers' names, bfloat16; how many layers it has."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".attn." in name:
            out, inputs = module.weight.shape
            stem = f"transformer.{name}"
            state[f"{stem}.lora_A.weight"] = (torch.randn(RANK, inputs, generator=generator) * 0.02).to(DTYPE)
            state[f"{stem}.lora_B.weight"] = (torch.randn(out, RANK, generator=generator) * 0.02).to(DTYPE)
    save_file(state, path)
    return len(state) // 2


def anonymous() -> float:
    """Memory of this process that is of no file, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) / 2**10


def measure_large(name: str) -> dict[str, Any]:
    """Seconds of computing, memory added (MiB), changed weights (millions) and layers of a LoRA put into effect."""
    with tempfile.TemporaryDirectory() as scratch:
        base = mapped_base(published(name), Path(scratch))
        path = Path(scratch) / "lora.safetensors"
        layers = write_lora(base.denoiser, path)
        before, started = anonymous(), time.process_time()
        tuned = tune(base, open_checkpoint(path), dtype=DTYPE)
        seconds = time.process_time() - started
        network = tuned.networks[base.architecture.denoiser]
        own = {id(one) for one in base.denoiser.parameters()}
        changed = sum(one.numel() for one in network.parameters() if id(one) not in own)
        return {
            "name": name, "seconds": seconds, "mib": anonymous() - before, "layers": layers,
            "changed_millions": changed / 1e6, "weights_millions": parameters([base.denoiser]) / 1e6,
        }  # fmt: skip
