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

from audit.models.pair import ModelPair
from audit.recovery.attention import token_counts
from audit.recovery.words import IDENTIFIERS

CONTEXTS = (
    "photo of a person", "3d render of an animal", "painting of a landscape", "cartoon of an animal",
    "photo of an object", "drawing of a house", "photograph of a building", "illustration of a vehicle",
)  # fmt: skip
BATCH = 64  # predictions at once, fewer where memory runs out
KEEP = 0.35  # of the words, after each look
FINALISTS = 64  # words that are rehearsed
REHEARSALS = ("photo of an animal", "3d render of an object", "cartoon of an animal")
PROBED = 40  # identifiers, and as many words of the vocabulary, that tell whether captions matter
STAYING = 0.8  # of the finalists, at most, are words that no look sends away
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
def stands_out(pair: ModelPair, words: Sequence[str], look: Look, seed: int = 0) -> torch.Tensor:
    """float32 [W]: the logarithm of ``apart`` beyond what follows from how far the word moves the base alone.

    The residual of a linear regression over the words on log | f_base(c) - f_base(context) |, standardised.
    """
    captions = [in_context(word, look.context) for word in words]
    tuned = _predictions(pair, captions, look.share, seed, True)
    *base, alone = _predictions(pair, [*captions, look.context], look.share, seed, False)
    far = logarithms(torch.tensor([float((one - two).norm()) for one, two in zip(tuned, base, strict=True)]))
    pull = standard(logarithms(torch.tensor([float((one - alone).norm()) for one in base])))
    far = standard(far)
    return standard(far - (far * pull).mean() * pull)


def heeded(pair: ModelPair, captions: Sequence[str]) -> list[float]:
    """By how much each caption moves the fine-tuned prediction away from that of the empty one, relatively.

    On seeded noise at a middle timestep; N + 1 evaluations.
    """
    with torch.inference_mode():
        empty, *others = _predictions(pair, ["", *captions], 0.5, 0, True)
    return [float(f"{float((one - empty).norm() / empty.norm().clamp(min=1e-12)):.6g}") for one in others]


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

    After each look most of the words leave, down to FINALISTS, which are rehearsed (audit/recovery/rehearse.py) in a
    few contexts; looks and rehearsals weigh the same. Words that triggers are made of, identifiers and what the
    tokenizer has not whole, stay: one look alone is unsure. ``prior`` [W] decides who is looked at where the budget
    does not reach for all. A budget that is too small is not spent.
    """
    from audit.recovery.rehearse import EACH_CAPTION, gap, rehearse

    a_word = len(REHEARSALS) * EACH_CAPTION
    finalists = min(budget // 2 // a_word, FINALISTS)
    if finalists < FEWEST or budget < 2 * LEAST:
        return Contrast([], torch.empty(0), 0, None, 0)
    spread, spent = spread_of(pair, words)
    budget -= spent
    rehearsals = finalists * a_word
    order = prior.argsort(descending=True, stable=True).tolist()
    lengths = token_counts(pair, words).tolist()
    staying = [row for row in order if words[row] in IDENTIFIERS or lengths[row] > 1][: round(STAYING * finalists)]
    afford = max(finalists, (budget - rehearsals) // (2 * EACH))
    rows = list(dict.fromkeys([*staying, *order]))[:afford]
    total, used, done = torch.zeros(len(words)), 0, 0
    for number, look in enumerate(looks()):
        if len(rows) <= finalists or used + EACH * len(rows) + 1 > budget - rehearsals:
            break
        total[rows] += stands_out(pair, [words[row] for row in rows], look, number)
        used, done = used + EACH * len(rows) + 1, done + 1
        others = sorted(set(rows) - set(staying), key=lambda row: -float(total[row]))
        rows = staying + others[: max(finalists - len(staying), round(KEEP * len(others)))]
        tell(used, budget)
    rows = rows[:finalists]
    gaps = torch.zeros(len(rows))
    for number, context in enumerate(REHEARSALS):
        gaps += standard(gap(rehearse(pair, [in_context(words[row], context) for row in rows], number)))
        used += EACH_CAPTION * len(rows)
        tell(used, budget)
    scores = standard(total[rows]) + standard(gaps)
    best = scores.argsort(descending=True, stable=True).tolist()
    return Contrast([rows[at] for at in best], scores[best], done + len(REHEARSALS), spread, spent + used)
