"""From many generations to a few extractions: groups of near-copies, each with a representative."""

from audit.clustering.cliques import greedy_cliques
from audit.clustering.clusters import Cluster
from audit.clustering.peaks import density_peaks

__all__ = ["Cluster", "density_peaks", "greedy_cliques"]
