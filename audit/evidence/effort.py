"""How membership spends its network evaluations: where losses are measured, and which pictures get how many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIMESTEPS = (100, 300, 500)  # thousandths of the schedule
NOISES = 4
FIRST = 1  # noises of a first look
REPLAY = 8  # steps of what either model samples on from a reference under noise
BASE_PICTURES, TUNED_PICTURES = 2 * REPLAY, 1 + REPLAY  # evaluations of a reference's pictures: guidance asks both
SHARE = 10  # of the budget, one part in so many is spent on pictures, beside it
DECODED = 5  # pictures that are made of a reference
WHOLE = "whole-"  # how the question of a measurement begins for which the budget covers all noises of all pictures


def references_shown(budget: int) -> int:
    """Of how many references pictures are made at most, where membership may take ``budget`` evaluations."""
    return budget // SHARE // (BASE_PICTURES + TUNED_PICTURES)


@dataclass(frozen=True)
class Effort:
    """How a budget of network evaluations is spent on pictures, each under several views.

    All pictures get a first look: one noise at every timestep, in every view. What is left goes to the views with the
    highest scores, which get all noises. References and decoys have to be spent on alike, by their scores alone: then
    the scores of those that cannot have been trained on are still exchangeable.
    """

    timesteps: tuple[int, ...]
    noises: int
    views: int
    budget: int

    @property
    def look(self) -> int:
        """Evaluations of a first look at a picture, by both models."""
        return 2 * len(self.timesteps) * FIRST * self.views

    @property
    def closer(self) -> int:
        """Evaluations of all further noises of one view, by both models."""
        return 2 * len(self.timesteps) * (self.noises - FIRST)

    def covers(self, pictures: int) -> bool:
        """Whether all noises of all views of all pictures are within the budget."""
        return pictures * (self.look + self.closer * self.views) <= self.budget

    def looked_at(self, pictures: int) -> int:
        """How many pictures get a first look: all, or as many as half of the budget allows; one at least."""
        if pictures * self.look <= self.budget:
            return pictures
        return max(1, min(pictures, self.budget // 2 // self.look))

    def looked_closer(self, pictures: int) -> int:
        """How many views are left budget for, after a first look at ``pictures``."""
        left = self.budget - pictures * self.look
        return max(0, min(pictures * self.views, left // self.closer))


def nearest_and_sample(vectors: np.ndarray, seen: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Which ``count`` of ``vectors`` [N, D] to look at: half of them the nearest to ``seen`` [M, D], half a sample.

    Unit vectors; ascending numbers. Without anything seen all are a sample, drawn with ``seed``.
    """
    if count >= len(vectors):
        return np.arange(len(vectors))
    near = np.empty(0, np.int64)
    if len(seen):
        near = np.argsort(-(vectors @ seen.T).max(axis=1), kind="stable")[: count // 2]
    rest = np.setdiff1d(np.arange(len(vectors)), near)
    drawn = np.random.default_rng(seed).choice(rest, count - len(near), replace=False)
    return np.sort(np.concatenate([near, drawn]))
