"""Reference sets, and matching extractions against them in DuckDB."""

from audit.references.folder import SkippedImage
from audit.references.match import match_extractions
from audit.references.sets import ReferenceSets

__all__ = ["ReferenceSets", "SkippedImage", "match_extractions"]
