"""Similarities beside the backgrounds: by the book, of the right backgrounds, and without a say in verdicts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from audit.references.audits import match_audit, match_audits
from audit.references.normalized import NEAREST
from audit.workspace import Workspace
from tests.references.test_index import of_kind, put, unit

AUDITS = ("a" * 32, "b" * 32)
VECTORS = of_kind("spread", np.random.default_rng(4), 200, 16)
DRAWN = unit(VECTORS[:6] + np.random.default_rng(5).normal(0, 0.05, (6, 16)))


@pytest.fixture
def asked(workspace: Workspace) -> Workspace:
    """A set "big", and two audits with three extractions each."""
    put(workspace, VECTORS)
    now = datetime.now(UTC)
    for number, audit in enumerate(AUDITS):
        workspace.write("audits", audit, [{"audit_id": audit, "descriptor": "d", "threshold": 0.7, "finished_at": now}])
        rows = [{"audit_id": audit, "rank": rank + 1, "descriptor": DRAWN[3 * number + rank]} for rank in range(3)]
        workspace.write("extractions", audit, rows)
    return workspace


def background(workspace: Workspace, name: str, vectors: np.ndarray, decoys_of: list[str] | None = None) -> None:
    rows: list[dict[str, Any]] = [
        {"reference_set": name, "reference_id": f"{name}{number}", "name": f"{number}", "descriptor_name": "d",
         "descriptor": vector, "kind": "background", "decoys_of": decoys_of, "added_at": datetime.now(UTC)}
        for number, vector in enumerate(vectors)
    ]  # fmt: skip
    workspace.write("references", f"{name}.d", rows)


def rows_of(workspace: Workspace) -> list[dict[str, Any]]:
    match_audits(workspace, AUDITS, ["big"])
    return workspace.rows("SELECT * FROM matches ORDER BY audit_id, rank, position")


def test_it_is_the_cosine_less_the_mean_of_the_nearest_of_the_backgrounds(asked: Workspace) -> None:
    plain = rows_of(asked)
    others = of_kind("spread", np.random.default_rng(8), 50, 16)
    background(asked, "one", others[:30])
    background(asked, "two", others[30:], ["big", "more"])
    background(asked, "not_for_it", VECTORS[:20], ["more"])
    rows = rows_of(asked)
    by_hand = np.sort(DRAWN.astype(float) @ others.astype(float).T, axis=1)[:, -NEAREST:].mean(axis=1)
    for row in rows:
        number = 3 * AUDITS.index(row["audit_id"]) + row["rank"] - 1
        assert row["normalized_similarity"] == pytest.approx(row["similarity"] - by_hand[number], abs=1e-6)
    assert [row | {"normalized_similarity": None} for row in rows] == plain
    assert {row["normalized_similarity"] for row in plain} == {None}


def test_of_too_few_nothing_is_said(asked: Workspace) -> None:
    background(asked, "one", VECTORS[: NEAREST - 1] * -1)
    background(asked, "other", VECTORS[:50], ["more"])
    assert {row["normalized_similarity"] for row in rows_of(asked)} == {None}


def test_an_audit_without_extractions_has_no_rows(asked: Workspace) -> None:
    background(asked, "one", VECTORS[:30] * -1)
    asked.write("extractions", AUDITS[0], [])
    match_audit(asked, AUDITS[0], ["big"])
    assert asked.rows("SELECT * FROM matches") == []
