"""Workspaces of version 2 become version 3 in place, also when that is killed at any point."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.errors import WorkspaceError
from audit.files import Files
from audit.schemas import TABLES
from audit.workspace import Workspace


def put(root: Path, table: str, key: str, rows: list[dict[str, Any]], replaces: list[str] | None = None) -> None:
    """A file as version 2 wrote it; a merged one with the list of what it replaces."""
    folder = root / "tables" / table
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[table]), folder / f"{key}.parquet")
    if replaces is not None:
        (folder / f"{key}.json").write_text(json.dumps(replaces))


def make_version_2(root: Path) -> None:
    """Loose files, a merged one with the files that it replaced, a merge that was killed, and a reference set."""
    root.mkdir()
    (root / "workspace.json").write_text('{"version": 2}')
    evaluations = [{"audit_id": f"a{n}", "kind": "training", "images": n} for n in range(4)]
    for row in evaluations[:3]:
        put(root, "evaluations", f"{row['audit_id']}.training", [row])
    put(root, "evaluations", "merged-1", evaluations[:2], ["a0.training", "a1.training"])
    put(root, "evaluations", "a3.training", [evaluations[3]])
    put(root, "evaluations", "merged-2", evaluations)  # killed before its list was written: counts for nothing
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(3):
        put(root, "checkpoints", f"rows-{number}", [{"item_id": f"i{number}", "state": "listed", "seen_at": now}])
    put(root, "references", "set.0123456789ab", [{"reference_set": "set", "reference_id": "r"}])


EVALUATIONS = [{"audit_id": f"a{n}", "images": n} for n in range(4)]


def check(workspace: Workspace) -> None:
    """Everything is there once."""
    assert workspace.rows("SELECT audit_id, images FROM evaluations ORDER BY ALL") == EVALUATIONS
    assert workspace.rows("SELECT count(*) AS n FROM checkpoints_rows") == [{"n": 3}]
    assert workspace.rows('SELECT reference_set FROM "references"') == [{"reference_set": "set"}]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    make_version_2(tmp_path / "w")
    return tmp_path / "w"


def test_a_workspace_of_version_2_is_rewritten_in_place_and_says_so(
    old: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = Workspace(old)
    check(workspace)
    assert "rewritten in place" in caplog.text
    assert json.loads((old / "workspace.json").read_text()) == {"version": 3}
    assert [path for path in old.glob("tables/*/*") if path.is_file()] == []
    assert workspace.has("evaluations", "a1.training")  # its row was in a merged file
    workspace.write("evaluations", "a1.training", [{"audit_id": "a1", "kind": "training", "images": 11}])
    workspace.remove("evaluations", "a0.training")
    workspace.write("references", "set.0123456789ab", [{"reference_set": "set", "reference_id": "new"}])
    for _ in range(2):
        found = workspace.rows("SELECT audit_id, images FROM evaluations ORDER BY ALL")
        assert found == [{"audit_id": "a1", "images": 11}, *EVALUATIONS[2:]]
        assert workspace.rows('SELECT reference_id FROM "references"') == [{"reference_id": "new"}]
        workspace.compact("evaluations")
        workspace.compact("references")


def test_reading_commands_refuse_it_and_name_the_mend(old: Path) -> None:
    with pytest.raises(WorkspaceError, match="lora-audit migrate --workspace"):
        Workspace(old, reading=True)
    assert json.loads((old / "workspace.json").read_text()) == {"version": 2}
    cli = [sys.executable, "-c", "from audit.cli import main; main()"]
    done = subprocess.run([*cli, "migrate", "--workspace", old], capture_output=True, text=True, check=True)
    assert "rewritten in place" in done.stderr
    assert "version 3" in done.stdout
    check(Workspace(old, reading=True))


def test_it_waits_for_a_run_that_is_alive(old: Path) -> None:
    (old / "runs").mkdir()
    said = {"state": "running", "heartbeat_at": time.time(), "shard": "0/1", "host": "here", "pid": 1}
    (old / "runs/r1.json").write_text(json.dumps(said))
    with pytest.raises(WorkspaceError, match="run r1 on here works on it"):
        Workspace(old)
    (old / "runs/r1.json").write_text(json.dumps(said | {"heartbeat_at": time.time() - 100}))
    check(Workspace(old))


class Killed(BaseException):
    """Stands for SIGKILL: nothing tidies up behind it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die before its ``step``-th change to the storage."""
    left = iter(range(step))

    def dying(name: str) -> Any:
        real = getattr(Files, name)

        def call(self: Files, *arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return real(self, *arguments, **options)

        return call

    for name in ("create", "writing", "remove"):
        monkeypatch.setattr(Files, name, dying(name))


def steps() -> Iterator[int]:
    yield from range(40)


def test_killed_at_any_point_it_goes_on(tmp_path: Path) -> None:
    died = 0
    for step in steps():
        place = tmp_path / f"w{step}"
        make_version_2(place)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(step, patch)
            try:
                Workspace(place)
            except Killed:
                died += 1
        workspace = Workspace(place)
        check(workspace)
        for table in ("evaluations", "checkpoints", "references"):
            workspace.vacuum(table, 0.0)
            workspace.vacuum(table, 0.0)
        check(workspace)
        assert [path for path in place.glob("tables/*/*") if path.is_file()] == []
        assert len(list(place.rglob("*.parquet"))) == 3
    assert died > 20


def test_two_that_migrate_at_once_double_nothing(old: Path) -> None:
    script = "import sys; from audit.workspace import Workspace; Workspace(sys.argv[1])"
    both = [subprocess.Popen([sys.executable, "-c", script, str(old)], stderr=subprocess.PIPE) for _ in range(3)]
    assert [one.wait() for one in both] == [0, 0, 0], [one.communicate()[1] for one in both]
    check(Workspace(old))


def test_damaged_files_of_version_2_stay_and_are_named(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    (old / "tables/evaluations/a2.training.parquet").write_bytes(b"PAR1")
    workspace = Workspace(old)
    assert "a2.training.parquet is damaged" in caplog.text
    assert [row["audit_id"] for row in workspace.rows("SELECT audit_id FROM evaluations ORDER BY 1")] == [
        "a0", "a1", "a3",
    ]  # fmt: skip
    from audit.workspace.verify import table_problems

    [problem] = table_problems(workspace, workspace.table("evaluations"))
    assert problem.where == "tables/evaluations/a2.training.parquet"


def test_a_list_that_cannot_be_read_is_refused(old: Path) -> None:
    (old / "tables/evaluations/merged-1.json").write_text('["a0.tr')
    with pytest.raises(WorkspaceError, match=r"merged-1\.json is damaged, and without it rows would count twice"):
        Workspace(old)
