"""Reference sets, and matching extractions against them in DuckDB."""

from audit.matching.match import match_extractions
from audit.matching.references import ReferenceSets, SkippedImage

__all__ = ["ReferenceSets", "SkippedImage", "match_extractions"]
