"""How likely what speaks for each reference is by chance: a finished audit's references, among decoys.

Decoys are the pictures of the workspace's sets of kind background. Those that are copies of a reference are left out.
Where they are not of the kind of a set's references (audit/evidence/kind.py), nothing is said of that set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.descriptors.pdq import MIN_QUALITY
from audit.evidence.chance import FEWEST, TAIL_SHARE, combined_p, rank_p, tail_p
from audit.evidence.kind import FEATURES, kind_problem
from audit.sampling.spooled import vectors_of

BLOCK = 1024  # references at a time
WEIGHED = 'audits extractions "references" memberships'


@dataclass(frozen=True)
class _Decoys:
    """Unit vectors [M, D], cosines to the nearest extraction [M], membership scores [M] (NaN: none), looks [M, F]."""

    vectors: np.ndarray
    cosines: np.ndarray
    scores: np.ndarray
    looks: np.ndarray

    def without(self, some: np.ndarray) -> _Decoys:
        """Those that ``some``, booleans [M], are not true of."""
        return _Decoys(self.vectors[~some], self.cosines[~some], self.scores[~some], self.looks[~some])


@dataclass(frozen=True)
class _Weighed:
    """What an audit's references are weighed by: its row, its extractions, the references, and all decoys."""

    audit: dict[str, Any]
    extractions: pa.Table
    references: pa.Table
    decoys: _Decoys

    @property
    def seen(self) -> np.ndarray:
        """The extractions' unit vectors [K, D]; [0, 0] without any."""
        return _seen(self.extractions)

    def of(self, name: str) -> tuple[pa.Table, _Decoys]:
        """The references of the set ``name``, and the decoys that are no copies of them."""
        mine = self.references.filter(pc.equal(self.references["reference_set"], name))
        if not mine.num_rows:
            return mine, self.decoys
        copied = _copied(vectors_of(mine), self.decoys.vectors, self.audit["threshold"])
        return mine, self.decoys.without(copied)


def _seen(extractions: pa.Table) -> np.ndarray:
    return vectors_of(extractions) if extractions.num_rows else np.empty((0, 0), np.float32)


def _weighed(connection: duckdb.DuckDBPyConnection, audit_id: str, sets: Sequence[str]) -> _Weighed:
    def table(sql: str, *values: Any) -> pa.Table:
        return connection.sql(sql, params=list(values)).to_arrow_table()

    sql = "SELECT descriptor, threshold, descriptor_size FROM audits WHERE audit_id = ?"
    [audit] = table(sql, audit_id).to_pylist()
    extractions = table("SELECT rank, descriptor FROM extractions WHERE audit_id = ? ORDER BY rank", audit_id)
    references = table(
        """SELECT r.reference_set, r.reference_id, r.descriptor, r.look, r.pdq_quality, r.width, r.height, m.score
        FROM "references" AS r LEFT JOIN memberships AS m
        ON m.audit_id = ? AND m.reference_set = r.reference_set AND m.reference_id = r.reference_id
        WHERE r.descriptor_name = ? AND list_contains(?::VARCHAR[], r.reference_set)
        ORDER BY r.reference_set, r.reference_id""",
        audit_id, audit["descriptor"], list(sets),
    )  # fmt: skip
    others = table(
        """SELECT any_value(r.descriptor) AS descriptor, any_value(m.score) AS score, any_value(r.look) AS look
        FROM "references" AS r LEFT JOIN memberships AS m
        ON m.audit_id = ? AND m.reference_set = r.reference_set AND m.reference_id = r.reference_id
        WHERE r.kind = 'background' AND r.descriptor_name = ? AND r.reference_id NOT IN
            (SELECT reference_id FROM "references" WHERE list_contains(?::VARCHAR[], reference_set))
        GROUP BY r.reference_id ORDER BY r.reference_id""",
        audit_id, audit["descriptor"], list(sets),
    )  # fmt: skip
    return _Weighed(audit, extractions, references, _decoys(others, _seen(extractions)))


