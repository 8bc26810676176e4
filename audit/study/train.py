"""Fine-tune a base model on a few-shot set: a LoRA or all weights, resumable at any step.

The loop is that of diffusers' DreamBooth scripts: AdamW (weight decay 0.01), gradients clipped to a length of 1 (under
DP-SGD picture by picture, with noise), noise levels uniform, latents the means of the codec's. What a step draws
depends on the seed and its number alone, so that a stopped fine-tuning goes on to the same result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from audit.config import Settings
from audit.errors import StudyError
from audit.models.base import BaseModel
from audit.models.codec import Codec
from audit.models.families.base import Condition
from audit.models.families.flux import Patched, unpack
from audit.progress import Tell, quiet
from audit.study.adapters import KOHYA_FAMILIES, add_adapters, check_layout
from audit.study.augment import VERSIONS, versions_of
from audit.study.factors import Defence, Schedule, TrainingFactors, Tuning
from audit.study.objective import Objective, objective_of
from audit.study.private import CLIP, epsilon_of, private_gradients
from audit.study.state import load_state, save_state
from audit.study.weight_filter import filter_adapters

FAMILIES = ("sd1", "sd2", "sdxl", "altdiffusion", "sd3", "flux", "chroma")
EMBEDDED = Settings.embedded_guidance  # what Flux dev is told while it is trained, as by diffusers' script
KEEP_EVERY = 30.0  # seconds between two states
CLASS_PICTURES = 50  # of prior preservation
CLASS_STEPS = 25
WARMUP, FLOOR = 100, 0.02  # of the cosine schedule: steps, and a share of the peak
MOST_LATENTS = 6400  # of all versions of all pictures
KEPT_LOSSES = 100  # whose mean is the final loss


@dataclass(frozen=True)
class Lesson:
    """One fine-tuning: pictures uint8 [N, H, W, 3] with a caption each, and the class's caption.

    ``key`` names it: all that its result depends on is hashed in it.
    """

    key: str
    factors: TrainingFactors
    pictures: np.ndarray
    captions: Sequence[str]
    class_caption: str | None
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.factors.steps * len(self.pictures)


@dataclass
class Trainee:
    """A base model of one's own that is trained: its pipeline, its codec, and what it minimises."""

    base: BaseModel
    device: torch.device
    resolution: int | None = None
    codec: Codec = field(init=False)
    objective: Objective = field(init=False)

    def __post_init__(self) -> None:
        family = self.base.family
        if family not in FAMILIES:
            raise StudyError(
                f"{self.base.name} is of family {family}: studies fine-tune {', '.join(FAMILIES)}; audits of others' "
                "fine-tunes are not concerned"
            )
        for name in self.base.architecture.networks:
            if self.base.part(name) is not None:
                self.base.part(name).to(self.device)
        self.codec = Codec(self.base, str(self.device), self.resolution)
        self.objective = objective_of(self.base, self.device)

    @property
    def pipeline(self) -> Any:
        """diffusers' own, whose networks are trained in place."""
        return self.base.pipeline

    def encode(self, captions: Sequence[str]) -> Condition:
        """The condition of captions by the text encoders as they are now."""
        return self.base.architecture.encode(self.pipeline, captions, self.device)

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Mean squared errors [N] of the prediction on latents [N, ...] under noise at levels int64 [N]."""
        noisy = self.objective.noised(latents, noise, level)
        timestep = self.objective.timestep(level)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            found = self.base.architecture.predict(self.pipeline, noisy, timestep, condition, EMBEDDED)
        errors = functional.mse_loss(found.float(), self.objective.target(latents, noise, level), reduction="none")
        return errors.flatten(1).mean(1)


def factor_of(schedule: Schedule, step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step``."""
    return 1.0 if schedule is Schedule.constant else cosine_factor(step, steps)


