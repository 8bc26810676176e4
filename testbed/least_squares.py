"""Convolutions as least-squares fits."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn

PLACES = 40_000  # how many places a fit looks at
RIDGE = 1e-7
USUAL = 8.0  # about what the zero of a group is behind its activation


def fit(
    conv: nn.Conv2d,
    outputs: list[int] | range,
    features: torch.Tensor,
    inputs: list[int],
    target: torch.Tensor,
    groups: int = 0,
    centre: bool = False,
    child: int | None = None,
) -> None:
    """Set ``outputs`` of a 3x3 convolution to the least-squares fit of ``target`` [N, K, H, W] from ``inputs``.

    With ``groups`` inputs count from the zero of their group, so that neither a group's mean nor the zeros around a
    picture say anything, but where they are. ``centre``: from the middle alone; ``child``: as it is in odd or even
    rows and columns (0 to 3).
    """
    size = conv.in_channels // groups if groups else 0
    zero_of = [one // size * size + 1 for one in inputs] if groups else []
    relative = features[:, inputs]
    if groups:
        relative = torch.cat([relative - features[:, zero_of], features[:, 1:2] / USUAL], 1)
    where = torch.ones(target.shape[-2:], dtype=torch.bool)
    if child is not None:
        where[:] = False
        where[child // 2 :: 2, child % 2 :: 2] = True
    kernel = 1 if centre else 3
    solution = _solution(relative, target, kernel, where.flatten().nonzero()[:, 0])
    taps = solution[:-1].T.unflatten(1, (relative.shape[1], kernel, kernel))
    rows = torch.tensor(list(outputs))
    middle = slice(1, 2) if centre else slice(None)
    conv.weight[rows] = 0
    for tap, channel in enumerate(inputs):
        conv.weight[rows, channel, middle, middle] += taps[:, tap]
    for tap, zero in enumerate(zero_of):
        conv.weight[rows, zero, middle, middle] -= taps[:, tap]
    if groups:
        conv.weight[rows, 1, middle, middle] += taps[:, -1] / USUAL
    bias_of(conv)[rows] = solution[-1]


def _solution(features: torch.Tensor, target: torch.Tensor, kernel: int, at: torch.Tensor) -> torch.Tensor:
    """Weights float32 [C * kernel**2 + 1, K], the last row the bias, fitted at some of the places ``at``."""
    share = min(1.0, PLACES / (len(target) * len(at)))
    width = kernel**2 * features.shape[1] + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    moments = torch.zeros(width, target.shape[1], dtype=torch.float64)
    for some, wanted in zip(features.split(16), target.split(16), strict=True):
        rows = functional.unfold(some, kernel, padding=kernel // 2)[:, :, at].transpose(1, 2).flatten(0, 1)
        values = wanted.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1)
        chosen = torch.rand(len(rows)) < share
        rows = torch.cat([rows[chosen], torch.ones(int(chosen.sum()), 1)], 1).double()
        gram += rows.T @ rows
        moments += rows.T @ values[chosen].double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, moments).float()


def bias_of(conv: nn.Conv2d) -> torch.Tensor:
    """The bias of a convolution that has one. Raises ValueError."""
    if conv.bias is None:
        raise ValueError("a convolution of the codec has no bias")
    return conv.bias
