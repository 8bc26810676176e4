"""What a workspace holds is its owner's alone, whatever the umask, and nothing of killed writes stays."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.demo import set_folder
from audit.files import ABANDONED, Files, make_folder, private_file
from audit.workspace import Workspace
from tests import warm
from tests.conftest import BASE, KOHYA


@pytest.fixture(params=[0, 0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def opened(folder: Path) -> dict[str, str]:
    """What below ``folder``, itself included, others can reach, or its owner cannot use."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o700 if path.is_dir() else 0o600):
            found[str(path.relative_to(folder))] = f"{mode:04o}"
    return found


def test_every_way_of_writing_is_private(umask: int, tmp_path: Path) -> None:
    files = Files(tmp_path / "a" / "b")
    files.write("c/d/e", b"x")
    files.create("f/g", b"x")
    files.mark("h/i")
    files.mark("h/j")
    make_folder(tmp_path / "a" / "parts")
    part = tmp_path / "a" / "parts" / "p"
    with private_file(part) as file:
        file.write(b"x")
    part.chmod(0o644)  # as an older version left it
    with private_file(part, "r+b") as file:
        file.seek(1)
        file.write(b"y")
    assert part.read_bytes() == b"xy"
    other = tmp_path / "other"
    other.write_bytes(b"x")
    other.chmod(0o644)
    files.adopt(other, "k/l")
    assert opened(tmp_path / "a") == {}


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    Files(tmp_path).write("a", b"x")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def lora_audit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return warm.run(*arguments, umask=0)


def test_everything_that_commands_leave_is_private_under_umask_0(tmp_path: Path) -> None:
    uploads, w = tmp_path / "uploads", tmp_path / "w"
    uploads.mkdir()
    shutil.copy(KOHYA, uploads / "a.safetensors")
    (uploads / "b.safetensors").write_bytes(b"\x10" + bytes(7) + b"{} no header")  # goes into quarantine
    at = ["--workspace", w]
    train = set_folder("fluent-animals", "train")
    quick = ["--set", "settings.steps=2", "--set", "settings.images_per_training_image=1"]
    for words in (
        ["crawl", "folder", uploads, "--settle", "0", *at],
        ["references", "add", "s", train, "--descriptor", "nano", *at],
        ["run", "--base", f"sd1={BASE}", "--references", "s", "--descriptor", "nano", *quick, *at],
        ["compact", *at],
        ["export", tmp_path / "out", *at],
        ["export", tmp_path / "delta", "--format", "delta", "--table", "audits", *at],
    ):
        done = lora_audit(*words)
        assert done.returncode in (0, 10, 11, 12, 13), done.stderr
    assert opened(w) == {}
    assert opened(tmp_path / "out") == {}
    assert stat.S_IMODE((tmp_path / "delta").stat().st_mode) == 0o700
    there = {path.relative_to(w).parts[0] for path in w.rglob("*") if path.is_file()}
    assert {"tables", "checkpoints", "reports", "runs", "workspace.json"} <= there
    assert list((w / "checkpoints/quarantined").glob("*.bin"))


def test_a_start_removes_what_killed_writes_left_and_nothing_that_is_written_now(workspace: Workspace) -> None:
    old = [workspace.root / one / ".abc.part" for one in (".", "spool/x", "checkpoints", "tables/audits/loose")]
    young = workspace.root / "reports" / ".def.part"
    download = workspace.root / "checkpoints" / "parts" / ("0" * 40 + ".part")  # goes on where it stopped
    for path in (*old, young, download):
        make_folder(path.parent)
        path.write_bytes(b"x")
    past = time.time() - ABANDONED - 10
    for path in (*old, download):
        os.utime(path, (past, past))
    Workspace(workspace.root, reading=True)
    assert all(path.exists() for path in old), "who reads removes nothing"
    Workspace(workspace.root)
    assert not any(path.exists() for path in old)
    assert young.exists()
    assert download.exists()
