"""How many training images there are, by how often the same near-copies come back in two halves of the samples.

The images of even and of odd seeds are two independent draws. A group of near-copies is seen in a half where the half
has two of it. With n1 groups seen in the first half, n2 in the second and m in both, Chapman's estimate (1951) and its
variance (Seber 1970) are

    N = (n1 + 1)(n2 + 1) / (m + 1) - 1
    var = (n1 + 1)(n2 + 1)(n1 - m)(n2 - m) / ((m + 1)^2 (m + 2))

and the interval is log-normal over what was seen (Chao 1987): images that hardly ever come out make N too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEEN = 2  # near-copies that a half has to have of a group
FEWEST = 3  # groups seen in both halves; below, nothing is said
LEVEL = 0.95


@dataclass(frozen=True)
class CountEstimate:
    """N0 by capture and recapture: an estimate with a 95 % interval, and the groups seen in each half and in both."""

    count: float
    low: float
    high: float
    first: int
    second: int
    both: int


def estimate_count(members: Sequence[Sequence[int]]) -> CountEstimate | None:
    """The estimate from the groups' ``members``, numbers of images whose parity tells the half.

    None where hardly a group is seen in both halves: nothing can be said then.
    """
    seen = np.array([[sum(index % 2 == half for index in group) >= SEEN for half in (0, 1)] for group in members])
    if not len(seen):
        return None
    first, second, both = (int(n) for n in (seen[:, 0].sum(), seen[:, 1].sum(), seen.all(axis=1).sum()))
    if both < FEWEST:
        return None
    from scipy.stats import norm

    count = (first + 1) * (second + 1) / (both + 1) - 1
    variance = (first + 1) * (second + 1) * (first - both) * (second - both) / ((both + 1) ** 2 * (both + 2))
    known = first + second - both
    unseen = count - known
    if unseen <= 0 or variance <= 0:
        return CountEstimate(count, float(known), float(max(known, count)), first, second, both)
    factor = float(np.exp(norm.ppf((1 + LEVEL) / 2) * np.sqrt(np.log1p(variance / unseen**2))))
    low, high = np.floor(known + unseen / factor), np.ceil(known + unseen * factor)  # N is a whole number
    return CountEstimate(count, float(low), float(high), first, second, both)
