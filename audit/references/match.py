"""Match extractions with reference sets: the index finds candidates, one SQL statement judges them."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa

from audit.descriptors.pdq import MATCH_DISTANCE, MIN_QUALITY
from audit.references.index import Bank
from audit.references.index.bank import unit_vectors
from audit.references.index.hashes import packed
from audit.references.parts import Parts
from audit.references.silence import Rule, plain_rules, tables_of
from audit.sampling.spooled import vectors_of
from audit.schemas import MATCHES, VECTOR

_NO_CONTROL = pa.schema([("audit_id", pa.string()), ("descriptor", VECTOR)]).empty_table()
TOP = 3  # references that are kept of each extraction
MOST_HASHES = 100  # beside, of those whose hash is alike: the nearest
AT_ONCE = 8192  # extractions: each block of references is read once for all of them

# A match needs the descriptor; PDQ corroborates it. PDQ alone is shown to a reviewer and never counts. An extraction
# speaks for its nearest reference only: a picture that looks like the one that was copied is not accused with it. Nor
# is one that the base alone draws as near: as near as the extraction, or as the threshold. The threshold was found for
# whole pictures: where a part alone reaches it, that is possible at most, and takes no match from another reference.
_SQL = """
WITH placed AS (
    SELECT *, row_number() OVER (
        PARTITION BY audit_id, rank, reference_set ORDER BY similarity DESC, reference_id
    ) AS position, row_number() OVER (
        PARTITION BY audit_id, rank, reference_set ORDER BY whole_similarity DESC, reference_id
    ) AS whole_position, row_number() OVER (
        PARTITION BY audit_id, rank, reference_set ORDER BY pdq_distance NULLS LAST, reference_id
    ) AS hash_position
    FROM candidates JOIN rules USING (reference_set) LEFT JOIN allowed USING (reference_set, reference_id)
), judged AS (
    SELECT *, CASE WHEN allowed_by IS NOT NULL THEN 'none'
        WHEN whole_similarity >= threshold AND whole_position = 1
            AND NOT coalesce(whole_control >= least(whole_similarity, control_threshold), false)
            THEN CASE WHEN is_small THEN 'possible' ELSE 'match' END
        WHEN similarity < threshold OR position > 1 THEN 'none'
        WHEN coalesce(control_similarity >= least(similarity, control_threshold), false) THEN 'none'
        ELSE 'possible' END AS verdict FROM placed
)
SELECT audit_id, rank, reference_set, reference_id, position, similarity, pdq_distance,
    verdict = 'match' AS is_match, verdict,
    CASE WHEN similarity >= threshold AND coalesce(pdq_distance <= bits, false) THEN 'both'
        WHEN similarity >= threshold THEN 'descriptor'
        WHEN coalesce(pdq_distance <= bits, false) THEN 'pdq'
        ELSE 'none' END AS evidence, control_similarity, allowed_by,
    NULL AS inliers, NULL AS coverage, NULL AS mirrored,
    NULL AS normalized_similarity, part, CASE WHEN has_parts THEN whole_similarity END AS whole_similarity
FROM judged WHERE position <= $top OR (has_parts AND whole_position = 1 AND verdict <> 'none')
    OR (hash_position <= $most AND coalesce(pdq_distance <= bits, false))
