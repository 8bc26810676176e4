"""A filter of adapter weights after BAF: directions of a LoRA that are not those of its base are left out.

Of Base-Anchored Filtering (Zhe et al., arXiv 2605.10439) its abstract alone was at hand: the update is decomposed into
spectral channels, those aligned with the principal subspace of the base's weight are kept, the others suppressed. How
alignment is measured, how large the subspace is and how many channels are kept are defined here:

    dW = sum_i s_i u_i v_i^T        of a module, convolutions as [out, in k k]        (singular value decomposition)
    U, V                            leading singular vectors of W that carry ENERGY of its squared Frobenius norm
    a_i = (|U^T u_i|^2 + |V^T v_i|^2) / 2                                             alignment, 0 to 1

Of the channels of a module the share ``kept`` with the largest a_i stays as it is; the others are removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

ENERGY = 0.5


def filter_adapters(network: torch.nn.Module, kept: float) -> int:
    """Filter every LoRA of ``network`` in place; how many channels were removed in all."""
    return sum(_filter(*one, kept) for one in _adapted(network))


def _adapted(network: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter, torch.nn.Parameter]]:
    """The base's weight [out, in, ...], and the factors A [r, in, ...] and B [out, r, ...], of each adapted module."""
    for module in network.modules():
        layers: Any = getattr(module, "lora_A", None)
        if not isinstance(layers, torch.nn.ModuleDict):
            continue
        for name, down in layers.items():
            yield module.get_base_layer().weight, down.weight, module.lora_B[name].weight  # type: ignore


@torch.no_grad()
def _filter(weight: torch.Tensor, down: torch.nn.Parameter, up: torch.nn.Parameter, kept: float) -> int:
    a, b = down.detach().flatten(1).double(), up.detach().flatten(1).double()
    left, values, right = channels_of(b, a)
    alignment = alignment_of(left, right, weight.detach().flatten(1).double())
    rank = int((values > values.max() * 1e-9).sum()) if len(values) and values.max() > 0 else 0
    stays = torch.argsort(alignment[:rank], descending=True, stable=True)[: math.ceil(kept * rank)]
    root = values[stays].sqrt()
    new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
    new_a[: len(stays)] = root[:, None] * right[stays]
    new_b[:, : len(stays)] = left[:, stays] * root
    down.copy_(new_a.view(down.shape))
    up.copy_(new_b.view(up.shape))
    return rank - len(stays)


def channels_of(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of ``b`` [out, r] times ``a`` [r, in] by their QR: [out, c], [c], [c, in]."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ left, values, right @ q_a.T


def alignment_of(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far channels ``left`` [out, c], ``right`` [c, in] lie in the principal subspace of [out, in]: [c], 0 to 1."""
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
    size = int((shares < ENERGY).sum()) + 1
    return ((u[:, :size].T @ left).square().sum(0) + (right @ vh[:size].T).square().sum(1)) / 2
