"""Match extractions with reference sets: one SQL statement with both similarities."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa

from audit.descriptors.pdq import MATCH_DISTANCE, MIN_QUALITY
from audit.schemas import MATCHES, VECTOR

_NO_CONTROL = pa.schema([("descriptor", VECTOR)]).empty_table()
# A match needs the descriptor; PDQ corroborates it. PDQ alone is shown to a reviewer and never counts. An extraction
# speaks for its nearest reference only: a picture that looks like the one that was copied is not accused with it. Nor
# is one that the base alone draws as near: as near as the extraction, or as the threshold.
_SQL = """
WITH pairs AS (
    SELECT e.audit_id, e.rank, r.reference_set, r.reference_id,
        list_cosine_similarity(e.descriptor, r.descriptor) AS similarity,
        coalesce(least(r.width, r.height) < $smallest, false) AS is_small,
        CASE WHEN e.pdq_quality >= $quality AND r.pdq_quality >= $quality
            THEN bit_count(xor(e.pdq::BIT, r.pdq::BIT)) END AS pdq_distance
    FROM extracted AS e CROSS JOIN "references" AS r
    WHERE r.descriptor_name = $descriptor AND list_contains($sets, r.reference_set)
), controlled AS (
    SELECT r.reference_set, r.reference_id,
        max(list_cosine_similarity(c.descriptor, r.descriptor)) AS control_similarity
    FROM drawn_by_base AS c CROSS JOIN "references" AS r
    WHERE r.descriptor_name = $descriptor AND list_contains($sets, r.reference_set) GROUP BY ALL
), placed AS (
    SELECT *, row_number() OVER (
        PARTITION BY rank, reference_set ORDER BY similarity DESC, reference_id
    ) AS position FROM pairs LEFT JOIN controlled USING (reference_set, reference_id)
), judged AS (
    SELECT *, CASE WHEN similarity < $threshold OR position > 1 THEN 'none'
        WHEN coalesce(control_similarity >= least(similarity, $threshold), false) THEN 'none'
        WHEN is_small THEN 'possible' ELSE 'match' END AS verdict FROM placed
)
SELECT audit_id, rank, reference_set, reference_id, position, similarity, pdq_distance,
    verdict = 'match' AS is_match, verdict,
    CASE WHEN similarity >= $threshold AND coalesce(pdq_distance <= $distance, false) THEN 'both'
        WHEN similarity >= $threshold THEN 'descriptor'
        WHEN coalesce(pdq_distance <= $distance, false) THEN 'pdq'
        ELSE 'none' END AS evidence, control_similarity
FROM judged WHERE position <= $top OR coalesce(pdq_distance <= $distance, false)
ORDER BY rank, position
"""


def match_extractions(
    connection: duckdb.DuckDBPyConnection,
    extractions: pa.Table,
    sets: list[str],
    descriptor_name: str,
    threshold: float,
    input_size: int = 0,
    top: int = 3,
    control: pa.Table | None = None,
) -> list[dict[str, Any]]:
    """Rows of the matches table: the ``top`` nearest references of each extraction and set, and every PDQ match.

    ``connection`` sees the references, ``extractions`` has the schema of that table. Compared are the references of
    ``sets`` described by ``descriptor_name``. Those with a side below ``input_size`` pixels, the descriptor's own, have
    been enlarged to be described, which makes small pictures alike: they are possible at most. ``control`` are the
    audit's control generations, a table with the column ``descriptor``: what they draw as well is none.
    """
    parameters = {
        "quality": MIN_QUALITY,
        "descriptor": descriptor_name,
        "sets": sets,
        "threshold": threshold,
        "distance": MATCH_DISTANCE,
        "smallest": input_size,
        "top": top,
    }
    kept = [name for name in extractions.schema.names if name != "image"]
    connection.register("extracted", extractions.select(kept))
    connection.register("drawn_by_base", _NO_CONTROL if control is None else control)
    return connection.sql(_SQL, params=parameters).to_arrow_table().cast(MATCHES).to_pylist()
