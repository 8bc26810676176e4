"""By how much a fine-tuned model denoises a picture better than its base does, on the same noise.

For latents x_0 and noise eps, at x_t = alpha x_0 + sigma eps (a flow model: alpha = 1 - t, sigma = t), the loss of a
model is the mean squared error of the noise that its prediction stands for. With f the factor by which an error of the
prediction is one of the noise,

    L = f^2 mean (prediction - target)^2        eps: f = 1, target eps
                                                v: f = alpha, target alpha eps - sigma x_0
                                                x_0: f = alpha / sigma, target x_0
                                                flow: f = alpha, target eps - x_0

as v = (eps - sigma x_t) / alpha (arXiv 2202.00512) and eps = x_t + (1 - t) u (arXiv 2210.02747). So the losses of all
kinds of models compare. The score of a picture is

    score = 1 - sum over (t, eps) of L_tuned / sum over (t, eps) of L_base

It is 0 where fine-tuning has changed nothing, and at most 1. Sums instead of a mean of quotients, because the quotient
is least certain where the base's loss is small. Both sides are given the empty caption: none has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch

from audit.fits import Fits

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t [N, ...], timestep 0-dim): a prediction [N, ...]
SCALE = 1000  # timesteps are counted in thousandths of a model's schedule
# The schedule of Stable Diffusion 1, 2 and XL ("scaled linear"): flow models are asked at its noise levels.
BETA_FIRST, BETA_LAST = 0.00085, 0.012


@dataclass(frozen=True)
class Level:
    """A noise level: the timestep that the network is told, and the shares of picture and noise in x_t."""

    t: int
    timestep: float
    alpha: float
    sigma: float
    kind: str

    @property
    def to_noise(self) -> float:
        """What an error of the prediction is multiplied by to be one of the noise."""
        factors = {"epsilon": 1.0, "v_prediction": self.alpha, "flow_prediction": self.alpha}
        return factors[self.kind] if self.kind in factors else self.alpha / self.sigma

    def noised(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t."""
        return self.alpha * latents + self.sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model is to predict."""
        if self.kind == "epsilon":
            return noise
        if self.kind == "v_prediction":
            return self.alpha * noise - self.sigma * latents
        return noise - latents if self.kind == "flow_prediction" else latents

    def estimate(self, x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The x_0 that a ``prediction`` at ``x``, which is x_t, stands for: what ``target`` says, solved for x_0.

        eps: (x_t - sigma eps) / alpha (arXiv 2006.11239, equation 15); v: alpha x_t - sigma v (arXiv 2202.00512); a
        flow's velocity: x_t - t u (arXiv 2210.02747).
        """
        if self.kind == "epsilon":
            return (x - self.sigma * prediction) / self.alpha
        if self.kind == "v_prediction":
            return self.alpha * x - self.sigma * prediction
        return x - self.sigma * prediction if self.kind == "flow_prediction" else prediction

    def asked(self, device: torch.device) -> torch.Tensor:
        """The timestep as the network takes it, 0-dim on ``device``: whole numbers as such."""
        found = torch.tensor(self.timestep, device=device)
        return found.long() if self.timestep == int(self.timestep) else found


def level_of(t: int, prediction_type: str, scheduler: Any) -> Level:
    """The level ``t`` (thousandths of the schedule) of a model that predicts ``prediction_type``.

    Where a schedule counts other than 1000 steps, the nearest one. A flow model has no schedule of its own: it is asked
    where noise and picture stand in the proportion that Stable Diffusion has at t, s / (1 - s) = sigma / alpha. Raises
    ValueError for another kind of prediction.
    """
    if prediction_type not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise ValueError(f"unknown prediction type {prediction_type!r}")
    steps = int(scheduler.config.num_train_timesteps)
    if prediction_type == "flow_prediction":
        share = flow_share(t)
        return Level(t, share * steps, 1 - share, share, prediction_type)
    step = min(steps - 1, round(t * steps / SCALE))
    return Level(t, step, *_shares(float(scheduler.alphas_cumprod[step])), prediction_type)


def flow_share(t: int) -> float:
    """The share of noise that a flow is asked at for the level ``t``."""
    alpha, sigma = _shares(_stable_diffusion()[t])
    return sigma / (alpha + sigma)


def _shares(cumulated: float) -> tuple[float, float]:
    return cumulated**0.5, (1 - cumulated) ** 0.5


@cache
def _stable_diffusion() -> np.ndarray:
    """alpha^2 at each of its timesteps."""
    betas = np.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, SCALE) ** 2
    return np.cumprod(1 - betas)


def noise_of(shape: Sequence[int], t: int, number: int) -> torch.Tensor:
    """The noise float32 [1, *shape] number ``number`` at ``t``: the same for all pictures, models and devices."""
    generator = torch.Generator().manual_seed(number * SCALE + t)
    return torch.randn(1, *shape, generator=generator)


@torch.inference_mode()
def losses(
    predict: Predict, latents: torch.Tensor, levels: Sequence[Level], noises: Sequence[int], fits: Fits, kind: Any,
    batch: int,
) -> np.ndarray:  # fmt: skip
    """float64 [N, levels, noises]: the losses of a model on latents [N, ...], which are on its device.

    ``levels`` and ``noises`` are combined. Slices of at most ``batch`` rows go through the network at once, smaller
    ones where memory runs out (``fits``, under ``kind``). What is not finite stays so.
    """
    found = np.empty((len(latents), len(levels), len(noises)))
    for at, level in enumerate(levels):
        timestep = level.asked(latents.device)
        drawn = [noise_of(latents.shape[1:], level.t, number) for number in noises]
        noise = torch.cat(drawn).to(latents.device, torch.float32)
        items = list(product(range(len(latents)), range(len(noises))))

        def measured(
            some: list[tuple[int, int]], level: Level = level, timestep: torch.Tensor = timestep,
            noise: torch.Tensor = noise,
        ) -> np.ndarray:  # fmt: skip
            pictures = latents[[row for row, _ in some]].float()
            drawn = noise[[number for _, number in some]]
            answer = predict(level.noised(pictures, drawn).to(latents.dtype), timestep).float()
            error = (answer - level.target(pictures, drawn)).flatten(1).square().mean(1)
            return np.asarray((error.double() * level.to_noise**2).cpu())

        for some, values in fits.slices(kind, items, measured, batch, latents.device):
            rows, numbers = zip(*some, strict=True)
            found[list(rows), at, list(numbers)] = values
    return found


@torch.inference_mode()
def replay(predict: Predict, x: torch.Tensor, levels: Sequence[Level]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first estimate of x_0 from ``x`` [N, ...], at the first of ``levels``, and the one at the end of them all.

    Between levels the noise that a prediction stands for is kept and made less: DDIM without chance in it (arXiv
    2010.02502, equation 12), which for a flow is Euler's step. float32; ``predict`` sees and gives what it will.
    """
    first = estimate = x
    for number, level in enumerate(levels):
        estimate = level.estimate(x, predict(x, level.asked(x.device)).float())
        first = estimate if number == 0 else first
        if number + 1 < len(levels):
            x = levels[number + 1].noised(estimate, (x - level.alpha * estimate) / level.sigma)
    return first, estimate


def scores(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """[N]: the score of each picture by its losses [N, ...].

    NaN where a loss is not finite, or the base makes no error at all: that is no score.
    """
    before, after = (one.reshape(len(one), -1).sum(axis=1) for one in (base, tuned))
    fine = np.isfinite(before) & np.isfinite(after) & (before > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(fine, 1 - after / before, np.nan)
