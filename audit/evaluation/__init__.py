"""Scores for checkpoints whose training images are known."""

from audit.evaluation.metrics import Score, score

__all__ = ["Score", "score"]
