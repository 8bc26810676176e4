"""The stages of an audit, one file each: what they need, whether a job is done, and how it is done.

They know nothing of engines. Importing them loads no library: each imports what it works with when it runs.
"""

from audit.stages.cluster import Cluster, Clustered
from audit.stages.control import Control, Controlled
from audit.stages.match import Match, Matched
from audit.stages.membership import Membership, Remembered
from audit.stages.registry import STAGES, StageKind, is_ours, stages_for
from audit.stages.report import Report, Reported
from audit.stages.sample import Sample, Sampled
from audit.stages.scores import Scored, Scores

__all__ = [
    "STAGES", "Cluster", "Clustered", "Control", "Controlled", "Match", "Matched", "Membership", "Remembered", "Report",
    "Reported", "Sample", "Sampled", "Scored", "Scores", "StageKind", "is_ours", "stages_for",
]  # fmt: skip