def weigh_in(connection: duckdb.DuckDBPyConnection, audit_id: str, sets: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the chances of the references of ``sets``, over a connection that sees the tables of ``WEIGHED``."""
    weighed = _weighed(connection, audit_id, sets)
    seen, ranks = weighed.seen, weighed.extractions["rank"].to_pylist()
    found: list[dict[str, Any]] = []
    for name in sets:
        mine, decoys = weighed.of(name)
        problem = kind_problem(_looks(mine), decoys.looks) if mine.num_rows else None
        for start in range(0, mine.num_rows, BLOCK):
            rows = _rows(mine.slice(start, BLOCK), seen, ranks, decoys, weighed.audit, problem)
            found += [{"audit_id": audit_id, **row} for row in rows]
    return found


def decoys_of(
    connection: duckdb.DuckDBPyConnection, audit_id: str, sets: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """What the decoys of each of ``sets`` have: cosines to the nearest extraction, and membership scores.

    They are those that chances were taken among: copies of a reference are left out, and what is not finite.
    """
    if not connection.sql("SELECT 1 FROM \"references\" WHERE kind = 'background' LIMIT 1").to_arrow_table().num_rows:
        return {}
    weighed, found = _weighed(connection, audit_id, sets), {}
    for name in sets:
        decoys = weighed.of(name)[1]
        cosines, scores = (one[np.isfinite(one)].astype(float).tolist() for one in (decoys.cosines, decoys.scores))
        found[name] = cosines, scores
    return found


def _decoys(table: pa.Table, seen: np.ndarray) -> _Decoys:
    if not table.num_rows:
        return _Decoys(np.empty((0, 0), np.float32), np.empty(0), np.empty(0), np.empty((0, FEATURES), np.float32))
    vectors = vectors_of(table)
    scores = table["score"].to_numpy(zero_copy_only=False).astype(float)
    cosines = (vectors @ seen.T).max(axis=1) if len(seen) else np.full(len(vectors), np.nan)
    return _Decoys(vectors, cosines, scores, _looks(table))


def _copied(references: np.ndarray, decoys: np.ndarray, threshold: float) -> np.ndarray:
    """Which decoys [M] are copies of one of the references."""
    found = np.zeros(len(decoys), bool)
    for start in range(0, len(references) if len(decoys) else 0, BLOCK):
        found |= (decoys @ references[start : start + BLOCK].T >= threshold).any(axis=1)
    return found


def _looks(table: pa.Table) -> np.ndarray:
    """[N, F]; NaN for pictures that were added before looks were taken."""
    none = [np.nan] * FEATURES
    return np.array([one or none for one in table["look"].to_pylist()], np.float32).reshape(-1, FEATURES)


def _rows(
    part: pa.Table, seen: np.ndarray, ranks: list[int], decoys: _Decoys, audit: dict[str, Any], problem: str | None
) -> list[dict[str, Any]]:
    vectors = vectors_of(part)
    cosines = vectors @ seen.T if len(seen) else np.full((len(vectors), 0), np.nan)
    rows = []
    for number, row in enumerate(part.drop_columns(["descriptor", "look"]).to_pylist()):
        best = int(cosines[number].argmax()) if len(seen) else None
        similarity = None if best is None else float(cosines[number, best])
        caveat = _caveat(row, audit["descriptor_size"] or 0)
        extraction_p, extraction_decoys = _p(similarity, decoys.cosines, problem)
        membership_p, membership_decoys = _p(row["score"], decoys.scores, problem)
        told = [one for one in (extraction_p, membership_p) if one is not None]
        rows.append(
            {
                "reference_set": row["reference_set"], "reference_id": row["reference_id"], "score": row["score"],
                "similarity": similarity, "rank": None if best is None else ranks[best],
                "extraction_p": extraction_p, "extraction_decoys": extraction_decoys,
                "membership_p": membership_p, "membership_decoys": membership_decoys,
                "p": combined_p(told) if told and caveat is None else None, "caveat": caveat, "uncalibrated": problem,
            }
        )  # fmt: skip
    return rows


def _p(value: float | None, of_decoys: np.ndarray, problem: str | None) -> tuple[float | None, int]:
    """The p of one reference's value among the decoys that have one, and how many they are."""
    decoys = of_decoys[np.isfinite(of_decoys)]
    if problem is not None or value is None or not np.isfinite(value) or len(decoys) < FEWEST:
        return None, len(decoys)
    values = np.array([value])
    p = float(rank_p(values, decoys)[0])
    return (float(tail_p(values, decoys)[0]) if p <= TAIL_SHARE else p), len(decoys)


def _caveat(row: dict[str, Any], input_size: int) -> str | None:
    """Why a picture does not count: nothing follows from its being like others."""
    quality = row["pdq_quality"]
    if quality is not None and quality < MIN_QUALITY:
        return f"there is too little in it to be told from others (PDQ quality {quality} of 100)"
    if row["width"] and row["height"] and min(row["width"], row["height"]) < input_size:
        return f"{row['width']} x {row['height']} pixels are less than the descriptor's {input_size}"
    return None
