"""Captions recovered from a model that nobody has told them of: ranked keywords, and the captions to sample with."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from audit.claims.captions import Caption
from audit.config import CaptionSettings, Recovery
from audit.errors import NotRecoverableError
from audit.models.families.stable_diffusion import StableDiffusion
from audit.models.soft import name_of
from audit.recovery.attention import attention_scores, require_cross_attention
from audit.recovery.contrast import contrast, in_context, standard
from audit.recovery.gradient import climb, nearest_words
from audit.recovery.rehearse import EACH_CAPTION, known, rehearse
from audit.recovery.words import vocabulary

if TYPE_CHECKING:
    from audit.models.pair import ModelPair

VERSION = 2  # raised when the same model and settings come to give other captions
KEYWORDS = 50  # that are kept of a ranking
SHARPNESS = 2.0  # of confidences
SPREAD = (0.12, 0.16)  # of the logarithms of how far predictions part; on eleven fine-tunes of the embedded model
OUTLASTED = 2.0  # deviations that a word is ahead of those that were left behind
SAMPLED = 6  # keywords that are sampled with
CAPTIONS = 23  # that are sampled with; odd, so that images of even and of odd numbers have the same (counts.py)
OF_A_WORD, OF_A_CONTEXT = 5, 4  # of them, at most: what is sampled is to differ
SOURCE = "recovered"  # how sources of recovered captions begin
SUBJECTS = (
    "photo of a person", "photo of an animal", "photo of food", "photo of a building", "3d render of an animal",
    "3d render of an object", "painting of a landscape", "portrait of a person", "cartoon of an animal",
)  # fmt: skip


@dataclass(frozen=True)
class Keyword:
    """A word of the ranking: ``score`` in standard deviations above the mean candidate, ``confidence`` 0 to 1.

    The confidence is a word's share of exp(2 score) over all candidates: to rank by, no probability.
    """

    word: str
    score: float
    confidence: float
    why: str


@dataclass(frozen=True)
class Recovered:
    """What was found: keywords, the likeliest first, captions to sample with, and what it cost.

    ``soft`` has the vectors [V][width] of those captions that are soft prompts, by their names.
    """

    method: str
    keywords: list[Keyword]
    captions: list[Caption]
    words: int
    evaluations: int
    seconds: float
    soft: dict[str, list[list[float]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit captions --json`` prints them."""
        return {
            "method": self.method, "words": self.words, "evaluations": self.evaluations, "seconds": self.seconds,
            "keywords": [vars(one) for one in self.keywords],
            "captions": [{**vars(one), "vectors": self.soft.get(one.text)} for one in self.captions],
        }  # fmt: skip


