"""Whether decoys are of the references' kind: only then is what decoys score what chance scores.

A fine-tune learns the look of its pictures as well as the pictures: all drawings of one hand score higher than photos.
Decoys of another look would make every picture of that look a match. So references and decoys are looked at as two
samples, and where they can be told apart by their looks (a nearest-neighbour test: Schilling 1986; Lopez-Paz and Oquab,
arXiv 1610.06545) nothing follows from comparing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from PIL import Image

from audit.evidence.chance import FEWEST

SIDE = 64  # pixels that a look is taken of
FEATURES = 17
NEIGHBOURS = 3
PERMUTATIONS = 999
APART = 0.05  # p of the test up to which they are told apart
STRICTEST = 0.25  # the same, of one of many backgrounds
FEWEST_REFERENCES = 5  # with fewer nothing could be told apart
MOST = 200  # of either that are looked at
MEND = (
    "give pictures of their look (hand, subject, source) that cannot have been trained on, and no others: "
    "--background DIR, or 'lora-audit references add NAME DIR --kind background'"
)


def look_of(picture: Image.Image) -> np.ndarray:
    """float32 [17]: colours, their spread, those of the border, edges and fine detail of a picture, made small."""
    small = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    grey = small.mean(axis=2)
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])
    around = grey[2:, 1:-1] + grey[:-2, 1:-1] + grey[1:-1, 2:] + grey[1:-1, :-2]
    edges = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)]
    fine = np.abs(around - 4 * grey[1:-1, 1:-1])
    parts = [small.mean(axis=(0, 1)), small.std(axis=(0, 1)), border.mean(axis=0), border.std(axis=0), edges,
             [fine.mean(), fine.std(), grey.mean()]]  # fmt: skip
    return np.concatenate(parts).astype(np.float32)


def same_kind_p(references: np.ndarray, decoys: np.ndarray, seed: int = 0) -> float:
    """How likely references [N, F] are as much among themselves as they are, were both samples of one kind."""
    rng = np.random.default_rng(seed)
    everything = np.concatenate([references, decoys])
    mine = np.arange(len(everything)) < len(references)
    apart = ((everything[:, None] - everything[None]) ** 2).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    nearest = np.argsort(apart, axis=1, kind="stable")[:, :NEIGHBOURS]
    drawn = np.array([rng.permutation(mine) for _ in range(PERMUTATIONS)])
    shares = (drawn[:, nearest] & drawn[:, :, None]).sum(axis=(1, 2))
    return float((1 + (shares >= (mine[nearest] & mine[:, None]).sum()).sum()) / (1 + PERMUTATIONS))


def of_their_kind(references: np.ndarray, backgrounds: Sequence[np.ndarray]) -> list[bool] | None:
    """Which of several ``backgrounds`` [M, F] may be pooled as decoys of ``references`` [N, F]; None: it is not clear.

    The more are on offer, the likelier one of another look passes by chance, so that the test gets stricter with their
    number. Backgrounds that pass and are told apart from each other cannot all be of the references' kind: then none
    is taken. Looks alone decide, no score.
    """
    level = min(APART * len(backgrounds), STRICTEST)
    passed = [not are_apart(references, one, level) for one in backgrounds]
    taken = [one for one, good in zip(backgrounds, passed, strict=True) if good]
    return None if any(are_apart(one, other) for one, other in combinations(taken, 2)) else passed


def are_apart(references: np.ndarray, decoys: np.ndarray, level: float = APART) -> bool:
    """Whether ``references`` [N, F] and ``decoys`` [M, F] are told apart by their looks; never with fewer than 5."""
    if min(len(references), len(decoys)) < FEWEST_REFERENCES:
        return False
    if not (np.isfinite(references).all() and np.isfinite(decoys).all()):
        return False  # they cannot be told: kind_problem says so
    mine, others = _some(references), _some(decoys)
    spread = np.concatenate([mine, others]).std(axis=0) + 1e-6
    return same_kind_p(mine / spread, others / spread) <= level


def kind_problem(references: np.ndarray, decoys: np.ndarray) -> str | None:
    """Why nothing follows from comparing ``references`` [N, F] with ``decoys`` [M, F]; None where they are of one kind.

    All decoys are taken, none chosen: the nearest of another kind would pass for this one.
    """
    if not (np.isfinite(references).all() and np.isfinite(decoys).all()):
        return (
            "the look of some pictures was not taken when they were added: add the set, and its decoys, again as "
            "folders of pictures (a list of hashes has no looks)"
        )
    if len(decoys) < FEWEST:
        few = f"{len(decoys)} decoys of their kind are too few" if len(decoys) else "there are no decoys of their kind"
        return f"{few}, {FEWEST} is the least: {MEND}"
    if len(references) < FEWEST_REFERENCES:
        return (
            f"whether decoys are of their kind cannot be seen by fewer than {FEWEST_REFERENCES} references that count: "
            "ask about more pictures of that look together"
        )
    if are_apart(references, decoys):
        return f"the {len(decoys)} decoys are not of their kind: {MEND}"
    return None


def _some(looks: np.ndarray) -> np.ndarray:
    if len(looks) <= MOST:
        return looks
    return looks[np.random.default_rng(0).choice(len(looks), MOST, replace=False)]
