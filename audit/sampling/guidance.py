"""How base and fine-tuned predictions are combined at a step (FineXtract, arXiv 2410.03039, section 4).

Fine-tuning moves the learnt distribution from the base p towards the training data q: p_ft ~ p^(1 - lambda) q^lambda.
So the score of q is an extrapolation, eps_q = eps_base + w (eps_ft - eps_base) with w = 1 / lambda, and with the
correction term eps = eps_q + k eps_base. Weights that sum to 1 combine eps-, v-, x0- and flow-predictions alike for a
given x_t, each being linear in the others; the k term does not and is applied in eps.

Flow matching (x_t = (1 - t) x_0 + t eps, velocity u = eps - x_0, arXiv 2210.02747) is the case alpha = 1 - t,
sigma = t: eps = x_t + (1 - t) u, so that u_q = u_base + w (u_ft - u_base) is model guidance for flow models.

Choosing w: the paper uses 3 for DreamBooth and 5 for LoRA on Stable Diffusion; a strongly memorising checkpoint
wants less (1.5 to 2), and images that look burnt or all alike are the sign of too much. ``auto_weight`` tells how
strongly by how far fine-tuning has moved the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch

from audit.config import BaseCaption, Method, Settings
from audit.models.families.base import Condition
from audit.models.pair import ModelPair

MIN_ALPHA = 0.01
CFG_WEIGHT = 3.0  # the paper's


@dataclass(frozen=True)
class Conditioning:
    """The conditions of one batch, encoded once before the loop."""

    tuned_caption: Condition
    tuned_empty: Condition
    base_caption: Condition
    base_empty: Condition

    @cached_property
    def tuned_both(self) -> Condition:
        """The empty caption's behind which those of the captions, as one batch [2 N]; joined once for all steps."""
        return Condition.joined([self.tuned_empty, self.tuned_caption])

    def select(self, rows: torch.Tensor) -> Conditioning:
        """Those of captions ``rows`` (int64 [M])."""
        parts = (self.tuned_caption, self.tuned_empty, self.base_caption, self.base_empty)
        return Conditioning(*(part.select(rows) for part in parts))


class Guidance(Protocol):
    """One prediction [N, C, H, W] from the pair at noisy latents ``x`` and timestep ``t`` under weight ``w``."""

    evaluations: ClassVar[int]
    rows: ClassVar[int]  # of the network's batch that an image takes

    def predict(
        self, pair: ModelPair, x: torch.Tensor, t: torch.Tensor, alpha: float, conditioning: Conditioning, w: float
    ) -> torch.Tensor:
        """``alpha`` is x_0's share of x_t: the square root of alpha-bar, or 1 - t; the answer is of the pair's type."""


