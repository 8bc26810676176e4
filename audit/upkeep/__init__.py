"""What an operator asks of a workspace: what it holds, what has failed, and whether everything is as recorded."""

from audit.upkeep.damage import verify
from audit.upkeep.failing import FailureGroup, Failures, failures
from audit.upkeep.holdings import Status, status
from audit.workspace.verify import Problem

__all__ = ["FailureGroup", "Failures", "Problem", "Status", "failures", "status", "verify"]
