"""The hash of a row is what docs/custody.md says: by another program of a few lines, it comes out the same."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pyarrow as pa
import pytest

from audit.custody.record import _cells, canonical, record_of
from audit.schemas import KEY_COLUMNS, TABLES
from tests.custody.conftest import ID, Report


def by_the_book(row: dict[str, Any]) -> str:
    """The hash as the document describes it."""

    def said(value: Any) -> Any:
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()
        if isinstance(value, datetime):
            return value.strftime("%Y-%m-%dT%H:%M:%S.%f+00:00")
        if isinstance(value, list) and value and isinstance(value[0], float):
            return hashlib.sha256(b"".join(struct.pack("<d", one) for one in value)).hexdigest()
        if isinstance(value, list):
            return [said(one) for one in value]
        if isinstance(value, dict):
            return {name: said(one) for name, one in value.items() if one is not None}
        return value

    text = json.dumps({name: said(value) for name, value in row.items() if value is not None},
                      sort_keys=True, separators=(",", ":"))  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()


def test_every_row_of_an_audit_has_the_hash_that_the_document_describes(made: Report) -> None:
    lines = [json.loads(line) for line in made.rows.read_text().splitlines()]
    for table in KEY_COLUMNS:
        by_set = "reference_set" in TABLES[table].names
        rows = made.workspace.rows(f"SELECT * FROM {table} WHERE audit_id = ?", [ID])
        rows = [row for row in rows if not by_set or row["reference_set"] == "mine"]
        assert sorted(line[-1] for line in lines if line[0] == table) == sorted(map(by_the_book, rows)), table


def test_a_table_s_hash_is_that_of_its_lines(made: Report) -> None:
    document = json.loads(made.manifest.read_bytes())
    for table, said in document["predicate"]["tables"].items():
        lines = [line for line in made.rows.read_text().splitlines(keepends=True) if line.startswith(f'["{table}"')]
        assert lines == sorted(lines)
        assert said == {"rows": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    whole = hashlib.sha256(made.rows.read_bytes()).hexdigest()
    assert document["subject"][1]["digest"]["sha256"] == whole


VECTORS = [[0.1, -2.5e-8], None, [], [float("nan"), float("inf")], [1.0]]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_vectors_are_the_same_by_the_quick_way(kind: pa.DataType) -> None:
    column = pa.array(VECTORS, pa.list_(kind))
    slow = [canonical(value) for value in column.to_pylist()]
    assert _cells(column) == slow
    assert _cells(column.slice(2, 3)) == slow[2:]
    assert _cells(pa.array([[0.5, None], [0.5, 0.5]], pa.list_(kind))) == [
        ["0x1.0000000000000p-1", None], canonical([0.5, 0.5]),
    ]  # fmt: skip


def test_values_that_look_alike_have_other_forms() -> None:
    told = [
        0.1,
        math.nextafter(0.1, 1),
        0.0,
        -0.0,
        0,
        False,
        "0",
        "",
        None,
        float("nan"),
        float("inf"),
        b"",
        b"\0",
        [],
        [0.0],
    ]
    forms = [json.dumps(canonical(one)) for one in told]
    assert len(set(forms)) == len(forms)
    there = datetime(2026, 1, 1, 13, tzinfo=timezone(timedelta(hours=1)))
    assert canonical(there) == canonical(datetime(2026, 1, 1, 12, tzinfo=UTC)) == "2026-01-01T12:00:00.000000+00:00"


def test_a_column_that_comes_later_leaves_older_rows_as_they_are(made: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    new = TABLES["extractions"].append(pa.field("x0_estimate", pa.float64(), metadata={"doc": "new"}))
    monkeypatch.setitem(TABLES, "extractions", new)
    made.workspace.table("extractions").schema = new
    assert made.verify().agrees
    [row] = made.workspace.rows("SELECT * FROM extractions")
    made.workspace.write("extractions", ID, [row | {"x0_estimate": 0.5}])
    assert [one.part for one in made.differing()] == ["extractions 1"]


def test_sets_of_another_question_are_no_part_of_it(made: Report) -> None:
    other = made.workspace.asked(lambda connection: record_of(connection, ID, []))
    assert other.tables["matches"].lines == []
    assert [one.name for one in other.sets] == ["decoys"]
    assert len(other.tables["generations"].lines) == 3
