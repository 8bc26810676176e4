"""Sample images from a model pair: batched, seeded per image, resumable at any image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audit.config import Solver
from audit.errors import SamplingError
from audit.extraction.guidance import Conditioning, Guidance
from audit.models.pair import ModelPair

CPU_BATCH = 32
GPU_BATCH = 64


def make_scheduler(pair: ModelPair, solver: Solver) -> Any:
    """A fresh scheduler with the base's noise schedule: DDIM with eta 0, or second-order DPM-Solver++."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    config = pair.scheduler.config
    if solver is Solver.ddim:
        return DDIMScheduler.from_config(config, clip_sample=False)
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)


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
    batch is halved and tried again; SamplingError is raised where a single image does not fit, and where the
    network answers with numbers that are not finite.
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
        self.batch_size = batch_size or (GPU_BATCH if pair.device.type == "cuda" else CPU_BATCH)
        count = len(self.captions)
        self.conditioning = Conditioning(
            tuned_caption=pair.encode(self.captions, tuned=True),
            tuned_empty=pair.encode([""], tuned=True).expand(count, -1, -1),
            base_caption=pair.encode(self.captions, tuned=False),
            base_empty=pair.encode([""], tuned=False).expand(count, -1, -1),
        )

    def caption_of(self, index: int) -> str:
        """The caption image ``index`` is sampled with."""
        return self.captions[index % len(self.captions)]

    def noise(self, index: int) -> torch.Tensor:
        """The starting noise float32 [1, C, H, W] of one image; drawn on the CPU so that every device has the same."""
        generator = torch.Generator().manual_seed(image_seed(self.seed, index))
        return torch.randn(1, *self.pair.latent_shape, generator=generator)

    def batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Sample the images ``indices``, a batch at a time."""
        remaining = list(indices)
        while remaining:
            part = remaining[: self.batch_size]
            try:
                images = self.pair.decode(self.latents(part))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            except FloatingPointError as error:
                raise SamplingError(
                    f"images {part[0]} to {part[-1]}: {error}; the checkpoint may be broken, or w is far too large"
                ) from error
            yield Batch(part, images)
            remaining = remaining[len(part) :]

    def _halve(self, error: Exception) -> None:
        text = str(error).lower()
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in text):
            raise error
        if self.batch_size == 1:
            raise SamplingError("not one image fits into memory: use a device with more, or a smaller model") from error
        self.batch_size = max(1, self.batch_size // 2)
        if self.pair.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def latents(self, indices: Sequence[int]) -> torch.Tensor:
        """Denoised latents [N, C, H, W] of the images ``indices``."""
        pair = self.pair
        scheduler = make_scheduler(pair, self.solver)
        # The scheduler's own tables stay on the CPU: indexing them with a GPU timestep would wait for the GPU.
        scheduler.set_timesteps(self.steps, device="cpu")
        on_device = scheduler.timesteps.to(pair.device)
        rows = torch.tensor([index % len(self.captions) for index in indices], device=pair.device)
        conditioning = self.conditioning.select(rows)
        noise = torch.cat([self.noise(index) for index in indices]).to(pair.device, pair.dtype)
        x = (noise * scheduler.init_noise_sigma).contiguous(memory_format=torch.channels_last)
        w = 1.0 if self.w is None else self.w
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.long()].sqrt().tolist()
        for timestep, on, alpha in zip(scheduler.timesteps, on_device, alphas, strict=True):
            model_input = scheduler.scale_model_input(x, timestep)
            prediction = self.guidance.predict(pair, model_input, on, alpha, conditioning, w)
            x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
        return x
