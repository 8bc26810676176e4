"""Where fine-tuned and base predictions part for the same caption: trigger words part them most, whatever follows.

On noise x_t and a caption c, both networks are asked with their own encoding of it:

    apart(c) = | f_tuned(x_t, t, c) - f_base(x_t, t, c) |

A trigger was trained in one context, which is not known. It is put before several everyday ones; in each of them the
logarithms are standardised over all candidate words, and a word's score is the mean. One context alone, or none, ranks
triggers hardly better than chance (docs/captions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from audit.models.pair import ModelPair

CONTEXTS = (
    "photo of a person", "3d render of an animal", "painting of a landscape", "cartoon of an animal",
    "photo of an object", "drawing of a house", "photograph of a building", "illustration of a vehicle",
    "portrait of a person", "picture of food",
)  # fmt: skip
BATCH = 64  # predictions at once, fewer where memory runs out
KEEP = 0.5  # of the words, after each look
FEWEST = 24  # words that are looked at to the end
LOOKS = 2 * len(CONTEXTS)
EACH = 2  # evaluations: one by each network


@dataclass(frozen=True)
class Look:
    """One way of asking: a context behind the word, and a timestep as a share of the schedule."""

    context: str
    share: float


def looks() -> list[Look]:
    """Every context at the first timestep and in the middle, in turn."""
    found = []
    for number in range(LOOKS):
        turn, column = divmod(number, len(CONTEXTS))
        found.append(Look(CONTEXTS[column], (0.5, 1.0)[(column + turn) % 2]))
    return found


def in_context(word: str, context: str) -> str:
    """The caption of a word in a context."""
    return f"{word} {context}".strip()


@torch.inference_mode()
def apart(pair: ModelPair, captions: Sequence[str], share: float, seed: int = 0) -> torch.Tensor:
    """float32 [N]: how far tuned and base predictions are apart at each caption, on the same noise."""
    tuned, base = _predictions(pair, captions, share, seed, True), _predictions(pair, captions, share, seed, False)
    return torch.tensor([float((one - two).norm()) for one, two in zip(tuned, base, strict=True)])


def _predictions(pair: ModelPair, captions: Sequence[str], share: float, seed: int, tuned: bool) -> list[torch.Tensor]:
    steps = pair.scheduler.config.num_train_timesteps
    timestep = torch.tensor(min(steps - 1, round(share * steps)), device=pair.device)
    noise = torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(pair.device, pair.dtype)
    predict = pair.predict_tuned if tuned else pair.predict_base

    def predicted(some: Sequence[str]) -> list[torch.Tensor]:
        condition = pair.encode(list(some), tuned)
        found = predict(noise.expand(len(some), *noise.shape[1:]), timestep, condition)
        return list(found.float().cpu())

    kind = "contrast", pair.architecture.name, pair.dtype, pair.latent_shape
    slices = pair.fits.slices(kind, list(captions), predicted, BATCH, pair.device)
    return [one for _, some in slices for one in some]


def heeded(pair: ModelPair, captions: Sequence[str]) -> list[float]:
    """By how much each caption moves the fine-tuned prediction away from that of the empty one, relatively.

    On seeded noise at a middle timestep; 2 + 2 N evaluations.
    """
    empty, *others = _predictions(pair, ["", *captions], 0.5, 0, True)
    return [float(f"{float((one - empty).norm() / empty.norm().clamp(min=1e-12)):.6g}") for one in others]


def standard(values: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit deviation."""
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-12)


@dataclass(frozen=True)
class Contrasted:
    """A word that was looked at: its number, its mean score, and in how many looks."""

    row: int
    score: float
    looks: int


def contrast(
    pair: ModelPair, words: Sequence[str], prior: torch.Tensor, budget: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Contrasted], int]:  # fmt: skip
    """The words that part the predictions most, the first the likeliest, and the evaluations it took.

    Successive halving: after each look the lower half leaves. ``prior`` [W] decides who is looked at where the budget
    does not reach for all, and counts as one look.
    """
    reach = max(FEWEST, budget // (2 * EACH))
    rows = prior.argsort(descending=True, stable=True)[:reach]
    total, spent, done = standard(prior)[rows], 0, 0
    for number, look in enumerate(looks()):
        if spent + EACH * len(rows) > budget:
            break
        captions = [in_context(words[row], look.context) for row in rows.tolist()]
        total = total + standard(apart(pair, captions, look.share, number).clamp(min=1e-12).log())
        spent, done = spent + EACH * len(rows), done + 1
        kept = total.argsort(descending=True, stable=True)
        kept = kept[: max(min(FEWEST, len(kept)), round(KEEP * len(kept)))]
        rows, total = rows[kept], total[kept]
        tell(min(spent, budget), budget)
    order = total.argsort(descending=True, stable=True)
    found = [Contrasted(int(rows[one]), float(total[one]) / (done + 1), done) for one in order.tolist()]
    return found, spent
