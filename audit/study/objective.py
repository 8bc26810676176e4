"""What a fine-tuning minimises: the mean squared error of the prediction under noise, as diffusers' scripts do.

With x_0 the latents, eps the noise and a = alphas_cumprod[t]:

    x_t = sqrt(a) x_0 + sqrt(1 - a) eps         targets: eps, x_0, or v = sqrt(a) eps - sqrt(1 - a) x_0
    x_t = (1 - s) x_0 + s eps                   of a flow with noise level s; target: eps - x_0

(Ho et al., arXiv 2006.11239; Salimans and Ho, arXiv 2202.00512; Lipman et al., arXiv 2210.02747.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from audit.errors import StudyError

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Objective:
    """How pictures of one base are noised, and what is to be predicted.

    ``alphas`` [T] of a diffusion, or ``sigmas`` and ``timesteps`` [T] of a flow, by the number of the noise level.
    """

    prediction: str
    levels: int
    alphas: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """What the denoiser is told of noise levels int64 [N]."""
        return level if self.timesteps is None else self.timesteps[level]

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """x_t [N, ...] of ``latents`` and ``noise`` of their shape at levels int64 [N]."""
        signal, share = self._weights(latents, level)
        return signal * latents + share * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """What is to be predicted, of the latents' shape."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        if self.prediction == "flow_prediction":
            return noise - latents
        signal, share = self._weights(latents, level)
        return signal * noise - share * latents

    def _weights(self, latents: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, *[1] * (latents.dim() - 1))
        if self.sigmas is not None:
            sigma = self.sigmas[level].to(latents).view(shape)
            return 1 - sigma, sigma
        assert self.alphas is not None
        alpha = self.alphas[level].to(latents).view(shape)
        return alpha.sqrt(), (1 - alpha).sqrt()


def objective_of(base: Any, device: torch.device) -> Objective:
    """The objective of a loaded base model. Raises StudyError for a prediction that is not trained here."""
    scheduler = base.pipeline.scheduler
    levels = int(scheduler.config.num_train_timesteps)
    if base.architecture.flow:
        from diffusers import FlowMatchEulerDiscreteScheduler

        whole = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sigmas, timesteps = whole.sigmas[:levels].to(device), whole.timesteps[:levels].to(device)
        return Objective("flow_prediction", levels, None, sigmas, timesteps)
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise StudyError(f"{base.name} predicts {prediction}, which is not trained here: take another base")
    return Objective(prediction, levels, scheduler.alphas_cumprod.to(device))
