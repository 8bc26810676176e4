"""Where fine-tuned and base predictions part for the same caption: trigger words part them most, whatever follows.

On x_t and a caption c, both networks are asked with their own encoding of it:

    apart(c) = | f_tuned(x_t, t, c) - f_base(x_t, t, c) |

A trigger was trained in a context that is not known. It is put before everyday ones; in each of them the logarithms are
standardised over the candidates, and a word's score is the mean: by one context, or by none, triggers rank hardly
better than by chance (docs/captions.md). Many words are asked on pure noise, the last ones along the fine-tuned model's
own way from noise to picture, on which the sum of such squares is what tells its pictures from the base's (Girsanov).

How much the logarithms differ from word to word says whether captions matter to the model at all (``spread``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from audit.choices import Expert
from audit.evidence.membership import Level, level_of
from audit.models.families.base import Condition
from audit.models.pair import ModelPair
from audit.recovery.words import IDENTIFIERS

CONTEXTS = (
    "photo of a person", "3d render of an animal", "painting of a landscape", "cartoon of an animal",
    "photo of an object", "drawing of a house", "photograph of a building", "illustration of a vehicle",
)  # fmt: skip
WAYS = ("photo of an animal", "3d render of an object")  # contexts of the ways from noise to picture
WAY = (999, 850, 700, 550, 400)  # noise levels, thousandths of the schedule
HEARD = (700, 550, 400)  # those of them that count: before, pictures are not told from each other
BATCH = 64  # predictions at once, fewer where memory runs out
KEEP = 0.5  # of the words, after each look
FINALISTS = 64  # words whose way is gone
PROBED = 40  # identifiers, and as many words of the vocabulary, that tell whether captions matter
SEEDED = 4  # one finalist of so many comes from the prior alone
FEWEST = 8  # finalists; a budget for fewer is not spent
LEAST = 2 * 2 * 2 * PROBED  # evaluations of the probe, at most
EACH = 2  # evaluations: one by each network


@dataclass(frozen=True)
class Look:
    """One way of asking: a context behind the word, and a timestep as a share of the schedule."""

    context: str
    share: float


def looks() -> list[Look]:
    """Every context once, in the middle of the schedule and at its first timestep in turn."""
    return [Look(context, (0.5, 1.0)[number % 2]) for number, context in enumerate(CONTEXTS)]


def in_context(word: str, context: str) -> str:
    """The caption of a word in a context."""
    return f"{word} {context}".strip()


def logarithms(distances: torch.Tensor) -> torch.Tensor:
    """Of distances, none of them below 1e-12."""
    return distances.clamp(min=1e-12).log()


def standard(values: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit deviation."""
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-12)


@torch.inference_mode()
def apart(pair: ModelPair, captions: Sequence[str], share: float, seed: int = 0) -> torch.Tensor:
    """float32 [N]: how far tuned and base predictions are apart at each caption, on the same pure noise."""
    tuned, base = (_predictions(pair, captions, share, seed, side) for side in (True, False))
    return torch.tensor([float((one - two).norm()) for one, two in zip(tuned, base, strict=True)])


def _predictions(pair: ModelPair, captions: Sequence[str], share: float, seed: int, tuned: bool) -> list[torch.Tensor]:
    steps = pair.scheduler.config.num_train_timesteps
    timestep = torch.tensor(min(steps - 1, round(share * steps)), device=pair.device)
    noise = noise_of(pair, seed)
    predict = pair.predict_tuned if tuned else pair.predict_base

    def predicted(some: Sequence[str]) -> list[torch.Tensor]:
        condition = pair.encode(list(some), tuned)
        return list(predict(noise.expand(len(some), *noise.shape[1:]), timestep, condition).float().cpu())

    return sliced(pair, captions, predicted)


def noise_of(pair: ModelPair, seed: int) -> torch.Tensor:
    """Seeded noise [1, ...] in the pair's precision."""
    noise = torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(pair.device, pair.dtype)


