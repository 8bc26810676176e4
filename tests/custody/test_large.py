"""Pages about sets that are too large to be read for each page: what they rest on is bound all the same."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from audit.custody import record
from audit.references import ReferenceSets
from audit.references.index import store
from audit.report import collect
from audit.report.page import render
from audit.workspace import Workspace
from tests.custody.conftest import ID, Report


@pytest.fixture
def large(made: Report, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Sets of two pictures count as large ones; the page is written once."""
    monkeypatch.setattr(store, "LARGE", 2)
    return Report(made.workspace, made.pictures, made.checkpoint, f"reports/{made.write().rpartition('/')[2]}")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables of sets that are read row by row from now on."""
    found: list[str] = []
    inner = record._lines

    def noted(connection: Any, table: str, *rest: Any) -> list[str]:
        if table in record.OF_SETS:
            found.append(table)
        return inner(connection, table, *rest)

    monkeypatch.setattr(record, "_lines", noted)
    return found


def test_a_second_page_reads_no_set_and_says_the_same(large: Report, read: list[str]) -> None:
    before = large.manifest.read_bytes()
    assert large.write().endswith(large.page)
    assert (read, large.manifest.read_bytes()) == ([], before)
    assert not large.differing()
    assert read  # verify reads what a page is said to rest on


def test_a_set_that_was_changed_is_read_again(large: Report, read: list[str]) -> None:
    name = large.manifest.read_text()
    row = {"reference_set": "mine", "reference_id": "7" * 64, "name": "late.png", "kind": "reference",
           "descriptor_name": "nano@1", "descriptor": [0.0, 1.0], "added_at": datetime.now(UTC)}  # fmt: skip
    large.workspace.write("references", "mine.2", [row])
    facts = collect(large.workspace, ID, ["mine"])
    assert read.count("references") == 1  # and the decoys are as they were
    assert facts.pictures == 3
    assert facts.record.sets[-1].sha256 not in name


def test_a_row_that_was_tampered_with_differs_though_a_page_was_written_since(large: Report) -> None:
    large.rewrite("references", lambda row: row | {"descriptor": [0.5, 0.5]})
    large.write()
    assert {one.part.split()[0] for one in large.differing()} >= {"references"}


def test_a_list_that_has_gone_is_written_again(large: Report) -> None:
    lists = sorted((large.workspace.root / "reports/pictures").iterdir())
    content = [one.read_bytes() for one in lists]
    for one in lists:
        one.unlink()
    large.write()
    assert [one.read_bytes() for one in lists] == content


def test_the_page_lists_what_is_nearest_and_says_how_many_others(large: Report) -> None:
    facts = collect(large.workspace, ID, ["mine"])
    [nearest] = facts.references
    html = render(facts)
    assert facts.as_json()["references"] == 2
    assert f"<code>{nearest.reference_id}</code>" in html
    assert "Of the 2 pictures that were compared, the 1 nearest" in html
    assert "and 1 more" in html
    assert next(one.sha256 for one in facts.record.sets if one.name == "mine") in html


def test_nothing_is_kept_of_a_set_that_was_removed(large: Report) -> None:
    folder = large.workspace.files.scratch / store.FOLDER
    kept = {one for one in folder.iterdir() if one.name.startswith(store.set_key("mine"))}
    assert len(kept) == 2  # of its pictures, and of its rows
    ReferenceSets(Workspace(large.workspace.root)).remove("mine")
    assert not {one for one in folder.iterdir() if one in kept}


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"sha256": "../../x"}', b"[" * 100_000])
def test_a_digest_that_is_none_is_worked_out_again(large: Report, read: list[str], damage: bytes) -> None:
    before = large.manifest.read_bytes()
    for one in (large.workspace.files.scratch / store.FOLDER).iterdir():
        one.write_bytes(damage)
    large.write()
    assert read
    assert large.manifest.read_bytes() == before
