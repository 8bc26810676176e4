"""How likely what speaks for a reference is by chance: p-values from decoys, their combination, and error rates.

A decoy is a picture of a reference's kind that the checkpoint cannot have seen. Where the reference was not trained on
either, its score is one draw more from what decoys score, and every rank is as likely (exchangeability):

    p = (1 + decoys that score as much) / (1 + decoys)                      conformal, arXiv 0706.3188

Its smallest value is 1 / (1 + decoys). Beyond the highest decoys the tail of their scores is taken to go on as a
generalised Pareto distribution does (Pickands 1975; peaks over a threshold), never thinner than an exponential one:

    p = share of decoys above u * P(excess > score - u)

Kinds of evidence on one reference depend on each other. A match has to be one by each: its p is the largest, which
holds under any dependence, and holds where the decoys are not quite of the reference's kind, as long as one kind of
evidence does (a picture of the same pattern as a training picture is known better than all decoys, but it is not what
comes out). Where one kind is to be enough, p is twice the smaller (Bonferroni), which holds under any dependence too,
but only where the decoys are exchangeable with the references by both kinds. Of many references, those are matches
whose expected share of wrong ones is at most the rate asked for (Benjamini and Hochberg 1995).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

FEWEST = 19  # decoys: with fewer no p is below 0.05
TAIL_FEWEST = 100  # decoys from which a tail is fitted
TAIL_SHARE = 0.1  # of the decoys, the highest: the tail
MOST_SHAPE = 0.5  # of the tail: beyond it the variance is infinite, and a fit says no more than that
BEYOND = 50  # times below the smallest rank's p the tail is trusted at most
KINDS = 2  # of evidence: what was drawn, and what the model knows
POSSIBLE = 0.05  # p from which a reference is worth a look
SUSPICION = 0.01  # share of decoys that are suspected wrongly, of those that are
FIT_DOUBT = 0.05  # of Kolmogorov and Smirnov: a tail that fits worse is not used


def rank_p(scores: np.ndarray, decoys: np.ndarray) -> np.ndarray:
    """Conformal p [N] of ``scores`` [N] among ``decoys`` [M]; 1 for what is not finite.

    Decoys that are not finite count as higher than any score. Raises ValueError without decoys.
    """
    if not len(decoys):
        raise ValueError("there are no decoys")
    ordered = np.sort(np.where(np.isfinite(decoys), decoys, np.inf))
    as_high = len(ordered) - np.searchsorted(ordered, scores, side="left")
    return np.where(np.isfinite(scores), (1 + as_high) / (1 + len(ordered)), 1.0)


def tail_p(scores: np.ndarray, decoys: np.ndarray) -> np.ndarray:
    """As ``rank_p``, with more resolution for scores above nearly all decoys, where these suffice and fit a tail."""
    ranks = rank_p(scores, decoys)
    if len(decoys) < TAIL_FEWEST or not np.isfinite(decoys).all():
        return ranks
    above = np.quantile(decoys, 1 - TAIL_SHARE)
    excess = decoys[decoys > above] - above
    shape, scale = _tail(excess)
    if scale == 0 or stats.kstest(excess, stats.genpareto(shape, 0, scale).cdf).pvalue < FIT_DOUBT:
        return ranks
    beyond = stats.genpareto.sf(np.maximum(scores - above, 0), shape, 0, scale)
    smooth = (1 + len(excess)) / (1 + len(decoys)) * beyond
    least = 1 / (1 + len(decoys)) / BEYOND
    return np.where(scores > above, np.clip(smooth, least, 1), ranks)


def _tail(excess: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution of ``excess`` [K], not thinner than an exponential one."""
    if len(excess) < 2 or excess.std() == 0:
        return 0.0, 0.0
    shape, _, scale = stats.genpareto.fit(excess, floc=0)
    if shape <= 0:
        return 0.0, float(excess.mean())
    return min(float(shape), MOST_SHAPE), float(scale)


def agreed_p(values: Sequence[float]) -> float:
    """One p of several kinds of evidence on the same thing, all of which have to speak for it: the largest."""
    return float(np.max(values))


def either_p(values: Sequence[float]) -> float:
    """One p of the kinds of evidence on the same thing, one of which has to speak for it (Bonferroni).

    Twice the smallest, also where only one is there: which of them there is can depend on what was found.
    """
    return float(min(1.0, KINDS * np.min(values)))


def false_discovery_rates(values: np.ndarray, others: int = 0) -> np.ndarray:
    """For p-values [N] the smallest rate of wrong ones at which each counts (Benjamini and Hochberg's adjusted p).

    ``others`` is how many were compared beside, whose p is not smaller: they count as 1. What is not even possible
    never counts: at a rate above 5 % a p of 0.3 could.
    """
    if not len(values):
        return np.empty(0)
    all_of_them = np.concatenate([np.where(values <= POSSIBLE, values, 1.0), np.ones(others)])
    return np.asarray(stats.false_discovery_control(all_of_them, method="bh"))[: len(values)]


def expected_by_chance(values: np.ndarray, others: int = 0) -> np.ndarray:
    """E-values [N]: how many of N and ``others`` references that were not trained on would have a p as small."""
    return np.asarray(values) * (len(values) + others)


def standing_out(scores: np.ndarray) -> np.ndarray:
    """Which decoys [M] score so far above the others that they may have been trained on themselves; booleans.

    How far they lie above the median, in spreads that outliers do not widen (the median deviation, or the upper
    quartile's if that is wider), as a normal distribution has it; over all decoys by Benjamini and Hochberg. A rank
    among the others cannot tell it: one of them is always the highest. It is a warning, and changes no p.
    """
    finite = np.isfinite(scores)
    found = np.zeros(len(scores), bool)
    if finite.sum() < FEWEST:
        return found
    middle, upper = np.quantile(scores[finite], [0.5, 0.75])
    spread = max(stats.median_abs_deviation(scores[finite], scale="normal"), (upper - middle) / stats.norm.ppf(0.75))
    if spread > 0:
        found[finite] = false_discovery_rates(stats.norm.sf((scores[finite] - middle) / spread)) <= SUSPICION
    return found


def set_p(scores: np.ndarray, decoys: np.ndarray) -> float:
    """How likely the scores [N] of a whole set are as high as they are, had it no part: Mann and Whitney's test.

    Scores that are not finite are left out. Raises ValueError where nothing is left, or without decoys.
    """
    mine, others = scores[np.isfinite(scores)], decoys[np.isfinite(decoys)]
    if not len(mine) or not len(others):
        raise ValueError("a set is compared by the finite scores of its pictures and of decoys: there are none")
    return float(stats.mannwhitneyu(mine, others, alternative="greater").pvalue)
