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
