"""Sample images from a model pair: batched, seeded per image, resumable at any image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audit.config import Compile, Solver
from audit.errors import NotFiniteError
from audit.models.batches import batch_to_sample
from audit.models.formats.parts import layout_of
from audit.models.pair import ModelPair
from audit.sampling.guidance import Conditioning, Guidance


@dataclass(frozen=True)
class Schedule:
    """A scheduler with its timesteps set, and x_0's share of x_t at each of them."""

    scheduler: Any
    timesteps: torch.Tensor
    alphas: list[float]


def make_schedule(pair: ModelPair, solver: Solver, steps: int) -> Schedule:
    """The base's noise schedule, fresh, under first-order DDIM with eta 0 or second-order DPM-Solver++.

    For flow models the first-order solver is Euler's, which DDIM is there; larger pictures are shifted towards noise
    as the base's configuration says (arXiv 2403.03206, section 5.3.2). The tables stay on the CPU: indexing them with
    a GPU timestep would wait for the GPU.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    config = pair.scheduler.config
    if pair.architecture.flow:
        return _flow_schedule(pair, solver, steps)
    if solver is Solver.ddim:
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(steps, device="cpu")
    alphas = scheduler.alphas_cumprod[scheduler.timesteps.long()].sqrt().tolist()
    return Schedule(scheduler, scheduler.timesteps, alphas)


def _flow_schedule(pair: ModelPair, solver: Solver, steps: int) -> Schedule:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    config = pair.scheduler.config
    dynamic = config.get("use_dynamic_shifting")
    shift = pair.architecture.time_shift(config, pair.sampled_shape, steps) if dynamic else None
    fixed = config.get("shift", config.get("flow_shift", 1.0))  # UniPC's name for it
    if solver is Solver.ddim:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=fixed)
        # Flux' pipelines give the sigmas, those of Stable Diffusion 3 leave them to the scheduler
        own = pair.architecture.own_sigmas
        sigmas = np.linspace(1.0, 1 / steps, steps) if own else None
        scheduler.set_timesteps(None if own else steps, device="cpu", sigmas=sigmas, mu=shift)
    else:
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            algorithm_type="dpmsolver++",
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=math.exp(shift) if shift is not None else fixed,
        )
        scheduler.set_timesteps(steps, device="cpu")
    alphas = [1 - float(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
    return Schedule(scheduler, scheduler.timesteps, alphas)


@dataclass(frozen=True)
class Batch:
    """Sampled images uint8 [N, H, W, 3] with their numbers within the audit."""

    indices: list[int]
    images: np.ndarray


def image_seed(seed: int, index: int) -> int:
    """The seed of image ``index``'s starting noise: a different one for every image of every audit seed."""
    return (seed * 1_000_003 + index) % 2**62


class Sampler:
    """Samples image ``i`` always from the same noise and caption, whatever the batch it falls into.

    Caption ``i mod len(captions)`` is image i's, so that captions share any budget evenly. When memory runs out the
    batch is halved and tried again, and the worker remembers what fitted (``pair.fits``); a finished batch is not
    sampled again when it does not fit into the decoder. Raises DeviceMemoryError where a single image does not fit,
    and NotFiniteError where the network answers with numbers that are not finite.
    """

    def __init__(
        self,
        pair: ModelPair,
        guidance: Guidance,
        captions: Sequence[str],
        solver: Solver = Solver.dpmpp,
        steps: int = 15,
        seed: int = 0,
        batch_size: int = 0,
        w: float | None = 2.0,
    ) -> None:
        self.pair, self.guidance, self.captions, self.w = pair, guidance, list(captions), w
        self.solver, self.steps, self.seed = solver, steps, seed
        self.batch_size = batch_size or batch_to_sample(pair, guidance.rows)
        count = len(self.captions)
        same = torch.zeros(count, dtype=torch.long, device=pair.device)
        self.conditioning = Conditioning(
            tuned_caption=pair.encode(self.captions, tuned=True),
            tuned_empty=pair.encode([""], tuned=True).select(same),
            base_caption=pair.encode(self.captions, tuned=False),
            base_empty=pair.encode([""], tuned=False).select(same),
        )

    def caption_of(self, index: int) -> str:
        """The caption image ``index`` is sampled with."""
        return self.captions[index % len(self.captions)]

    def noise(self, index: int) -> torch.Tensor:
        """The starting noise float32 [1, *latents] of one image; drawn on the CPU so that every device has the same."""
        generator = torch.Generator().manual_seed(image_seed(self.seed, index))
        return torch.randn(1, *self.pair.sampled_shape, generator=generator)

    def batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Sample the images ``indices``, a batch at a time."""
        pair = self.pair
        sampled = pair.fits.slices(self._kind, list(indices), self._finite_latents, self.batch_size, pair.device)
        for part, latents in sampled:
            yield Batch(part, self._decoded(part, latents))

    @property
    def _kind(self) -> tuple[object, ...]:
        pair = self.pair
        return "sample", pair.architecture.name, pair.sampled_shape, pair.dtype, self.guidance.rows

    def _finite_latents(self, indices: Sequence[int]) -> torch.Tensor:
        latents = self.latents([*indices, *self._filling(indices)])[: len(indices)]
        if not torch.isfinite(latents).all():
            raise self._not_finite(indices, "the latents are not finite")
        return latents

    def _filling(self, indices: Sequence[int]) -> list[int]:
        """Images that fill up a batch of compiled networks: another size would have to be compiled first."""
        if self.pair.compiled is Compile.off:
            return []
        return [indices[-1]] * (self.pair.fits.most(self._kind, self.batch_size) - len(indices))

    def _decoded(self, indices: Sequence[int], latents: torch.Tensor) -> np.ndarray:
        try:
            return self.pair.decode(latents)
        except NotFiniteError as error:
            raise self._not_finite(indices, str(error)) from error

    @staticmethod
    def _not_finite(indices: Sequence[int], what: str) -> NotFiniteError:
        return NotFiniteError(
            f"images {indices[0]} to {indices[-1]}: {what}; the checkpoint may be broken, or w is far too large"
        )

    @torch.inference_mode()
    def latents(self, indices: Sequence[int]) -> torch.Tensor:
        """Denoised latents [N, *sampled_shape] of the images ``indices``."""
        pair = self.pair
        schedule = make_schedule(pair, self.solver, self.steps)
        rows = torch.tensor([index % len(self.captions) for index in indices], device=pair.device)
        conditioning = self.conditioning.select(rows)
        noise = torch.cat([self.noise(index) for index in indices]).to(pair.device, pair.dtype)
        start = getattr(schedule.scheduler, "init_noise_sigma", 1.0)
        x = (noise * start).contiguous(memory_format=layout_of(noise.ndim))
        # which of two experts is asked is decided on the host
        timesteps = schedule.timesteps.to(pair.device) if pair.boundary is None else schedule.timesteps
        with pair.text_once():
            return self._denoise(schedule, timesteps, x, conditioning)

    def _denoise(
        self, schedule: Schedule, asked: torch.Tensor, x: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The loop over the timesteps; networks take them from ``asked``. Nothing in it waits for the device."""
        w = 1.0 if self.w is None else self.w
        for timestep, on, alpha in zip(schedule.timesteps, asked, schedule.alphas, strict=True):
            prediction = self.guidance.predict(self.pair, x, on, alpha, conditioning, w)
            x = schedule.scheduler.step(prediction, timestep, x, return_dict=False)[0]
        return x
