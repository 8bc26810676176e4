"""What a table holds after any order of commits, merges, vacuums and removals, by several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.errors import WorkspaceError
from audit.files import Files, create_file
from audit.schemas import TABLES
from audit.workspace import Workspace, compaction
from audit.workspace.names import Clock
from audit.workspace.workspace import named_tables


def row(name: str, images: int = 0) -> dict[str, Any]:
    return {"audit_id": name, "kind": "k", "images": images}


def held(workspace: Workspace) -> dict[str, list[int]]:
    """The images of every audit in evaluations."""
    found: dict[str, list[int]] = {}
    for one in workspace.rows("SELECT audit_id, images FROM evaluations ORDER BY 1, 2"):
        found.setdefault(one["audit_id"], []).append(one["images"])
    return found


def fill(workspace: Workspace, count: int = 4) -> None:
    for number in range(count):
        workspace.write("evaluations", f"a{number}.k", [row(f"a{number}", number)])


def parquet_files(workspace: Workspace, table: str = "evaluations") -> list[str]:
    return [e.key for e in workspace.files.list(f"tables/{table}", recursive=True) if e.key.endswith(".parquet")]


def test_commits_merges_and_removals_give_the_newest_of_every_key(either: Workspace) -> None:
    fill(either)
    assert either.compact("evaluations") == 4
    either.write("evaluations", "a1.k", [row("a1", 11), row("a1", 12)])  # replaces rows in a merged file
    either.remove("evaluations", "a2.k")
    either.write("evaluations", "a3.k", [])
    expected = {"a0": [0], "a1": [11, 12]}
    assert held(either) == expected
    assert [either.has("evaluations", f"a{n}.k") for n in range(5)] == [True, True, False, False, False]
    either.compact("evaluations")
    assert held(either) == expected
    assert [either.has("evaluations", f"a{n}.k") for n in range(5)] == [True, True, False, False, False]
    either.write("evaluations", "a2.k", [row("a2", 22)])
    assert held(either) == expected | {"a2": [22]}
    for _ in range(3):
        compaction.compact(either.table("evaluations"), force=True)
        either.vacuum("evaluations", 0.0)
        assert held(either) == expected | {"a2": [22]}
    assert len(parquet_files(either)) == len(either.keys("evaluations")) == 2


def test_of_two_merges_one_counts(either: Workspace) -> None:
    fill(either)
    table = either.table("evaluations")
    view = table.view()
    assert compaction._merge(table, view, False, False) == 4
    before = held(either)
    assert compaction._merge(table, view, False, False) == 0  # began at the same time, ended later
    assert held(either) == before == {f"a{n}": [n] for n in range(4)}
    assert len(either.files.list("tables/evaluations/merged")) == 1  # and its file is gone


def test_a_vacuum_leaves_the_file_of_a_merge_that_is_not_done(workspace: Workspace) -> None:
    fill(workspace)
    table = workspace.table("evaluations")
    compaction.compact(table)
    compaction.settle(table, 0.0)
    rows = pa.Table.from_pylist([row("x")], schema=TABLES["evaluations"])
    [written] = compaction.write_merged(table, iter([rows]), table.view().latest + 1)
    compaction.vacuum(table, 0.0)
    assert workspace.files.exists(table.merged_key(written.name))
    fill(workspace)
    compaction.compact(table)  # was first: the file can never count now
    compaction.vacuum(table, 0.0)
    assert not workspace.files.exists(table.merged_key(written.name))


def test_files_of_merges_that_were_killed_go(workspace: Workspace) -> None:
    fill(workspace)
    table = workspace.table("evaluations")
    (workspace.root / "tables/evaluations/merged").mkdir()
    orphan = workspace.root / "tables/evaluations/merged/000000000001-00000000.parquet"
    pq.write_table(pa.Table.from_pylist([row("x")], schema=TABLES["evaluations"]), orphan)
    assert held(workspace) == {f"a{n}": [n] for n in range(4)}
    compaction.compact(table)
    workspace.vacuum("evaluations", 0.0)
    assert not orphan.exists()
    assert held(workspace) == {f"a{n}": [n] for n in range(4)}


def test_a_reader_whose_files_go_reads_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(workspace)
    table, real = workspace.table("evaluations"), workspace.table("evaluations").datasets
    calls = []

    def late(view: Any) -> Any:
        calls.append(view)
        if len(calls) <= 2:  # between listing and reading, twice
            compaction.compact(table, force=True)
            workspace.vacuum("evaluations", 0.0)
            workspace.vacuum("evaluations", 0.0)
        return real(view)

    monkeypatch.setattr(table, "datasets", late)
    assert held(workspace) == {f"a{n}": [n] for n in range(4)}
    assert len(calls) >= 2


def test_a_clock_that_is_set_back_loses_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.write("evaluations", "a.k", [row("a", 1)])
    real = time.time_ns
    for number, jump in enumerate((-10, 20, -30), start=2):  # days
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: real() + jump * 86_400 * 10**9)
        other = Workspace(workspace.root)  # another process
        other.write("evaluations", "a.k", [row("a", number)])
        assert held(workspace) == {"a": [number]}
    workspace.remove("evaluations", "a.k")
    assert held(workspace) == {}


def test_a_workspace_that_was_copied_without_its_clock_goes_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 86_400 * 10**9)
    workspace.write("evaluations", "a.k", [row("a", 1)])
    monkeypatch.setattr(time, "time_ns", real)
    workspace.files.remove_folder("tables/evaluations/clock")
    Workspace(workspace.root).write("evaluations", "a.k", [row("a", 2)])
    assert held(workspace) == {"a": [2]}


def test_stamps_rise_for_threads_and_few_marks_stay(tmp_path: Path) -> None:
    stamps: list[list[int]] = [[] for _ in range(4)]

    def count(own: list[int]) -> None:
        clock = Clock(Files(tmp_path), "clock")
        for _ in range(50):
            own.append(clock.next())

    threads = [threading.Thread(target=count, args=(own,)) for own in stamps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    highest = max(max(own) for own in stamps)
    assert Clock(Files(tmp_path), "clock").next() > highest
    assert all(own == sorted(set(own)) for own in stamps)
    assert len(list((tmp_path / "clock").iterdir())) <= 6


def test_rows_are_removed_by_value_wherever_they_are(either: Workspace) -> None:
    for number in range(4):
        either.append("failures", [{"audit_id": f"a{number}", "item_id": "x" if number % 2 else "y"}])
    either.compact("failures")
    either.append("failures", [{"audit_id": "a4", "item_id": "x"}, {"audit_id": "a5", "item_id": "y"}])
    either.remove_where("failures", "item_id", "x")
    either.append("failures", [{"audit_id": "a6", "item_id": "x"}])  # afterwards: stays
    for _ in range(3):
        found = either.rows("SELECT audit_id FROM failures ORDER BY 1")
        assert [one["audit_id"] for one in found] == ["a0", "a2", "a5", "a6"]
        compaction.compact(either.table("failures"), force=True)
    with pytest.raises(WorkspaceError, match="no rows with"):
        either.remove_where("failures", "nothing", "x")
    with pytest.raises(WorkspaceError, match="no rows with"):
        either.remove_where("failures", "failed_at", "x")


def test_after_erasing_no_file_holds_the_rows(workspace: Workspace) -> None:
    secret = "jane-doe-portfolio"
    for number in range(5):
        workspace.write("matches", f"a{number}.{secret}", [{"audit_id": f"a{number}", "reference_set": secret}])
        workspace.write("matches", f"a{number}.other", [{"audit_id": f"a{number}", "reference_set": "other"}])
        if number == 2:
            workspace.compact("matches")
    workspace.write("references", f"{secret}.1", [{"reference_set": secret, "reference_id": "r"}])
    workspace.erase("reference_set", secret)
    for path in workspace.root.rglob("*.parquet"):
        for name in ("reference_set", "_key"):
            if name in pq.read_schema(path).names:
                assert all(secret not in str(value) for value in pq.read_table(path)[name].to_pylist())
    assert workspace.rows("SELECT count(*) AS n FROM matches") == [{"n": 5}]
    assert workspace.rows('SELECT * FROM "references"') == []
    workspace.write("references", f"{secret}.1", [{"reference_set": secret, "reference_id": "again"}])
    assert [one["reference_id"] for one in workspace.rows('SELECT * FROM "references"')] == ["again"]


def test_erasing_names_a_damaged_file_that_may_hold_the_rows(workspace: Workspace) -> None:
    workspace.write("references", "s.1", [{"reference_set": "s"}])
    [path] = workspace.root.glob("tables/references/loose/*.parquet")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(WorkspaceError, match=r"loose/s\.1~.*damaged and may hold"):
        workspace.erase("reference_set", "s")


def test_a_file_without_a_newer_column_is_read_and_merged_with_nulls(workspace: Workspace) -> None:
    fill(workspace, 2)
    [first, second] = sorted(workspace.root.glob("tables/evaluations/loose/*.parquet"))
    pq.write_table(pq.read_table(first).drop_columns(["ceiling", "images"]), first)
    newer = pq.read_table(second).append_column("added_later", pa.array(["kept"]))
    pq.write_table(newer, second)
    sql = "SELECT audit_id, images, ceiling FROM evaluations ORDER BY 1"
    expected = [{"audit_id": "a0", "images": None, "ceiling": None}, {"audit_id": "a1", "images": 1, "ceiling": None}]
    assert workspace.rows(sql) == expected
    assert workspace.compact("evaluations") == 2
    assert workspace.rows(sql) == expected
    merged = [pq.read_table(path) for path in workspace.root.glob("tables/evaluations/merged/*.parquet")]
    kept = [value for one in merged if "added_later" in one.column_names for value in one["added_later"].to_pylist()]
    assert "kept" in kept  # what a newer version has written outlives a merge by this one


def test_a_statement_opens_the_tables_that_it_names(workspace: Workspace) -> None:
    assert named_tables("SELECT * FROM Captions") == ["checkpoints", "captions"]
    assert named_tables('SELECT 1 FROM "references" JOIN matches USING (reference_id)') == ["references", "matches"]
    assert named_tables("SHOW TABLES") == list(TABLES)
    assert named_tables("SELECT 1") == []
    fill(workspace)
    assert workspace.rows("SELECT count(*) AS n FROM query_table('evalu' || 'ations')") == [{"n": 4}]
    with workspace.connect() as connection:
        assert connection.sql("SELECT count(*) FROM evaluations").fetchall() == [(4,)]
    with pytest.raises(duckdb.CatalogException):
        workspace.rows("SELECT * FROM nothing")


def test_times_are_utc_wherever_the_machine_is(workspace: Workspace) -> None:
    workspace.append("failures", [{"audit_id": "a", "failed_at": datetime(2026, 1, 1, 23, 30, tzinfo=UTC)}])
    script = (
        "import sys; from audit.workspace import Workspace; "
        "print(Workspace(sys.argv[1]).rows('SELECT failed_at::VARCHAR AS t, failed_at AS v FROM failures'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(workspace.root)], capture_output=True, text=True, check=True,
        env={**__import__("os").environ, "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    assert "2026-01-01 23:30:00+00" in done.stdout
    assert "2026, 1, 1, 23, 30" in done.stdout


def test_a_file_is_created_by_one_of_many(place: str) -> None:
    files = Files(place)
    made: list[int] = []

    def create(number: int) -> None:
        if files.create("x/1.json", str(number).encode()):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert files.read("x/1.json") == str(made[0]).encode()
    assert [entry.key for entry in files.list("x")] == ["x/1.json"]


def test_a_link_whose_answer_is_lost_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    real = os.link

    def lost(source: Any, target: Any) -> None:  # as NFS answers when the first reply did not arrive
        real(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", lost)
    assert create_file(tmp_path / "a", b"mine")
    monkeypatch.setattr(os, "link", real)
    assert not create_file(tmp_path / "a", b"yours")
    assert (tmp_path / "a").read_bytes() == b"mine"
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError(1, "no links")))
    with pytest.raises(WorkspaceError, match="without hard links"):
        create_file(tmp_path / "b", b"x")


def test_storage_that_overwrites_is_refused() -> None:
    from audit.conditional import require_conditional_puts

    removed: list[str] = []
    with pytest.raises(WorkspaceError, match="overwrites objects"):
        require_conditional_puts(lambda key, content: True, removed.append, "s3://bucket")
    assert len(removed) == 1


def test_two_processes_that_open_a_new_workspace_both_can(tmp_path: Path) -> None:
    script = "import sys; from audit.workspace import Workspace; Workspace(sys.argv[1]).append('failures', [{}])"
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "w")]) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert Workspace(tmp_path / "w").rows("SELECT count(*) AS n FROM failures") == [{"n": 2}]


STOPPED = """
import signal, sys
from audit.workspace import Workspace
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
workspace = Workspace(sys.argv[1])
print("asking", flush=True)
try:
    workspace.rows("SELECT count(*) FROM range(100000000000) AS a WHERE a.range % 7 = 3")
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_a_query_that_is_stopped_from_the_keyboard_is_stopped_and_no_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "w")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "asking\n"
        deadline = time.monotonic() + 60
        while asking.poll() is None and time.monotonic() < deadline:
            time.sleep(1)
            asking.send_signal(signal.SIGINT)
        asking.kill()
        assert asking.stdout.readline() == "stopped\n"