ORDER BY audit_id, rank, position
"""
_CANDIDATES = pa.schema(
    [
        ("audit_id", pa.string()), ("rank", pa.int32()), ("reference_set", pa.string()), ("reference_id", pa.string()),
        ("similarity", pa.float64()), ("pdq_distance", pa.int32()), ("is_small", pa.bool_()),
        ("control_similarity", pa.float64()), ("whole_similarity", pa.float64()), ("whole_control", pa.float64()),
        ("part", pa.list_(pa.float64())), ("has_parts", pa.bool_()),
    ]
)  # fmt: skip


def match_extractions(
    connection: duckdb.DuckDBPyConnection,
    extractions: pa.Table,
    banks: dict[str, Bank],
    threshold: float,
    input_size: int = 0,
    top: int = TOP,
    control: pa.Table | None = None,
    rules: dict[str, Rule] | None = None,
    parts: dict[str, Parts] | None = None,
) -> pa.Table:
    """The matches table's rows: the ``top`` nearest references of each extraction and set, and PDQ matches: the
    MOST_HASHES nearest.

    ``extractions`` has the schema of that table, and may be those of many audits; ``banks`` are the references of each
    set, by the extractions' descriptor. References with a side below ``input_size`` pixels, the descriptor's own, have
    been enlarged to be described, which makes small pictures alike: they are possible at most. ``control`` are the
    audits' control generations, audit_id and descriptor: what they draw as well is none. ``rules`` say of each set by
    what it is matched, else the threshold; ``parts`` has those of the sets that are described in parts. Raises
    ReferenceSetError for vectors of another width.
    """
    drawn = _by_audit(_NO_CONTROL if control is None else control)
    found = [
        candidates(extractions.slice(start, AT_ONCE), name, bank, input_size, top, drawn, (parts or {}).get(name))
        for name, bank in banks.items()
        for start in range(0, extractions.num_rows, AT_ONCE)
    ]
    parameters = {"top": top, "most": MOST_HASHES}
    connection.register("candidates", pa.concat_tables(found or [_CANDIDATES.empty_table()]))
    for name, table in tables_of(rules or plain_rules(list(banks), threshold)).items():
        connection.register(name, table)
    return connection.sql(_SQL, params=parameters).to_arrow_table().cast(MATCHES)


def _by_audit(control: pa.Table) -> dict[str, np.ndarray]:
    """The vectors of control generations, float32 [M, D], of each audit."""
    audits = control["audit_id"].to_numpy(zero_copy_only=False)
    return {one: vectors_of(control.filter(pa.array(audits == one))) for one in dict.fromkeys(audits.tolist())}


def candidates(
    extractions: pa.Table, name: str, bank: Bank, input_size: int, top: int, drawn: dict[str, np.ndarray],
    parts: Parts | None = None,
) -> pa.Table:  # fmt: skip
    """The references of a set that can be rows of matches, with what is known of each pair.

    ``drawn`` are the vectors of control generations, of each audit that has some.
    """
    unit = unit_vectors(vectors_of(extractions), [f"extraction {rank}" for rank in extractions["rank"].to_pylist()])
    nearest = bank.nearest(unit, top)
    quality = np.array(extractions["pdq_quality"].fill_null(-1).to_pylist(), np.int64)
    given = [one if one is not None else bytes(32) for one in extractions["pdq"].to_pylist()]
    quality[extractions["pdq"].is_null().to_numpy()] = -1
    hashes = np.frombuffer(b"".join(given), np.uint8).reshape(-1, 32)
    telling = np.flatnonzero(quality >= MIN_QUALITY)
    hashed, alike, _ = bank.within(hashes[telling], MATCH_DISTANCE)
    pairs = dict(zip(zip(nearest.query.tolist(), nearest.row.tolist(), strict=True), nearest.similarity, strict=True))
    more = [(telling[hashed], alike), *([parts.nearest(unit, top)] if parts else [])]
    for query, row in (pair for pairing in more for pair in zip(*(one.tolist() for one in pairing), strict=True)):
        if (query, row) not in pairs:
            pairs[query, row] = bank.cosines(unit[query], np.array([row]))[0]
    queries, rows = np.array(list(pairs), np.int64).reshape(-1, 2).T
    distance = np.bitwise_count(packed(hashes)[queries] ^ bank.hashes[rows]).sum(axis=1, dtype=np.int32)
    unknown = (quality[queries] < MIN_QUALITY) | (bank.quality[rows] < MIN_QUALITY)
    side, audits = bank.side[rows], extractions["audit_id"].take(pa.array(queries))
    whole, control = np.array(list(pairs.values()), float), _control_similarity(audits, rows, bank, drawn)
    best, highest = whole, control
    boxes: pa.Array = pa.nulls(len(rows), pa.list_(pa.float64()))
    if parts:
        cosines = parts.cosines(unit[queries], rows)
        best, highest = np.fmax(whole, cosines.max(axis=1)), np.fmax(control, _part_control(audits, rows, parts, drawn))
        which = np.where(best > whole, cosines.argmax(axis=1), -1)
        boxes = pa.array([list(parts.boxes[one]) if one >= 0 else None for one in which], pa.list_(pa.float64()))
    return pa.table(
        [
            audits, extractions["rank"].take(pa.array(queries)),
            pa.array([name] * len(rows), pa.string()), bank.ids.take(pa.array(rows)),
            pa.array(best, pa.float64()), pa.array(distance, mask=unknown),
            pa.array((side >= 0) & (side < input_size)), pa.array(highest, mask=np.isnan(highest)),
            pa.array(whole, pa.float64()), pa.array(control, mask=np.isnan(control)), boxes,
            pa.array([parts is not None] * len(rows), pa.bool_()),
        ],
        schema=_CANDIDATES,
    )  # fmt: skip


def _control_similarity(
    audits: pa.ChunkedArray, rows: np.ndarray, bank: Bank, drawn: dict[str, np.ndarray]
) -> np.ndarray:
    """The highest cosine of each row to a control generation of the audit beside it; NaN for audits without any."""
    names, found = audits.to_numpy(), np.full(len(rows), np.nan)
    for one, vectors in drawn.items():
        mine = np.flatnonzero(names == one)
        if len(mine):
            found[mine] = (bank.vectors[rows[mine]] @ vectors.T).max(axis=1)
    return found


def _part_control(
    audits: pa.ChunkedArray, rows: np.ndarray, parts: Parts, drawn: dict[str, np.ndarray]
) -> np.ndarray:  # fmt: skip
    """The same of the parts of each row."""
    names, found = audits.to_numpy(), np.full(len(rows), np.nan)
    for one, vectors in drawn.items():
        mine = np.flatnonzero(names == one)
        found[mine] = parts.best(vectors, rows[mine])
    return found
