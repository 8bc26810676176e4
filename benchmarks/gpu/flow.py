"""Evaluations of Stable Diffusion 3.5 medium and FLUX.1 dev at 1024 pixels, their weights drawn on the card."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from audit.models.published import FLUX, SD35_MEDIUM
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures
from benchmarks.gpu.measure import GIB, cost_of, release, tera_operations, wait

FLUX_DEV: dict[str, Any] = FLUX | {"joint_attention_dim": 4096}
TINY_SD35 = SD35_MEDIUM | {
    "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
    "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0,),
}  # fmt: skip
TINY_FLUX = FLUX_DEV | {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
SD35_TOKENS, FLUX_TOKENS = 333, 512

Inputs = Callable[[Any, int], dict[str, Any]]


def measure(bench: Bench) -> None:
    """The smaller one first."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    bench.forget()
    sizes = bench.size((SD35_MEDIUM, FLUX_DEV), (TINY_SD35, TINY_FLUX))
    _model(bench, "SD 3.5 medium", SD3Transformer2DModel, sizes[0], _sd35_inputs, bench.size((1, 4, 16), (1,)), 2)
    _model(bench, "FLUX.1 dev", FluxTransformer2DModel, sizes[1], _flux_inputs, bench.size((1, 4, 8), (1,)), 4)


def _model(
    bench: Bench, name: str, kind: type, sizes: dict[str, Any], inputs: Inputs, batches: tuple[int, ...], cost: float
) -> None:
    """Make it, evaluate it at each batch size, give its memory back."""
    made: list[Any] = []
    if bench.record.step(f"{name}, made", 2 * cost, lambda: _made(bench, kind, sizes, made)):
        for batch in batches:
            bench.record.step(f"{name}, batch {batch}", cost, partial(_evaluated, bench, made[0], inputs, batch))
    made.clear()
    release(bench.device)


def _made(bench: Bench, kind: type, sizes: dict[str, Any], made: list[Any]) -> Figures:
    started = time.perf_counter()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            network = kind(**sizes).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    wait(bench.device)
    made.append(network)
    return {
        "seconds": time.perf_counter() - started,
        "parameters": sum(one.numel() for one in network.parameters()),
        "resident_gib": torch.cuda.memory_allocated() / GIB if bench.cuda else None,
    }


def _evaluated(bench: Bench, network: Any, inputs: Inputs, batch: int) -> Figures:
    with torch.inference_mode():
        given, single = inputs(network, batch), inputs(network, 1)
        cost = cost_of(lambda: network(**given, return_dict=False), bench.device)
        if cost is None:
            return {"out_of_memory": True}
        operations = tera_operations(lambda: network(**single, return_dict=False))
    return {
        "ms": cost.seconds * 1e3,
        "evaluations_s": batch / cost.seconds,
        "tflop_s": batch * operations / cost.seconds,
        "activations_gib": cost.gib,
    }


def _random(network: Any, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=network.device).to(network.dtype)


def _sd35_inputs(network: Any, batch: int) -> dict[str, Any]:
    config = network.config
    side = config.sample_size
    return {
        "hidden_states": _random(network, batch, config.in_channels, side, side),
        "timestep": torch.full((batch,), 500.0, device=network.device),
        "encoder_hidden_states": _random(network, batch, SD35_TOKENS, config.joint_attention_dim),
        "pooled_projections": _random(network, batch, config.pooled_projection_dim),
    }


def _flux_inputs(network: Any, batch: int) -> dict[str, Any]:
    """A picture of 1024 pixels is 64 x 64 patches; at toy size 4 x 4."""
    config, device = network.config, network.device
    side = 64 if config.joint_attention_dim == FLUX_DEV["joint_attention_dim"] else 4
    places = torch.zeros(side * side, 3, device=device)
    places[:, 1] = torch.arange(side, device=device).repeat_interleave(side)
    places[:, 2] = torch.arange(side, device=device).repeat(side)
    return {
        "hidden_states": _random(network, batch, side * side, config.in_channels),
        "timestep": torch.full((batch,), 0.5, device=device),
        "guidance": torch.full((batch,), 3.5, device=device),
        "pooled_projections": _random(network, batch, config.pooled_projection_dim),
        "encoder_hidden_states": _random(network, batch, FLUX_TOKENS, config.joint_attention_dim),
        "txt_ids": torch.zeros(FLUX_TOKENS, 3, device=device),
        "img_ids": places,
    }
