"""The workspace: whole files or none, views, and what a query can reach."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.config import VerdictSettings
from audit.errors import WorkspaceError
from audit.files import whole_file
from audit.references.decoys import Questions
from audit.report.pages import page_key
from audit.schemas import TABLES
from audit.workspace import Workspace
from audit.workspace import compaction as storage

ROW = {"audit_id": "a", "kind": "training", "images": 3, "average_similarity": 0.5,
       "extraction_rate_07": 0.1, "extraction_rate_06": 0.2, "ceiling": 0.9}  # fmt: skip


def test_every_table_is_a_view_even_when_it_is_empty(workspace: Workspace) -> None:
    for name, schema in TABLES.items():
        assert workspace.rows(f'SELECT * FROM "{name}"') == []
        assert all(field.metadata[b"doc"] for field in schema), name


def test_rows_come_back_and_writing_again_replaces_them(workspace: Workspace) -> None:
    workspace.write("evaluations", "a.training", [ROW])
    workspace.write("evaluations", "a.training", [ROW | {"images": 4}])
    assert workspace.rows("SELECT images FROM evaluations") == [{"images": 4}]
    workspace.remove("evaluations", "a.training")
    assert workspace.rows("SELECT * FROM evaluations") == []


def test_a_workspace_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Workspace(tmp_path / "w")
    (tmp_path / "w/workspace.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(WorkspaceError, match="newer lora-audit"):
        Workspace(tmp_path / "w")
    (tmp_path / "w/workspace.json").write_text("{")
    with pytest.raises(WorkspaceError, match="damaged"):
        Workspace(tmp_path / "w")


def test_a_folder_of_other_things_is_not_taken_for_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="not empty"):
        Workspace(tmp_path)


@pytest.mark.parametrize("key", ["../x", "a/b", "", ".hidden", "x" * 200])
def test_keys_cannot_leave_the_workspace(workspace: Workspace, key: str) -> None:
    with pytest.raises(WorkspaceError):
        workspace.write("evaluations", key, [ROW])
    with pytest.raises(WorkspaceError):
        workspace.spool(key)
    with pytest.raises(WorkspaceError):
        page_key(key, [], [], Questions({}, False), VerdictSettings())


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_file(tmp_path / "out") as file:
            file.write(b"half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from audit.errors import WorkspaceError
from audit.workspace import Workspace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
workspace = Workspace(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    workspace.write("evaluations", "a", [dict(audit_id="a", kind="training", images=1)])
except WorkspaceError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w")], capture_output=True, text=True, check=True
    )
    assert "no disk space" in done.stdout
    assert [p.name for p in (tmp_path / "w").rglob("*") if p.is_file()] == ["workspace.json"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "COPY audits TO 'out.csv'",
        "ATTACH 'other.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
    ],
)
def test_queries_reach_nothing_but_the_tables(workspace: Workspace, sql: str) -> None:
    with pytest.raises(duckdb.Error):
        workspace.rows(sql)


def test_timestamps_are_utc(workspace: Workspace) -> None:
    now = datetime.now(UTC)
    row = {"checkpoint_sha256": "c", "seen_at": now}
    workspace.write("checkpoints", "c", [row])
    assert workspace.rows("SELECT seen_at FROM checkpoints")[0]["seen_at"] == now


def test_a_workspace_that_another_process_is_creating_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / ".abc.part").write_bytes(b"{")
    Workspace(tmp_path)
    assert (tmp_path / "workspace.json").is_file()


def item(name: str, second: int, state: str = "listed") -> dict[str, object]:
    return {"item_id": name, "state": state, "seen_at": datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC)}


def test_the_newest_row_of_an_item_holds_and_makes_its_captions_count(workspace: Workspace) -> None:
    caption = {"item_id": "a", "rank": 1, "caption": "old", "seen_at": item("a", 1)["seen_at"]}
    newer = caption | {"caption": "new", "seen_at": item("a", 2)["seen_at"]}
    workspace.append("captions", [caption])
    workspace.append("checkpoints", [item("a", 1), item("b", 1)])
    workspace.append("captions", [newer])  # a crawl killed here has not changed anything yet
    assert [row["caption"] for row in workspace.rows("SELECT * FROM captions")] == ["old"]
    workspace.append("checkpoints", [item("a", 2, "stored")])
    assert [row["caption"] for row in workspace.rows("SELECT * FROM captions")] == ["new"]
    found = workspace.rows("SELECT item_id, state FROM checkpoints ORDER BY 1")
    assert found == [{"item_id": "a", "state": "stored"}, {"item_id": "b", "state": "listed"}]
    newest = workspace.newest("checkpoints", "item_id", ["a", "b", "c"])
    assert {name: row["state"] for name, row in newest.items()} == {"a": "stored", "b": "listed"}


def test_rows_of_an_older_version_lack_a_column_and_stay(workspace: Workspace) -> None:
    for number in range(2):
        workspace.append("checkpoints", [item(f"i{number}", number)])
    for path in (workspace.root / "tables/checkpoints").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["tensor_rank", "claimed_rank"]), path)
    assert workspace.rows("SELECT DISTINCT tensor_rank FROM checkpoints") == [{"tensor_rank": None}]
    assert workspace.compact("checkpoints") == 2
    workspace.append("checkpoints", [item("i2", 2) | {"tensor_rank": 8}])
    found = workspace.rows("SELECT item_id, tensor_rank FROM checkpoints ORDER BY 1")
    assert [row["tensor_rank"] for row in found] == [None, None, 8]


def test_many_small_files_become_few_without_losing_a_row(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MOST_LOOSE", 4)
    monkeypatch.setattr(storage, "MOST_MERGED", 3)
    for number in range(50):
        workspace.append("checkpoints", [item(f"i{number}", number % 60)])
        assert workspace.rows("SELECT count(*) AS n FROM checkpoints_rows")[0]["n"] == number + 1
    assert len(workspace.keys("checkpoints")) <= 4 + 3
    folder = workspace.root / "tables/checkpoints"
    assert len(list(folder.glob("*/*.parquet"))) > 50  # a reader that has just listed the old ones can read on
    monkeypatch.setattr(storage, "KEEP_REPLACED", -1.0)
    for number in range(50, 60):
        workspace.append("checkpoints", [item(f"i{number}", number)])
        assert workspace.rows("SELECT count(*) AS n FROM checkpoints_rows")[0]["n"] == number + 1
    assert len(list(folder.glob("*/*.parquet"))) < 30


def test_a_merge_killed_before_its_list_is_written_changes_nothing(workspace: Workspace) -> None:
    workspace.append("checkpoints", [item("a", 1)])
    half_merged = pa.Table.from_pylist([item("a", 1), item("x", 1)], schema=TABLES["checkpoints"])
    (workspace.root / "tables/checkpoints/merged").mkdir()
    pq.write_table(half_merged, workspace.root / "tables/checkpoints/merged/000000000001-00000000.parquet")
    assert [row["item_id"] for row in workspace.rows("SELECT item_id FROM checkpoints_rows")] == ["a"]


def test_a_workspace_of_an_older_version_is_refused(tmp_path: Path) -> None:
    Workspace(tmp_path / "w")
    (tmp_path / "w/workspace.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(WorkspaceError, match="older lora-audit"):
        Workspace(tmp_path / "w")


def test_audit_files_are_compacted_found_and_can_be_written_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        workspace.write("evaluations", f"a{number}.training", [ROW | {"audit_id": f"a{number}", "images": number}])
    assert workspace.compact("evaluations") == 5
    assert len(workspace.keys("evaluations")) == 1
    assert workspace.has("evaluations", "a3.training")
    assert not workspace.has("evaluations", "a9.training")
    workspace.write("evaluations", "a3.training", [ROW | {"audit_id": "a3", "images": 33}])
    monkeypatch.setattr(storage, "KEEP_REPLACED", -1.0)
    for _ in range(3):  # the old files are removed, and nothing comes back
        found = workspace.rows("SELECT audit_id, images FROM evaluations ORDER BY 1")
        assert [(row["audit_id"], row["images"]) for row in found] == [
            ("a0", 0), ("a1", 1), ("a2", 2), ("a3", 33), ("a4", 4),
        ]  # fmt: skip
        workspace.compact("evaluations")
    assert len(list((workspace.root / "tables/evaluations").glob("*/*.parquet"))) <= 3
