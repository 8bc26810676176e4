"""The paper's metrics (FineXtract, arXiv 2410.03039, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Scores of extractions against ``images`` known pictures.

    ``average_similarity`` (AS) is the mean over known pictures of the best cosine over extractions;
    ``extraction_rate_07`` and ``_06`` (A-ESR) the share of known pictures whose best cosine is above 0.7 and 0.6.
    """

    images: int
    average_similarity: float
    extraction_rate_07: float
    extraction_rate_06: float


def score(extractions: np.ndarray, known: np.ndarray) -> Score:
    """Score unit vectors of extractions [E, D] against those of known pictures [K, D].

    Without extractions every best cosine counts as 0. Raises ValueError without known pictures.
    """
    if len(known) == 0:
        raise ValueError("no known pictures to score against")
    best = (known @ extractions.T).max(axis=1) if len(extractions) else np.zeros(len(known))
    return Score(len(known), float(best.mean()), float((best > 0.7).mean()), float((best > 0.6).mean()))


@dataclass(frozen=True)
class RankScore:
    """How far the order of extractions can be trusted.

    ``precision_at_n0``: of the first N0 extractions, the share that is a training image (cosine above the threshold);
    places that are not filled count as wrong. ``average_precision``: the area under precision over recall, where an
    extraction is right when it is a training image that none before it was (as detections are scored in PASCAL VOC,
    Everingham et al. 2010, section 4.2) and recall is over all training images.
    """

    precision_at_n0: float
    average_precision: float


def rank_score(extractions: np.ndarray, known: np.ndarray, threshold: float = 0.7) -> RankScore:
    """Score the order of extractions, unit vectors [E, D], the surest first, against training images [K, D].

    Raises ValueError without known pictures.
    """
    if len(known) == 0:
        raise ValueError("no known pictures to score against")
    if len(extractions) == 0:
        return RankScore(0.0, 0.0)
    cosines = extractions @ known.T
    correct = cosines.max(axis=1) > threshold
    found: set[int] = set()
    area = 0.0
    for rank, row in enumerate(cosines, start=1):
        nearest = int(row.argmax())
        if row[nearest] > threshold and nearest not in found:
            found.add(nearest)
            area += len(found) / rank / len(known)
    return RankScore(float(correct[: len(known)].sum() / len(known)), area)
