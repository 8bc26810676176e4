"""Which captions the fine-tuned model knows by heart: its own short samples, denoised again by both models.

For a caption c, x is what the fine-tuned model comes to in a few deterministic steps from seeded noise. Noise is put
over x again, and both models are asked for it:

    e_tuned(c) = log mean |x - x0_tuned(x_t, t, c)|^2,    e_base(c) likewise
    known(c) = z(-e_tuned) + z(e_base - e_tuned)

z being standard deviations over the captions that are compared. What was learnt is denoised well where the base does
badly; a caption that merely drives the model far from its base gives samples that it does not denoise well itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from audit.evidence.membership import level_of
from audit.models.families.base import Condition
from audit.models.pair import ModelPair
from audit.recovery.contrast import noise_of, sliced, standard

STEPS = (999, 900, 750, 600, 450, 300, 150)  # thousandths of the schedule
AGAIN = 600  # the noise that is put over the sample
EACH_CAPTION = len(STEPS) + 2  # evaluations


@torch.inference_mode()
def rehearse(pair: ModelPair, captions: Sequence[str], seed: int = 0) -> torch.Tensor:
    """float32 [2, N]: e_tuned and e_base of each caption; the same noise for all of them."""
    first, second = (noise_of(pair, 2 * seed + number).float() for number in (0, 1))

    def rehearsed(some: Sequence[str]) -> list[torch.Tensor]:
        conditions = [pair.encode(list(some), side) for side in (True, False)]
        shape = len(some), *first.shape[1:]
        return list(_errors(pair, first.expand(shape), second.expand(shape), conditions).cpu())

    return torch.stack(sliced(pair, captions, rehearsed)).T


def _errors(
    pair: ModelPair, x: torch.Tensor, noise: torch.Tensor, conditions: Sequence[Condition]
) -> torch.Tensor:  # [N, 2]
    levels = [level_of(t, pair.prediction_type, pair.scheduler) for t in STEPS]
    for number, level in enumerate(levels):
        predicted = pair.predict_tuned(x.to(pair.dtype), level.asked(x.device), conditions[0]).float()
        estimate = level.estimate(x, predicted)
        if number + 1 < len(levels):
            x = levels[number + 1].noised(estimate, (x - level.alpha * estimate) / level.sigma)
    level = level_of(AGAIN, pair.prediction_type, pair.scheduler)
    again = level.noised(estimate, noise)
    errors = []
    for predict, condition in zip((pair.predict_tuned, pair.predict_base), conditions, strict=True):
        answer = level.estimate(again, predict(again.to(pair.dtype), level.asked(x.device), condition).float())
        errors.append((answer - estimate).flatten(1).square().mean(1).clamp(min=1e-12).log())
    return torch.stack(errors, dim=1)


def known(errors: torch.Tensor) -> torch.Tensor:
    """[...]: known(c) of ``errors`` [2, ...], standardised over all that are given."""
    return standard(-errors[0]) + standard(errors[1] - errors[0])
