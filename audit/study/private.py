"""DP-SGD (Abadi et al., arXiv 1607.00133): gradients clipped sample by sample, and Gaussian noise.

    g = (1 / B) (sum_i g_i min(1, C / |g_i|) + n),        n ~ N(0, (sigma C)^2)        over all parameters together

A step of B samples is B passes, so that nothing of a network needs to know of it. The noise follows from the seed of a
study, and would have to be secret where it is to protect anybody: what is studied here is what it does to extraction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

CLIP = 1.0  # C
DELTA = 1e-5


def private_gradients(
    losses: Iterable[torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    noise_multiplier: float,
    generator: torch.Generator,
    clip: float = CLIP,
) -> torch.Tensor:
    """Put the gradient of a step into ``parameters``; the mean loss. ``losses`` are those of its samples, scalars.

    ``generator`` is one of the CPU.
    """
    sums = [torch.zeros_like(one) for one in parameters]
    seen = []
    for loss in losses:
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        known = [torch.zeros_like(one) if part is None else part for one, part in zip(parameters, found, strict=True)]
        length = torch.stack([part.float().norm() for part in known]).norm()
        share = (clip / (length + 1e-12)).clamp(max=1.0)
        for total, part in zip(sums, known, strict=True):
            total.add_(part * share)
        seen.append(loss.detach())
    for one, total in zip(parameters, sums, strict=True):
        noise = torch.randn(total.shape, generator=generator).to(total) * (noise_multiplier * clip)
        one.grad = (total + noise) / len(seen)
    return torch.stack(seen).mean()


def epsilon_of(steps: Iterable[Sequence[int]], noise_multiplier: float, delta: float = DELTA) -> float | None:
    """What bounds the loss of privacy of one picture; ``steps`` are the numbers of the pictures of each. None: nothing.

    By zero-concentrated differential privacy (Bun and Steinke, arXiv 1605.02635, propositions 1.3 and 1.6): a picture
    that stands m times in a step moves its sum by m C at the most when it is taken out, and costs m^2 / (2 sigma^2);
    epsilon = rho + 2 sqrt(rho ln(1 / delta)). No amplification by sampling is claimed: pictures come in turns.
    """
    if noise_multiplier <= 0:
        return None
    spent: Counter[int] = Counter()
    for rows in steps:
        for row, times in Counter(rows).items():
            spent[row] += times * times
    rho = max(spent.values(), default=0) / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
