"""Damaged files cost their own rows, are named, and stop nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import WorkspaceError
from audit.workspace import Workspace, compaction
from audit.workspace.manifest import Manifest

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "other": lambda content: b"<html>" * 100,
    "changed": lambda content: content[:30] + bytes([content[30] ^ 1]) + content[31:],
}


def fill(workspace: Workspace) -> None:
    for number in range(4):
        workspace.append("failures", [{"audit_id": f"a{number}"}])


def ids(workspace: Workspace) -> list[str]:
    return [one["audit_id"] for one in workspace.rows("SELECT audit_id FROM failures ORDER BY 1")]


def damage(workspace: Workspace, pattern: str, how: str) -> Path:
    path = sorted(workspace.root.glob(pattern))[0]
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    return path


def verify(workspace: Workspace) -> tuple[int, list[dict[str, str]]]:
    done = CliRunner().invoke(app, ["verify", "--json", "--workspace", str(workspace.root)])
    return done.exit_code, json.loads(done.stdout)["problems"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_loose_file_costs_its_own_rows_and_is_named(
    workspace: Workspace, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(workspace)
    path = damage(workspace, "tables/failures/loose/*.parquet", how)
    key = str(path.relative_to(workspace.root))
    assert ids(workspace) == ["a1", "a2", "a3"]
    assert key in caplog.text
    assert Workspace(workspace.root).compact("failures") == 3  # a process that does not know of it yet
    assert ids(workspace) == ["a1", "a2", "a3"]
    workspace.append("failures", [{"audit_id": "a4"}])
    compaction.compact(workspace.table("failures"), force=True)
    assert ids(workspace) == ["a1", "a2", "a3", "a4"]
    assert path.exists()
    code, problems = verify(workspace)
    assert code == 1
    assert [one["where"] for one in problems] == [key]
    workspace.compact("failures", drop_damaged=True)
    workspace.vacuum("failures", 0.0)
    assert not path.exists()
    assert verify(workspace) == (0, [])
    assert ids(workspace) == ["a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_merged_file_stops_merges_until_it_is_put_back_or_given_up(
    workspace: Workspace, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(workspace)
    workspace.compact("failures")
    [merged] = workspace.root.glob("tables/failures/merged/*.parquet")
    good = merged.read_bytes()
    damage(workspace, "tables/failures/merged/*.parquet", how)
    workspace.append("failures", [{"audit_id": "b"}])
    workspace.write("failures", "k", [{"audit_id": "c"}])
    assert ids(workspace) == ["b", "c"]
    assert workspace.compact("failures") == 0
    assert "nothing is merged" in caplog.text
    code, problems = verify(workspace)
    assert (code, [one["where"] for one in problems]) == (1, [str(merged.relative_to(workspace.root))])
    merged.write_bytes(good)
    again = Workspace(workspace.root)
    assert ids(again) == ["a0", "a1", "a2", "a3", "b", "c"]
    damage(workspace, "tables/failures/merged/*.parquet", how)
    again = Workspace(workspace.root)
    again.compact("failures", drop_damaged=True)
    assert ids(again) == ["b", "c"]
    assert verify(again) == (0, [])


def test_a_merged_file_that_is_gone_is_named(workspace: Workspace) -> None:
    fill(workspace)
    workspace.compact("failures")
    [merged] = workspace.root.glob("tables/failures/merged/*.parquet")
    merged.unlink()
    assert ids(workspace) == []
    code, problems = verify(workspace)
    assert code == 1
    assert problems[0]["problem"].startswith("it is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": 1}', b"null"])
def test_a_damaged_newest_manifest_loses_nothing(workspace: Workspace, content: bytes) -> None:
    for part in range(3):
        fill(workspace)
        compaction.compact(workspace.table("failures"))
        workspace.vacuum("failures", 0.0)
        path = sorted((workspace.root / "tables/failures/manifest").iterdir())[-1]
        before = ids(workspace)
        path.write_bytes(content)
        again = Workspace(workspace.root)
        assert ids(again) == before == sorted([f"a{n}" for n in range(4)] * (part + 1))
        again.vacuum("failures", 0.0)
        assert ids(again) == before
        code, problems = verify(again)
        assert code == 1
        assert str(path.relative_to(workspace.root)) in {one["where"] for one in problems}
        workspace = again
    for path in (workspace.root / "tables/failures/manifest").iterdir():
        path.write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"no manifest in .* can be read"):
        ids(Workspace(workspace.root))


def test_a_manifest_with_a_changed_bit_is_not_believed(workspace: Workspace) -> None:
    fill(workspace)
    workspace.compact("failures")
    path = sorted((workspace.root / "tables/failures/manifest").iterdir())[-1]
    text = path.read_text()
    path.write_text(text.replace('"rows": 4', '"rows": 5'))
    assert path.read_text() != text
    again = Workspace(workspace.root)
    assert not isinstance(again.table("failures").load(2), Manifest)
    assert ids(again) == ["a0", "a1", "a2", "a3"]


def test_a_removal_that_cannot_be_read_is_named_and_waits(workspace: Workspace) -> None:
    fill(workspace)
    workspace.remove_where("failures", "audit_id", "a1")
    [path] = workspace.root.glob("tables/failures/loose/*.where")
    good = path.read_bytes()
    path.write_bytes(b"")
    again = Workspace(workspace.root)
    assert ids(again) == ["a0", "a1", "a2", "a3"]
    again.compact("failures")
    code, problems = verify(again)
    assert (code, [one["where"] for one in problems]) == (1, [str(path.relative_to(workspace.root))])
    path.write_bytes(good)
    assert ids(Workspace(workspace.root)) == ["a0", "a2", "a3"]


@pytest.mark.parametrize("name", ["notes.txt", "x.parquet", "a~1-2.parquet", "~.parquet", "99999999999999999999"])
def test_foreign_files_count_for_nothing(workspace: Workspace, name: str) -> None:
    fill(workspace)
    for folder in ("loose", "merged", "manifest", "clock", ""):
        place = workspace.root / "tables/failures" / folder
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(b"x")
    (workspace.root / "tables/failures/loose/folder").mkdir()
    again = Workspace(workspace.root)
    assert ids(again) == ["a0", "a1", "a2", "a3"]
    again.append("failures", [{"audit_id": "a4"}])
    again.compact("failures")
    again.vacuum("failures", 0.0)
    assert ids(again) == ["a0", "a1", "a2", "a3", "a4"]


def test_a_storage_that_does_not_answer_is_not_taken_for_damage(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(workspace)
    from audit.workspace import table

    def away(*arguments: Any, **options: Any) -> None:
        raise OSError(24, "Too many open files")

    damage(workspace, "tables/failures/loose/*.parquet", "empty")
    monkeypatch.setattr(table.pa, "OSFile", away)
    with pytest.raises(WorkspaceError, match="Too many open files"):
        ids(workspace)
    monkeypatch.undo()
    assert ids(workspace) == ["a1", "a2", "a3"]