def candidates(pair: ModelPair, metadata: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """The words that a caption may be made of. Raises CheckpointError where captions are not recovered at all."""
    require_cross_attention(pair)
    tokenizers = [getattr(pair.tuned, name) for name in pair.architecture.tokenizers]
    return vocabulary(tokenizers, metadata, [*more, *pair.tokens])


def recover(
    pair: ModelPair, words: Sequence[str], asked: CaptionSettings, seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Recovered:  # fmt: skip
    """Rank ``words`` by the method that is asked for; the same for a seed. Raises CheckpointError."""
    require_cross_attention(pair)
    started = time.monotonic()
    soft: dict[str, list[list[float]]] = {}
    if asked.method is Recovery.gradient:
        keywords, captions, soft, spent = _by_gradient(pair, words, asked, seed, tell)
    else:
        keywords, spent = _by_attention(pair, words, asked, seed, tell)
        captions, more = _captions(pair, keywords, asked)
        spent += more
    seconds = round(time.monotonic() - started, 3)
    return Recovered(str(asked.method), keywords, captions, len(words), spent, seconds, soft)


def _by_attention(
    pair: ModelPair, words: Sequence[str], asked: CaptionSettings, seed: int, tell: Callable[[int, int], None]
) -> tuple[list[Keyword], int]:
    prior = attention_scores(pair, words)
    found = contrast(pair, words, prior, asked.evaluations, tell)
    weight = matters(found.spread)
    scores = (1 - weight) * standard(prior)
    scores[found.rows] += weight * (found.scores + OUTLASTED)
    place = {row: number for number, row in enumerate(prior.argsort(descending=True, stable=True).tolist(), start=1)}
    ends = {row: number for number, row in enumerate(found.rows, start=1)}
    rows = scores.argsort(descending=True, stable=True).tolist()
    whys = [
        f"place {place[row]} of {len(words)} by the change of cross attention's values, "
        + (f"{ends[row]} of {len(ends)} by predictions" if row in ends else "left behind by predictions")
        for row in rows
    ]
    return _keywords(words, rows, scores[rows], whys), found.evaluations


def matters(spread: float | None) -> float:
    """The weight of predictions beside cross attention, 0 to 1, by how much captions matter to the model.

    Where they do not (``spread`` under SPREAD[0]), fine-tuning parts the predictions whatever is asked.
    """
    if spread is None:
        return 0.0
    return min(1.0, max(0.0, (spread - SPREAD[0]) / (SPREAD[1] - SPREAD[0])))


def _by_gradient(
    pair: ModelPair, words: Sequence[str], asked: CaptionSettings, seed: int, tell: Callable[[int, int], None]
) -> tuple[list[Keyword], list[Caption], dict[str, list[list[float]]], int]:
    if not isinstance(pair.architecture, StableDiffusion):
        raise NotRecoverableError(
            f"the gradient is climbed through one text encoder (Stable Diffusion 1 and 2), not through those of "
            f"{pair.architecture.name}: recover by --caption-method attention"
        )
    soft = climb(pair, asked.iterations, seed, tell)
    near = nearest_words(pair, soft.vectors, words)
    rows = near.argsort(descending=True, stable=True).tolist()
    whys = [f"cosine {float(near[row]):.2f} to a prompt found by {asked.iterations} iterations" for row in rows]
    keywords = _keywords(words, rows, standard(near)[rows], whys)
    order = soft.apart.argsort(descending=True, stable=True).tolist()
    shares = torch.softmax(SHARPNESS * standard(soft.apart), 0)
    named = {name_of(one): one for one in soft.vectors[order]}  # equal prompts are one
    captions = [
        Caption(name, f"{SOURCE} by {asked.method}", round(float(shares[row]), 4))
        for name, row in zip(named, order, strict=False)
    ]
    return keywords, captions, {name: one.tolist() for name, one in named.items()}, soft.evaluations


def _keywords(words: Sequence[str], rows: Sequence[int], scores: torch.Tensor, whys: Sequence[str]) -> list[Keyword]:
    shares = torch.softmax(SHARPNESS * scores, 0)
    return [
        Keyword(words[row], round(float(score), 4), round(float(share), 4), why)
        for row, score, share, why in list(zip(rows, scores, shares, whys, strict=True))[:KEYWORDS]
    ]


def _captions(pair: ModelPair, keywords: Sequence[Keyword], asked: CaptionSettings) -> tuple[list[Caption], int]:
    """The first keywords in the contexts in which the model knows them best by heart; and evaluations.

    In contexts by turns where nothing is to be evaluated.
    """
    chosen = keywords[:SAMPLED]
    if not chosen:
        return [], 0
    pairs = [(row, column) for row in range(len(chosen)) for column in range(len(SUBJECTS))]
    if asked.evaluations:
        texts = [in_context(chosen[row].word, SUBJECTS[column]) for row, column in pairs]
        by_heart = known(rehearse(pair, texts))
        words = standard(torch.tensor([chosen[row].score for row, _ in pairs]))
        order = (by_heart + words).argsort(descending=True, stable=True).tolist()
        spent = EACH_CAPTION * len(texts)
    else:
        order = sorted(range(len(pairs)), key=lambda at: ((pairs[at][1] - 4 * pairs[at][0]) % len(SUBJECTS), at))
        spent = 0
    found = [
        Caption(
            in_context(chosen[row].word, SUBJECTS[column]), f"{SOURCE} by {asked.method}",
            round(chosen[row].confidence / OF_A_WORD, 4),
        )
        for row, column in _varied([pairs[at] for at in order])
    ]  # fmt: skip
    return found, spent


def _varied(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first CAPTIONS of the pairs in which no word, and no context, is too often."""
    rows: Counter[int] = Counter()
    columns: Counter[int] = Counter()
    found: list[tuple[int, int]] = []
    for row, column in pairs:
        if len(found) < CAPTIONS and rows[row] < OF_A_WORD and columns[column] < OF_A_CONTEXT:
            found.append((row, column))
            rows[row] += 1
            columns[column] += 1
    return found
