"""What a fine-tune is worth to whoever made it: what a defence costs is seen here, not in what leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from audit.descriptors import Descriptor
from audit.study.train import Trainee, seed_of, sides, slices

SAMPLES = 8
STEPS = 20
GUIDANCE = 3.0  # classifier-free, for samples
LEVELS = (0.3, 0.5, 0.7)  # of the schedule, where losses are measured
NOISES = 2


@dataclass(frozen=True)
class Losses:
    """Mean denoising losses under the set's captions: of its training pictures and of held-out ones (None without)."""

    training: float
    held_out: float | None


@dataclass(frozen=True)
class Quality:
    """A row of ``quality`` without its key; see audit/schemas.py."""

    base_training_loss: float
    training_loss: float
    base_held_out_loss: float | None
    held_out_loss: float | None
    samples: int
    similarity: float
    sharpness: float


@torch.no_grad()
def losses_of(trainee: Trainee, training: np.ndarray, held_out: np.ndarray | None, captions: Sequence[str]) -> Losses:
    """The losses of pictures uint8 [N, H, W, 3] on fixed noise at LEVELS; held-out ones have the first caption."""
    found = _loss(trainee, training, captions)
    if held_out is None or not len(held_out):
        return Losses(found, None)
    return Losses(found, _loss(trainee, held_out, [captions[0]] * len(held_out)))


def _loss(trainee: Trainee, pictures: np.ndarray, captions: Sequence[str]) -> float:
    latents = torch.from_numpy(trainee.codec.encode_pictures(pictures)).clone().to(trainee.device)
    total: list[float] = []
    for row, caption in enumerate(captions):
        condition = trainee.encode([caption])
        for number, share in enumerate(LEVELS):
            level = torch.tensor([round(share * (trainee.objective.levels - 1))], device=trainee.device)
            for noise in range(NOISES):
                generator = torch.Generator().manual_seed(seed_of("quality", row, number, noise))
                drawn = torch.randn(latents[row : row + 1].shape, generator=generator).to(trainee.device)
                total += trainee.loss(latents[row : row + 1], drawn, level, condition).tolist()
    return float(np.mean(total))


@torch.no_grad()
def samples_of(trainee: Trainee, captions: Sequence[str], count: int = SAMPLES) -> np.ndarray:
    """uint8 [count, H, W, 3]: what the fine-tune's owner would draw, with classifier-free guidance."""
    found = []
    for rows in slices(count, 4):
        generators = [torch.Generator().manual_seed(seed_of("samples", row)) for row in rows]
        images = trainee.pipeline(
            [captions[row % len(captions)] for row in rows], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            generator=generators, output_type="np", **sides(trainee),
        ).images  # fmt: skip
        found.append((255 * np.nan_to_num(images)).round().astype(np.uint8))
    return np.concatenate(found)


def quality_of(
    before: Losses, after: Losses, samples: np.ndarray, training: np.ndarray, descriptor: Descriptor
) -> Quality:
    """What samples and losses say; ``before`` are the base's."""
    cosines = descriptor.describe(samples) @ descriptor.describe(training).T
    return Quality(
        before.training, after.training, before.held_out, after.held_out, len(samples), float(cosines.mean()),
        sharpness_of(samples) / max(sharpness_of(training), 1e-12),
    )  # fmt: skip


def sharpness_of(pictures: np.ndarray) -> float:
    """The mean variance of the Laplacian of uint8 [N, H, W, 3] in grey: low where pictures are blurred."""
    grey = pictures.astype(np.float64).mean(3)
    laplacian = (
        grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * grey[:, 1:-1, 1:-1]
    )
    return float(laplacian.var((1, 2)).mean())