def cosine_factor(step: int, steps: int, warmup: int = WARMUP, floor: float = FLOOR) -> float:
    """A cosine from 1 to ``floor`` over ``steps``, behind a linear warm-up of a quarter of them at the most."""
    warm = min(warmup, steps // 4)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def seed_of(*parts: object) -> int:
    """A seed, 63 bits, by a hash of its parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rows_of(step: int, batch: int, count: int, seed: int) -> list[int]:
    """The numbers of the pictures of a step: all of ``count`` once an epoch, in an order of the epoch's own."""
    found = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(place, count)
        found.append(int(np.random.default_rng(seed_of("order", seed, epoch)).permutation(count)[position]))
    return found


def fine_tune(
    trainee: Trainee, lesson: Lesson, state_file: Path, tell: Tell = quiet, saved: Callable[[], None] = lambda: None
) -> float:
    """Train the networks of ``trainee`` in place, and filter their adapters where asked; the last steps' mean loss.

    A state is kept in ``state_file`` from time to time, from which a stopped fine-tuning goes on; then ``saved`` is
    called. Raises StudyError.
    """
    factors = lesson.factors
    check_layout(factors, trainee.base.family)
    if factors.text_encoder and trainee.base.family not in KOHYA_FAMILIES:
        what = "several text encoders" if len(trainee.base.architecture.encoders) > 1 else "T5"
        raise StudyError(f"text_encoder = true: {trainee.base.family} has {what}, which is not trained here")
    lessons = _Batches(trainee, lesson)
    named = _trained(trainee, lesson)
    optimizer = torch.optim.AdamW(list(named.values()), lr=factors.rate, weight_decay=0.01)
    first, losses = load_state(state_file, lesson.key, named, optimizer)
    kept = time.monotonic()
    for step in range(first, lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = factors.rate * factor_of(factors.schedule, step, lesson.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = lessons.gradients(step, list(named.values()))
        if not torch.isfinite(loss):
            raise StudyError(f"the loss is not finite at step {step}: a lower learning rate than {factors.rate} may do")
        optimizer.step()
        losses = [*losses[1 - KEPT_LOSSES :], loss.item()]
        tell("training", step + 1, lesson.steps)
        if time.monotonic() - kept > KEEP_EVERY:
            save_state(state_file, lesson.key, step + 1, named, optimizer, losses)
            saved()
            kept = time.monotonic()
    if factors.defence is Defence.weight_filter:
        assert factors.filter_kept is not None
        for part in _parts(trainee, factors):
            filter_adapters(getattr(trainee.pipeline, part), factors.filter_kept)
    return sum(losses) / len(losses)


def privacy_of(lesson: Lesson) -> float | None:
    """The epsilon of a lesson under DP-SGD (``private.epsilon_of``); None without it, or without noise."""
    if lesson.factors.noise_multiplier is None:
        return None
    order = seed_of("training", lesson.seed)
    steps = (rows_of(step, lesson.factors.batch, len(lesson.pictures), order) for step in range(lesson.steps))
    return epsilon_of(steps, lesson.factors.noise_multiplier)


def _parts(trainee: Trainee, factors: TrainingFactors) -> tuple[str, ...]:
    """The networks that are trained."""
    denoiser = trainee.base.architecture.denoiser
    return (denoiser, "text_encoder") if factors.text_encoder else (denoiser,)


def _trained(trainee: Trainee, lesson: Lesson) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; LoRA's are added now."""
    pipeline, denoiser, factors = trainee.pipeline, trainee.base.architecture.denoiser, lesson.factors
    parts = _parts(trainee, factors)
    if factors.method is Tuning.lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("adapter", factors.repeat))
            add_adapters(pipeline, denoiser, factors)
    else:
        for part in parts:
            getattr(pipeline, part).requires_grad_(True)
    return {
        f"{part}.{name}": one
        for part in parts
        for name, one in getattr(pipeline, part).named_parameters()
        if one.requires_grad
    }


@dataclass(frozen=True)
class _Draw:
    """What a step is trained on: latents and noise [B, ...], levels int64 [B], captions."""

    latents: torch.Tensor
    noise: torch.Tensor
    level: torch.Tensor
    captions: list[str]

    def singles(self) -> Iterator[_Draw]:
        """Each sample alone."""
        for row, caption in enumerate(self.captions):
            rows = slice(row, row + 1)
            yield _Draw(self.latents[rows], self.noise[rows], self.level[rows], [caption])


class _Batches:
    """What each step of a fine-tuning is trained on, by its number."""

    def __init__(self, trainee: Trainee, lesson: Lesson) -> None:
        self.trainee, self.lesson = trainee, lesson
        pictures = lesson.pictures
        most = max(2, min(VERSIONS, MOST_LATENTS // len(pictures)))
        changed = versions_of(pictures, lesson.factors.augmentation, lesson.seed, most)
        latents = [torch.from_numpy(trainee.codec.encode_pictures(one)).clone() for one in changed]
        self.latents, self.versions = torch.cat(latents), len(latents)
        self.known: dict[str, Condition] = {}
        self.regular = class_latents(trainee, lesson) if lesson.factors.prior else None

    def gradients(self, step: int, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Put the gradient of a step into ``parameters``, which have none, clipped; its loss.

        Class pictures weigh as much as training pictures (DreamBooth, arXiv 2208.12242), and are none to protect.
        """
        noise_multiplier = self.lesson.factors.noise_multiplier
        if noise_multiplier is None:
            found = self.loss(step)
            found.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            return found.detach()
        draw = self._draw(step, self.latents, list(self.lesson.captions), "training", self.versions)
        generator = torch.Generator().manual_seed(seed_of("private", self.lesson.seed, step))
        losses = (self._loss(one).sum() for one in draw.singles())
        found = private_gradients(losses, parameters, noise_multiplier, generator)
        if (regular := self._regular(step)) is not None:
            regular.backward()
            found = found + regular.detach()
        return found

    def loss(self, step: int) -> torch.Tensor:
        """The loss of a step."""
        found = self._loss(self._draw(step, self.latents, list(self.lesson.captions), "training", self.versions)).mean()
        regular = self._regular(step)
        return found if regular is None else found + regular

    def _regular(self, step: int) -> torch.Tensor | None:
        """The loss of the class pictures of a step; None without prior preservation."""
        if self.regular is None:
            return None
        captions = [str(self.lesson.class_caption)] * len(self.regular)
        return self._loss(self._draw(step, self.regular, captions, "class", 1)).mean()

    def _draw(self, step: int, latents: torch.Tensor, captions: list[str], part: str, versions: int) -> _Draw:
        seed, batch, count = self.lesson.seed, self.lesson.factors.batch, len(captions)
        generator = torch.Generator().manual_seed(seed_of(part, seed, step))
        rows = torch.tensor(rows_of(step, batch, count, seed_of(part, seed)))
        version = torch.randint(versions, (batch,), generator=generator)
        device = self.trainee.device
        chosen = latents[version * count + rows].to(device)
        noise = torch.randn(chosen.shape, generator=generator).to(device)
        level = torch.randint(self.trainee.objective.levels, (batch,), generator=generator).to(device)
        return _Draw(chosen, noise, level, [captions[int(row)] for row in rows])

    def _loss(self, draw: _Draw) -> torch.Tensor:
        return self.trainee.loss(draw.latents, draw.noise, draw.level, self._condition(draw.captions))

    def _condition(self, captions: list[str]) -> Condition:
        """Computed once a caption where the text encoder is not trained."""
        if self.lesson.factors.text_encoder:
            return self.trainee.encode(captions)
        for caption in dict.fromkeys(captions):
            if caption not in self.known:
                with torch.no_grad():
                    self.known[caption] = self.trainee.encode([caption])
        return Condition.joined([self.known[caption] for caption in captions])


@torch.no_grad()
def class_latents(trainee: Trainee, lesson: Lesson, guidance: float = 3.0) -> torch.Tensor:
    """Latents [N, ...] of the base's own samples of the class, before it is trained: prior preservation's pictures."""
    found = []
    for rows in slices(CLASS_PICTURES, 8):
        generators = [torch.Generator().manual_seed(seed_of("class", lesson.seed, row)) for row in rows]
        drawn = trainee.pipeline(
            [str(lesson.class_caption)] * len(rows), num_inference_steps=CLASS_STEPS, guidance_scale=guidance,
            generator=generators, output_type="latent", **sides(trainee),
        ).images.float().cpu()  # fmt: skip
        patched = isinstance(trainee.base.architecture, Patched)
        found.append(unpack(drawn, *trainee.codec.latent_shape[1:]) if patched else drawn)
    return torch.cat(found)


def sides(trainee: Trainee) -> dict[str, int]:
    """Height and width of pictures, as pipelines take them."""
    trainee.pipeline.set_progress_bar_config(disable=True)
    width, height = trainee.codec.picture_size
    return {"height": height, "width": width}


def slices(count: int, size: int) -> Iterator[range]:
    """Numbers from 0 to ``count``, ``size`` at a time."""
    return (range(start, min(count, start + size)) for start in range(0, count, size))
