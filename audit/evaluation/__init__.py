"""Scores for checkpoints whose training images are known."""

from audit.evaluation.metrics import RankScore, Score, rank_score, score

__all__ = ["RankScore", "Score", "rank_score", "score"]
