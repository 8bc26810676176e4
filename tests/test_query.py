"""`lora-audit query`: every format holds every value, and the documentation's statements work on a real workspace."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer

from audit.cli import app
from audit.demo import set_folder
from audit.workspace import Workspace
from tests.conftest import BASE, KOHYA

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STATEMENTS = {
    f"{document.name}: {' '.join(sql.split())}": sql
    for document in DOCUMENTS
    for sql in re.findall(r'lora-audit query\s+"([^"]+)"', document.read_text())
}
CONDITIONS = {
    f"{document.name}: {where}": where
    for document in DOCUMENTS
    for where in re.findall(r'lora-audit catalog (?:\w+ )?--where "([^"]+)"', document.read_text())
}
SQL = """SELECT 1 AS a, 2 AS a, 3 AS a_1, 'ab'::BLOB AS bytes, {'inner': 'q'::BLOB} AS nested, 'NaN'::DOUBLE AS nan,
    ['inf'::DOUBLE, 1.5] AS list, 12::HUGEINT AS huge, 1.25::DECIMAL(5, 2) AS money, NULL AS nothing, TRUE AS yes,
    repeat('long ', 100) AS long, 'a,"b"' || chr(10) AS quoted, TIMESTAMPTZ '2026-05-01 10:00:00+00' AS moment"""
ROW: dict[str, Any] = {
    "a": 1, "a_2": 2, "a_1": 3, "bytes": "6162", "nested": {"inner": "71"}, "nan": None, "list": [None, 1.5],
    "huge": 12, "money": 1.25, "nothing": None, "yes": True, "long": "long " * 100, "quoted": 'a,"b"\n',
    "moment": "2026-05-01 10:00:00+00:00",
}  # fmt: skip


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a catalog, an audit and its matches."""
    folder = str(tmp_path_factory.mktemp("audited") / "w")
    app(["catalog", "add", str(KOHYA), "--workspace", folder], standalone_mode=False)
    code = app(
        ["scan", str(KOHYA), "--base", str(BASE), "--workspace", folder, "--steps", "8", "--descriptor", "nano",
         "--images-per-training-image", "4", "--device", "cpu", "--rule", "fixed", "--references",
         str(set_folder("fluent-animals", "train"))],
        standalone_mode=False,
    )  # fmt: skip
    assert code == 10
    known = str(set_folder("fluent-animals", "train"))
    app(["references", "add", "portfolio", known, "--descriptor", "nano", "--workspace", folder], standalone_mode=False)
    return Workspace(folder)


def ask(workspace: Workspace, capfd: pytest.CaptureFixture[Any], *arguments: str) -> Any:
    capfd.readouterr()
    app(["query", *arguments, "--workspace", str(workspace.root)], standalone_mode=False)
    return capfd.readouterr().out


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_documents_statements_answer(audited: Workspace, statement: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert json.loads(ask(audited, capfd, STATEMENTS[statement], "--json"))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_documents_conditions_are_understood(
    audited: Workspace, condition: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app(["catalog", "--where", CONDITIONS[condition], "--workspace", str(audited.root)], standalone_mode=False)


def test_the_documents_have_statements() -> None:
    assert STATEMENTS
    assert CONDITIONS


def test_json_has_every_value(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    for arguments in (["--json"], ["--format", "json"]):
        assert json.loads(ask(workspace, capfd, SQL, *arguments), parse_constant=refused) == [ROW]
    lines = ask(workspace, capfd, f"{SQL} UNION ALL {SQL}", "--format", "jsonl").splitlines()
    assert [json.loads(line, parse_constant=refused) for line in lines] == [ROW, ROW]


def test_csv_has_every_value_and_both_columns_of_a_name(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    names, row = csv.reader(io.StringIO(ask(workspace, capfd, SQL, "--format", "csv")))
    assert names == ["a", "a", *list(ROW)[2:]]
    assert row == [
        "1", "2", "3", "6162", '{"inner": "71"}', "", "[null, 1.5]", "12", "1.25", "", "true", "long " * 100,
        'a,"b"\n', "2026-05-01 10:00:00+00:00",
    ]  # fmt: skip
    assert ask(workspace, capfd, "SELECT rank, rank FROM matches", "--format", "csv") == "rank,rank\n"


def test_a_piped_table_is_not_cut(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    found = ask(workspace, capfd, SQL)
    heading = found.splitlines()[1]
    assert re.findall(r"\b(\w+)\b", heading) == ["a", "a", *list(ROW)[2:]]
    assert "long " * 100 in found
    assert "6162" in found


def test_parquet_is_a_file(workspace: Workspace, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    table = pq.read_table(io.BytesIO(ask(workspace, capfdbinary, SQL, "--format", "parquet")))
    assert table.column_names == list(ROW)
    assert table["bytes"].to_pylist() == [b"ab"]
    [vector] = pq.read_table(
        io.BytesIO(ask(workspace, capfdbinary, "SELECT [1.5::FLOAT] AS v", "--format", "parquet"))
    )["v"].to_pylist()
    assert vector == [1.5]


def test_formats_that_are_none_are_said(workspace: Workspace) -> None:
    for arguments, words in ((["--format", "xml"], "is not one of"), (["--format", "csv", "--json"], "contradict")):
        with pytest.raises(typer.BadParameter, match=words):
            app(["query", "SELECT 1", *arguments, "--workspace", str(workspace.root)], standalone_mode=False)
