"""What speaks for a picture having been trained on: clusters of near-copies, and scores against known pictures."""

from audit.evidence.cliques import greedy_cliques
from audit.evidence.clusters import Cluster
from audit.evidence.metrics import RankScore, Score, rank_score, score
from audit.evidence.peaks import density_peaks

__all__ = ["Cluster", "RankScore", "Score", "density_peaks", "greedy_cliques", "rank_score", "score"]