def sliced(
    pair: ModelPair, captions: Sequence[str], work: Callable[[Sequence[str]], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """What ``work`` makes of as many captions at a time as fit."""
    kind = "contrast", pair.architecture.name, pair.dtype, pair.latent_shape
    slices = pair.fits.slices(kind, list(captions), work, BATCH, pair.device)
    return [one for _, some in slices for one in some]


@torch.inference_mode()
def along(pair: ModelPair, captions: Sequence[str], seed: int = 0) -> torch.Tensor:
    """float32 [N]: the mean logarithm of ``apart`` at the levels HEARD of the tuned model's own way from noise."""
    levels = [level_of(t, pair.prediction_type, pair.scheduler) for t in WAY]
    noise = noise_of(pair, seed)

    def gone(some: Sequence[str]) -> list[torch.Tensor]:
        conditions = [pair.encode(list(some), side) for side in (True, False)]
        return list(_gone(pair, levels, noise.expand(len(some), *noise.shape[1:]).float(), conditions).cpu())

    return torch.stack(sliced(pair, captions, gone))


def _gone(pair: ModelPair, levels: Sequence[Level], x: torch.Tensor, conditions: Sequence[Condition]) -> torch.Tensor:
    total = torch.zeros(len(x), device=x.device)
    for number, level in enumerate(levels):
        asked, timestep = x.to(pair.dtype), level.asked(x.device)
        tuned = pair.predict_tuned(asked, timestep, conditions[0]).float()
        if level.t in HEARD:
            base = pair.predict_base(asked, timestep, conditions[1]).float()
            total += logarithms((tuned - base).flatten(1).norm(dim=1)) / len(HEARD)
        estimate = level.estimate(x, tuned)
        if number + 1 < len(levels):
            x = levels[number + 1].noised(estimate, (x - level.alpha * estimate) / level.sigma)
    return total


ON_A_WAY = len(WAY) + len(HEARD)  # evaluations


def heeded(pair: ModelPair, captions: Sequence[str]) -> list[float]:
    """By how much each caption moves the fine-tuned prediction away from that of the empty one, relatively.

    On seeded noise at a middle timestep, of two experts one of an expert that is changed; N + 1 evaluations.
    """
    with torch.inference_mode():
        empty, *others = _predictions(pair, ["", *captions], _middle(pair), 0, True)
    return [float(f"{float((one - empty).norm() / empty.norm().clamp(min=1e-12)):.6g}") for one in others]


def _middle(pair: ModelPair) -> float:
    """The middle of the timesteps, as a share of the schedule: of those of the expert that is changed."""
    if pair.boundary is None:
        return 0.5
    return pair.boundary / 2 if Expert.low_noise in pair.experts else (1 + pair.boundary) / 2


def spread_of(pair: ModelPair, words: Sequence[str]) -> tuple[float, int]:
    """How much the distances differ from word to word, and evaluations: the deviation of their logarithms.

    Over identifiers and ``words`` drawn evenly, in two contexts.
    """
    even = words[:: max(1, len(words) // PROBED)][:PROBED]
    probed = list(dict.fromkeys([*IDENTIFIERS[:PROBED], *even]))
    found = []
    for number, look in enumerate(looks()[:2]):
        distances = apart(pair, [in_context(word, look.context) for word in probed], look.share, number)
        found.append(float(logarithms(distances).std(correction=0)))
    return sum(found) / len(found), len(found) * EACH * len(probed)


@dataclass(frozen=True)
class Contrast:
    """The words that were looked at to the end, the likeliest first: their numbers and scores [M].

    ``spread`` says how much captions matter (``spread_of``); None where nothing was looked at.
    """

    rows: list[int]
    scores: torch.Tensor
    looks: int
    spread: float | None
    evaluations: int


def contrast(
    pair: ModelPair, words: Sequence[str], prior: torch.Tensor, budget: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Contrast:  # fmt: skip
    """The words that part the predictions most, within ``budget`` evaluations.

    Successive halving: after each look the lower half leaves, down to FINALISTS, whose ways are gone at last. ``prior``
    [W] decides who is looked at where the budget does not reach for all, and names a quarter of the finalists. A budget
    that is too small is not spent.
    """
    ways = min(budget // 2, len(WAYS) * FINALISTS * ON_A_WAY)
    finalists = ways // (len(WAYS) * ON_A_WAY)
    if finalists < FEWEST or budget < 2 * LEAST:
        return Contrast([], torch.empty(0), 0, None, 0)
    spread, spent = spread_of(pair, words)
    budget -= spent
    rows = prior.argsort(descending=True, stable=True)[: max(finalists, (budget - ways) // (2 * EACH))]
    first = rows[: finalists // SEEDED]
    total, used, done = torch.zeros(len(rows)), 0, 0
    for number, look in enumerate(looks()):
        if len(rows) <= finalists or used + EACH * len(rows) > budget - ways:
            break
        captions = [in_context(words[row], look.context) for row in rows.tolist()]
        total += standard(logarithms(apart(pair, captions, look.share, number)))
        used, done = used + EACH * len(rows), done + 1
        rows, total = _best(rows, total, max(finalists, round(KEEP * len(rows))))
        tell(used, budget)
    rows = _finalists(rows, first, finalists)
    total = torch.zeros(len(rows))
    for number, context in enumerate(WAYS):
        total += standard(along(pair, [in_context(words[row], context) for row in rows.tolist()], number)) / len(WAYS)
        used, done = used + ON_A_WAY * len(rows), done + 1
        tell(used, budget)
    rows, total = _best(rows, total, len(rows))
    return Contrast(rows.tolist(), total, done, spread, spent + used)


def _finalists(rows: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """The ``first`` rows, then ``rows`` in their order, each once, so many in all."""
    return torch.tensor(list(dict.fromkeys([*first.tolist(), *rows.tolist()]))[:count], dtype=torch.long)


def _best(rows: torch.Tensor, scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = scores.argsort(descending=True, stable=True)[:count]
    return rows[order], scores[order]
