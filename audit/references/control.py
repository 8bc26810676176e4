"""References and the control generations of an audit: does the base alone draw a picture as well?

What it draws says nothing of fine-tuning: the base knows the picture, its motif is common, or the caption describes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa

from audit.sampling.spooled import vectors_of

BLOCK = 1024  # pictures at a time
LEAST = -1.0  # of all cosines


@dataclass(frozen=True)
class ControlGenerations:
    """The control generations of an audit: unit vectors [M, D], and their numbers [M]; none where there are none."""

    vectors: np.ndarray
    indices: np.ndarray

    def nearest(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For ``vectors`` [N, D] the highest cosine [N], NaN without control generations, and which has it [N]."""
        if not len(self.indices) or not len(vectors):
            return np.full(len(vectors), np.nan), np.full(len(vectors), -1)
        parts = [vectors[start : start + BLOCK] @ self.vectors.T for start in range(0, len(vectors), BLOCK)]
        best = np.concatenate([part.argmax(axis=1) for part in parts])
        return np.concatenate([part.max(axis=1) for part in parts]), self.indices[best]


def control_of(connection: duckdb.DuckDBPyConnection, audit_id: str) -> ControlGenerations:
    """Those of an audit, over a connection that sees their table."""
    rows: pa.Table = connection.sql(
        'SELECT "index", descriptor FROM control_generations WHERE audit_id = ? ORDER BY "index"', params=[audit_id]
    ).to_arrow_table()
    vectors = vectors_of(rows) if rows.num_rows else np.empty((0, 0), np.float32)
    return ControlGenerations(vectors, rows["index"].to_numpy())


def drawn_alone(similarity: np.ndarray, control: np.ndarray, threshold: float) -> np.ndarray:
    """Which pictures [N] the base alone draws as well: as near as the extractions, or as the ``threshold``.

    ``similarity`` and ``control`` are the cosines of the nearest extraction and control generation, NaN for none, of
    which nothing is said.
    """
    return control >= np.minimum(similarity, threshold)


def by_fine_tuning(similarity: np.ndarray, control: np.ndarray, threshold: float) -> np.ndarray:
    """``similarity`` [N], with the least cosine where the base alone draws the picture as well."""
    return np.where(drawn_alone(similarity, control, threshold), LEAST, similarity)