@dataclass(frozen=True)
class Direct:
    """Plain sampling of the fine-tuned model."""

    evaluations: ClassVar[int] = 1
    rows: ClassVar[int] = 1

    def predict(
        self, pair: ModelPair, x: torch.Tensor, t: torch.Tensor, alpha: float, conditioning: Conditioning, w: float
    ) -> torch.Tensor:
        """eps_ft(x_t, c)."""
        return pair.predict_tuned(x, t, conditioning.tuned_caption)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance within the fine-tuned model, both halves in one batch."""

    evaluations: ClassVar[int] = 2
    rows: ClassVar[int] = 2

    def predict(
        self, pair: ModelPair, x: torch.Tensor, t: torch.Tensor, alpha: float, conditioning: Conditioning, w: float
    ) -> torch.Tensor:
        """eps_ft(x_t) + w (eps_ft(x_t, c) - eps_ft(x_t))."""
        empty, caption = pair.predict_tuned(torch.cat([x, x]), t, conditioning.tuned_both).chunk(2)
        return pair.architecture.guided(empty, caption, w)


@dataclass(frozen=True)
class BaseAlone:
    """Classifier-free guidance within the base: what it draws for a caption without any fine-tuning.

    One half after the other, in batches of model guidance's size: nothing has to be compiled anew for them.
    """

    evaluations: ClassVar[int] = 2
    rows: ClassVar[int] = 1

    def predict(
        self, pair: ModelPair, x: torch.Tensor, t: torch.Tensor, alpha: float, conditioning: Conditioning, w: float
    ) -> torch.Tensor:
        """eps_base(x_t) + w (eps_base(x_t, c) - eps_base(x_t))."""
        empty = pair.predict_base(x, t, conditioning.base_empty)
        return pair.architecture.guided(empty, pair.predict_base(x, t, conditioning.base_caption), w)


@dataclass(frozen=True)
class ModelGuidance:
    """Model guidance: extrapolation from the base to the fine-tuned model."""

    k: float = 0.0
    base_caption: BaseCaption = BaseCaption.empty
    evaluations: ClassVar[int] = 2
    rows: ClassVar[int] = 1

    def predict(
        self, pair: ModelPair, x: torch.Tensor, t: torch.Tensor, alpha: float, conditioning: Conditioning, w: float
    ) -> torch.Tensor:
        """eps_base(x_t) + w (eps_ft(x_t, c) - eps_base(x_t)) + k eps_base(x_t)."""
        own = self.base_caption is BaseCaption.same
        base = pair.predict_base(x, t, conditioning.base_caption if own else conditioning.base_empty)
        tuned = pair.predict_tuned(x, t, conditioning.tuned_caption)
        return combine(base, tuned, x, alpha, w, self.k, pair.prediction_type)


def extrapolate(start: torch.Tensor, end: torch.Tensor, w: float) -> torch.Tensor:
    """start + w (end - start)."""
    return torch.lerp(start, end, w)


def combine(
    base: torch.Tensor, tuned: torch.Tensor, x: torch.Tensor, alpha: float, w: float, k: float, prediction_type: str
) -> torch.Tensor:
    """Model guidance of two predictions of ``prediction_type`` at x_t = alpha x_0 + sigma eps.

    With eps = alpha v + sigma x_t, the k term adds k (v_base + (sigma / alpha) x_t) to v. At the start of a
    schedule with zero terminal SNR alpha vanishes, x_t says nothing of x_0 and the term has no finite meaning: it
    is left out where alpha is below 0.01. Raises ValueError for another prediction type.
    """
    guided = extrapolate(base, tuned, w)
    if k == 0 or alpha < MIN_ALPHA:
        return guided
    sigma = (1 - alpha**2) ** 0.5
    if prediction_type == "epsilon":
        return guided + k * base
    if prediction_type == "v_prediction":
        return guided + k * (base + (sigma / alpha) * x)
    if prediction_type == "flow_prediction":
        return guided + k * (base + x / alpha)
    if prediction_type == "sample":  # x_0 = (x_t - sigma eps) / alpha
        return guided + k * (base - x / alpha)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def make_guidance(settings: Settings) -> Guidance:
    """The guidance that ``settings`` describe."""
    if settings.method is Method.direct:
        return Direct()
    if settings.method is Method.cfg:
        return ClassifierFree()
    return ModelGuidance(settings.k, settings.base_caption)


def weight_of(settings: Settings, prediction_change: float) -> float | None:
    """The guidance weight: the one that is set, else CFG's or ``auto_weight``; None for direct sampling."""
    if settings.method is Method.direct:
        return None
    if settings.w is not None:
        return settings.w
    return CFG_WEIGHT if settings.method is Method.cfg else auto_weight(prediction_change)


def auto_weight(prediction_change: float) -> float:
    """w = 1 + 1.45 / change^2, from 1.25 to 5, for the relative change of the prediction (``Effect.prediction``).

    The further fine-tuning has moved the predictions, the nearer lambda is to 1 and w = 1 / lambda to 1; a gentle
    fine-tune wants the paper's 5. Fitted on the tuning sets of the testbed (docs/results.md).
    """
    return round(min(5.0, max(1.25, 1 + 1.45 / max(prediction_change, 1e-3) ** 2)), 2)
