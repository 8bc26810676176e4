"""Reference sets, and matching extractions against them in DuckDB."""

from audit.references.match import match_extractions
from audit.references.sets import ReferenceSets, SkippedImage

__all__ = ["ReferenceSets", "SkippedImage", "match_extractions"]
