"""Match extractions with reference sets: the index finds candidates, one SQL statement judges them."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa

from audit.descriptors.pdq import MATCH_DISTANCE, MIN_QUALITY
from audit.references.index import Bank
from audit.references.index.bank import unit_vectors
from audit.references.index.hashes import packed
from audit.sampling.spooled import vectors_of
from audit.schemas import MATCHES

TOP = 3  # references that are kept of each extraction
MOST_HASHES = 100  # beside, of those whose hash is alike: the nearest
AT_ONCE = 8192  # extractions: each block of references is read once for all of them

# A match needs the descriptor; PDQ corroborates it. PDQ alone is shown to a reviewer and never counts. An extraction
# speaks for its nearest reference only: a picture that looks like the one that was copied is not accused with it.
_SQL = """
WITH placed AS (
    SELECT *, row_number() OVER (
        PARTITION BY audit_id, rank, reference_set ORDER BY similarity DESC, reference_id
    ) AS position, row_number() OVER (
        PARTITION BY audit_id, rank, reference_set ORDER BY pdq_distance NULLS LAST, reference_id
    ) AS hash_position FROM candidates
), judged AS (
    SELECT *, CASE WHEN similarity < $threshold OR position > 1 THEN 'none'
        WHEN is_small THEN 'possible' ELSE 'match' END AS verdict FROM placed
)
SELECT audit_id, rank, reference_set, reference_id, position, similarity, pdq_distance,
    verdict = 'match' AS is_match, verdict,
    CASE WHEN similarity >= $threshold AND coalesce(pdq_distance <= $distance, false) THEN 'both'
        WHEN similarity >= $threshold THEN 'descriptor'
        WHEN coalesce(pdq_distance <= $distance, false) THEN 'pdq'
        ELSE 'none' END AS evidence
FROM judged WHERE position <= $top OR (hash_position <= $most AND coalesce(pdq_distance <= $distance, false))
ORDER BY audit_id, rank, position
"""
_CANDIDATES = pa.schema(
    [
        ("audit_id", pa.string()), ("rank", pa.int32()), ("reference_set", pa.string()), ("reference_id", pa.string()),
        ("similarity", pa.float64()), ("pdq_distance", pa.int32()), ("is_small", pa.bool_()),
    ]
)  # fmt: skip


def match_extractions(
    connection: duckdb.DuckDBPyConnection,
    extractions: pa.Table,
    banks: dict[str, Bank],
    threshold: float,
    input_size: int = 0,
    top: int = TOP,
) -> pa.Table:
    """The matches table's rows: the ``top`` nearest references of each extraction and set, and PDQ matches: the
    MOST_HASHES nearest.

    ``extractions`` has the schema of that table, and may be those of many audits; ``banks`` are the references of each
    set, by the extractions' descriptor. References with a side below ``input_size`` pixels, the descriptor's own, have
    been enlarged to be described, which makes small pictures alike: they are possible at most. Raises ReferenceSetError
    for vectors of another width.
    """
    parts = [
        candidates(extractions.slice(start, AT_ONCE), name, bank, input_size, top)
        for name, bank in banks.items()
        for start in range(0, extractions.num_rows, AT_ONCE)
    ]
    parameters = {"threshold": threshold, "distance": MATCH_DISTANCE, "top": top, "most": MOST_HASHES}
    connection.register("candidates", pa.concat_tables(parts or [_CANDIDATES.empty_table()]))
    return connection.sql(_SQL, params=parameters).to_arrow_table().cast(MATCHES)


def candidates(extractions: pa.Table, name: str, bank: Bank, input_size: int, top: int) -> pa.Table:
    """The references of a set that can be rows of matches, with what is known of each pair."""
    unit = unit_vectors(vectors_of(extractions), [f"extraction {rank}" for rank in extractions["rank"].to_pylist()])
    nearest = bank.nearest(unit, top)
    quality = np.array(extractions["pdq_quality"].fill_null(-1).to_pylist(), np.int64)
    given = [one if one is not None else bytes(32) for one in extractions["pdq"].to_pylist()]
    quality[extractions["pdq"].is_null().to_numpy()] = -1
    hashes = np.frombuffer(b"".join(given), np.uint8).reshape(-1, 32)
    telling = np.flatnonzero(quality >= MIN_QUALITY)
    hashed, alike, _ = bank.within(hashes[telling], MATCH_DISTANCE)
    pairs = dict(zip(zip(nearest.query.tolist(), nearest.row.tolist(), strict=True), nearest.similarity, strict=True))
    for query, row in zip(telling[hashed].tolist(), alike.tolist(), strict=True):
        if (query, row) not in pairs:
            pairs[query, row] = bank.cosines(unit[query], np.array([row]))[0]
    queries, rows = np.array(list(pairs), np.int64).reshape(-1, 2).T
    distance = np.bitwise_count(packed(hashes)[queries] ^ bank.hashes[rows]).sum(axis=1, dtype=np.int32)
    unknown = (quality[queries] < MIN_QUALITY) | (bank.quality[rows] < MIN_QUALITY)
    side = bank.side[rows]
    return pa.table(
        [
            extractions["audit_id"].take(pa.array(queries)), extractions["rank"].take(pa.array(queries)),
            pa.array([name] * len(rows), pa.string()), bank.ids.take(pa.array(rows)),
            pa.array(list(pairs.values()), pa.float64()), pa.array(distance, mask=unknown),
            pa.array((side >= 0) & (side < input_size)),
        ],
        schema=_CANDIDATES,
    )  # fmt: skip
