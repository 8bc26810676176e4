"""``nearest`` in SQL: what the index finds, and nothing that the statement could smuggle in."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import duckdb
import numpy as np
import pytest

from audit.errors import WorkspaceError
from audit.references.nearest import Call, answered, calls_of
from audit.workspace import Workspace
from tests.references.test_index import of_kind, put


@pytest.fixture
def asked(workspace: Workspace) -> Workspace:
    """Two sets of 300 references, and two audits, of which the first has extractions that are references of "big"."""
    vectors = of_kind("spread", np.random.default_rng(4), 300, 32)
    put(workspace, vectors)
    put(workspace, vectors[:5], "other")
    now = datetime.now(UTC)
    for number, audit in enumerate(("a" * 32, "b" * 32)):
        workspace.write("audits", audit, [{"audit_id": audit, "descriptor": "d", "threshold": 0.7, "finished_at": now}])
        rows = [{"audit_id": audit, "rank": rank + 1, "descriptor": vectors[rank + 10 * number], "pdq": bytes(32),
                 "pdq_quality": 90} for rank in range(3)]  # fmt: skip
        workspace.write("extractions", audit, rows)
    return workspace


def test_neighbours_join_with_what_else_there_is(asked: Workspace) -> None:
    rows = answered(
        asked,
        """WITH close AS (SELECT * FROM nearest('big', 2, 'aa'))
        SELECT c.*, r.name FROM close AS c JOIN "references" AS r USING (reference_set, reference_id)
        ORDER BY rank, position""",
    ).to_pylist()
    assert [(row["rank"], row["position"]) for row in rows] == [(rank, at) for rank in (1, 2, 3) for at in (1, 2)]
    firsts = [row for row in rows if row["position"] == 1]
    assert [row["name"] for row in firsts] == ["0", "1", "2"]
    assert all(row["similarity"] == pytest.approx(1, abs=1e-6) and row["pdq_distance"] > 60 for row in firsts)
    assert {row["audit_id"] for row in rows} == {"a" * 32}


def test_several_calls_have_their_own_rows(asked: Workspace) -> None:
    sql = """SELECT (SELECT count(*) FROM nearest('big')), (SELECT count(*) FROM NEAREST('big', 5, 'b')),
        (SELECT count(*) FROM nearest('other', 5)), (SELECT count(*) FROM nearest('big', 1, 'c'))"""
    [row] = answered(asked, sql).to_pylist()
    assert list(row.values()) == [2 * 3 * 3, 3 * 5, 2 * 3 * 5, 0]


def test_the_word_alone_is_no_call(asked: Workspace) -> None:
    for sql in ("SELECT 'nearest(''big'')' AS nearest", "SELECT 1 AS nearest -- nearest('big')"):
        assert answered(asked, sql).num_rows == 1


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("SELECT * FROM nearest('none')", "there is no reference set 'none'"),
        ("SELECT * FROM nearest('big'' OR 1=1 --')", "there is no reference set"),
        ("SELECT * FROM nearest('big', 0)", "from 1 to 1000"),
        ("SELECT * FROM nearest('big', 1001)", "from 1 to 1000"),
        ("SELECT * FROM nearest('big', -1)", "from 1 to 1000|constants alone"),
        ("SELECT * FROM nearest('big', '1; DROP')", "from 1 to 1000"),
        ("SELECT * FROM nearest('b' || 'ig')", "constants alone"),
        ("SELECT * FROM nearest()", "takes a set"),
        ("SELECT * FROM nearest('big', 1, 'a', 2)", "takes a set"),
        ("SELECT * FROM nearest('big', asked_top := 4)", "takes a set"),
        ("SELECT * FROM nearest(NULL)", "constants alone"),
        (" UNION ALL ".join(f"SELECT * FROM nearest('big', {n + 1})" for n in range(17)), "in 17 ways"),
    ],
)
def test_what_cannot_be_asked_is_said(asked: Workspace, sql: str, why: str) -> None:
    with pytest.raises(WorkspaceError, match=why):
        answered(asked, sql)


def test_too_many_rows_are_refused(asked: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.references.nearest.MOST_ROWS", 17)
    with pytest.raises(WorkspaceError, match="would have 18 rows"):
        answered(asked, "FROM nearest('big')")


def test_no_file_is_reached_and_wrong_sql_is_duckdb_s_error(asked: Workspace) -> None:
    for sql in ("SELECT * FROM nearest('big') JOIN read_csv('/etc/passwd') ON true", "SELECT nearest FROM WHERE"):
        with pytest.raises(duckdb.Error):
            answered(asked, sql)


def test_arguments_as_duckdb_1_writes_them_are_read() -> None:
    class Old:
        """The answer of DuckDB 1.2's json_serialize_sql, shortened."""

        def execute(self, *_: object) -> Old:
            return self

        def fetchall(self) -> list[list[str]]:
            given = [{"type": "VALUE_CONSTANT", "value": {"is_null": False, "value": one}} for one in ("big", 7)]
            function = {"type": "TABLE_FUNCTION", "function": {"function_name": "nearest", "children": given}}
            return [[json.dumps({"error": False, "statements": [function]})]]

    assert calls_of(Old(), "") == [Call("big", 7)]  # type: ignore[arg-type]
