"""The workspace: tables of whole Parquet files, the spool of unfinished audits, run leases, migration and export."""

from audit.workspace.spool import Spool
from audit.workspace.workspace import Workspace

__all__ = ["Spool", "Workspace"]
