"""From many generations to a few extractions: groups of near-copies, each with a representative."""

from audit.clustering.cliques import greedy_cliques
from audit.clustering.clusters import Cluster
from audit.clustering.linkage import complete_linkage

__all__ = ["Cluster", "complete_linkage", "greedy_cliques"]
