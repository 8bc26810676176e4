"""Tables for other programs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import WorkspaceError
from audit.schemas import TABLES
from audit.workspace import Workspace
from audit.workspace.export import ExportFormat, export

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def filled(workspace: Workspace) -> Workspace:
    """Two extractions, one of them in a merged file, and an item of the catalog that has changed."""
    for number in range(2):
        row = {"audit_id": f"a{number}", "rank": 1, "members": [1, 2], "descriptor": [0.5, 1.0], "image": b"\x89P"}
        workspace.write("extractions", f"a{number}", [row])
        workspace.append("checkpoints", [{"item_id": "i", "title": 'a "title",\nof two lines', "seen_at": NOW}])
        workspace.compact("extractions")
    return workspace


def test_parquet_is_what_sql_sees(filled: Workspace, tmp_path: Path) -> None:
    for table in TABLES:
        place, rows = export(filled, table, ExportFormat.parquet, tmp_path)
        there = duckdb.sql(f"SELECT count(*) FROM '{place}'").fetchall()
        assert there == [(rows,)]
        assert rows == filled.rows(f'SELECT count(*) AS n FROM "{table}"')[0]["n"]
    found = duckdb.sql(f"SELECT audit_id, members FROM '{tmp_path}/extractions.parquet' ORDER BY 1").fetchall()
    assert found == [("a0", [1, 2]), ("a1", [1, 2])]
    with pytest.raises(WorkspaceError, match="is there already"):
        export(filled, "audits", ExportFormat.parquet, tmp_path)


def test_csv_has_json_hex_and_utc(filled: Workspace, tmp_path: Path) -> None:
    place, _ = export(filled, "extractions", ExportFormat.csv, tmp_path)
    with place.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["audit_id"] for row in rows] == ["a0", "a1"]
    assert json.loads(rows[0]["descriptor"]) == [0.5, 1.0]
    assert bytes.fromhex(rows[0]["image"]) == b"\x89P"
    place, _ = export(filled, "checkpoints", ExportFormat.csv, tmp_path)
    with place.open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["title"], row["seen_at"]) == ('a "title",\nof two lines', "2026-01-01T12:00:00+00:00")
    place, rows_written = export(filled, "audits", ExportFormat.csv, tmp_path)
    assert rows_written == 0
    assert place.read_text().startswith('"audit_id","checkpoint_sha256"')


def test_delta_tables_are_read_by_delta(filled: Workspace, tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    for table in TABLES:
        place, rows = export(filled, table, ExportFormat.delta, tmp_path)
        assert pa_rows(deltalake.DeltaTable(str(place))) == rows


def pa_rows(table: object) -> int:
    """Rows by the log of a Delta table."""
    import pyarrow as pa

    actions = pa.table(table.get_add_actions(flatten=True))  # type: ignore[attr-defined]
    return sum(actions["num_records"].to_pylist())


@pytest.mark.parametrize("kind", ExportFormat)
def test_a_damaged_file_costs_an_export_its_own_rows(filled: Workspace, tmp_path: Path, kind: ExportFormat) -> None:
    if kind is ExportFormat.delta:
        pytest.importorskip("deltalake")
    for number in range(3):
        filled.append("failures", [{"audit_id": str(number)}])
    path = sorted(filled.root.glob("tables/failures/loose/*.parquet"))[1]
    path.write_bytes(path.read_bytes()[:-20])
    place, rows = export(Workspace(filled.root), "failures", kind, tmp_path)
    assert rows == 2
    assert place.exists()
    assert [other.name for other in tmp_path.iterdir() if other.name.endswith(".part")] == []


def test_without_its_package_delta_is_refused_in_words(
    filled: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(WorkspaceError, match=r"lora-audit\[delta\]"):
        export(filled, "audits", ExportFormat.delta, tmp_path)


def test_the_command_writes_the_chosen_tables(filled: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", "from audit.cli import main; main()", "export", "--format", "csv", "--table", "matches",
         "--table", "extractions", "--json", "--workspace", str(filled.root), str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {name: one["rows"] for name, one in json.loads(done.stdout).items()} == {"matches": 0, "extractions": 2}
    assert sorted(path.name for path in out.iterdir()) == ["extractions.csv", "matches.csv"]


def test_the_documented_rule_reads_a_folder_directly(filled: Workspace) -> None:
    """The lines of docs/tables.md, before and after `lora-audit compact`."""
    text = (Path(__file__).parents[2] / "docs/tables.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("workspace/tables/audits", str(filled.root / "tables/extractions"))
    filled.write("extractions", "a1", [{"audit_id": "a1", "rank": 7}])  # takes the place of a merged row
    with pytest.raises(AssertionError, match="run 'lora-audit compact' first"):
        exec(code, {})
    done = CliRunner().invoke(app, ["compact", "--workspace", str(filled.root)])
    assert done.exit_code == 0
    names: dict[str, object] = {}
    exec(code, names)
    sql = f"SELECT audit_id, rank FROM read_parquet({names['files']}) ORDER BY 1"
    assert duckdb.sql(sql).fetchall() == [("a0", 1), ("a1", 7)]
