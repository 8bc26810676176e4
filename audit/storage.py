"""The workspace under its earlier name: see audit/workspace."""

from audit.workspace import Spool, Workspace

__all__ = ["Spool", "Workspace"]
