"""The command line as a user runs it: a process of its own, its exit code, its words.

What is killed or interrupted is an interpreter that a user would start; the others are forked (tests/warm.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from audit.demo import set_folder
from audit.workspace import Workspace
from tests.conftest import BASE, KOHYA
from tests.warm import run

QUICK = ["--steps", "8", "--images-per-training-image", "4", "--descriptor", "nano", "--device", "cpu"]
ANIMALS = set_folder("fluent-animals", "train")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from audit.cli import main; main()", *map(str, arguments)]


def scan(tmp_path: Path, *arguments: object, file: Path = KOHYA) -> subprocess.CompletedProcess[str]:
    return run("scan", file, "--base", BASE, "--workspace", tmp_path / "w", *QUICK, *arguments)


def test_help_teaches_and_loads_nothing_heavy() -> None:
    done = run("scan", "--help")
    assert done.returncode == 0
    for words in ("--references", "--caption", "Exit codes", "Example", "Guidance weight"):
        assert words in done.stdout
    probe = "import sys, audit.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"


def test_a_scan_finds_the_training_images_and_says_so(tmp_path: Path) -> None:
    done = scan(tmp_path, "--references", ANIMALS, "--training-images", ANIMALS, "--rule", "fixed")
    assert done.returncode == 10, done.stderr
    assert "of your 10 reference pictures w" in " ".join(done.stderr.split())
    assert "recovered from this model, by a fixed threshold" in " ".join(done.stderr.split())
    (page,) = (tmp_path / "w/reports").glob("*.html")
    assert "recovered from this model" in page.read_text()
    assert str(page.name) in done.stderr.replace("\n", "")
    # the caption and N0 came from the file's own metadata
    sql = "SELECT c.caption, c.source, c.images FROM (SELECT unnest(captions) AS c FROM audits)"
    query = run("query", sql, "--json", "--workspace", tmp_path / "w")
    assert json.loads(query.stdout) == [
        {"caption": "sks 3d render of an animal", "source": "modelspec.trigger_phrase", "images": 40}
    ]
    [row] = Workspace(tmp_path / "w").rows(
        "SELECT tensor_rank, claimed_rank, claimed_steps, claimed_learning_rate FROM checkpoints"
    )
    assert (row["tensor_rank"], row["claimed_rank"]) == (24, 24)
    assert row["claimed_steps"] > 0
    assert 0 < row["claimed_learning_rate"] < 1
    again = scan(tmp_path, "--references", ANIMALS, "--json", "--rule", "fixed")
    assert again.returncode == 10
    found = json.loads(again.stdout)
    assert found["audit"]["training_images_source"] == "ss_dataset_dirs"
    assert found["matched_references"]
    assert "sampling" not in again.stderr
    report = run("report", found["audit"]["audit_id"][:8], "--json", "--rule", "fixed", "--workspace", tmp_path / "w")
    assert json.loads(report.stdout)["matched_references"] == found["matched_references"]
    read = json.loads(run("report", found["audit"]["audit_id"], "--json", "--workspace", tmp_path / "w").stdout)
    assert (read["verdict"]["said"], read["matched_references"]) == ("uncalibrated", [])  # without decoys, by default
    assert read["alike_references"] == found["matched_references"]


def test_pictures_the_model_never_saw_are_not_found(tmp_path: Path) -> None:
    done = scan(tmp_path, "--references", set_folder("stamps-birds", "control"), "--json", "--rule", "fixed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["matched_references"] == []


def test_named_sets_broken_pictures_and_their_list(tmp_path: Path) -> None:
    shutil.copytree(ANIMALS, tmp_path / "pictures")
    (tmp_path / "pictures/broken.jpg").write_bytes(b"\xff\xd8\xff no")
    where = ("--workspace", tmp_path / "w")
    added = run("references", "add", "mine", tmp_path / "pictures", "--descriptor", "nano", "--json", *where)
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["images"] == 10
    assert [one["name"] for one in json.loads(added.stdout)["skipped_images"]] == ["broken.jpg"]
    listed = json.loads(run("references", "list", "--json", *where).stdout)
    assert [(row["reference_set"], row["images"]) for row in listed] == [("mine", 10)]
    assert scan(tmp_path, "--references", "mine", "--rule", "fixed").returncode == 10
    plain = scan(tmp_path, "--references", "mine")
    assert (plain.returncode, "No verdict with an error rate can be given on mine" in plain.stderr) == (12, True)
    assert "references add NAME DIR --kind background" in " ".join(plain.stderr.split())
    assert run("references", "remove", "mine", *where).returncode == 0
    missing = scan(tmp_path, "--references", "mine")
    assert (missing.returncode, "neither a folder nor a reference set" in missing.stderr) == (2, True)


def bad_inputs(tmp_path: Path) -> list[tuple[Path, list[object], str]]:
    good = KOHYA.read_bytes()
    files = {
        "truncated": good[:-100],
        "pickle": b"PK\x03\x04" + b"\0" * 50,
        "giant": (2**40).to_bytes(8, "little") + b"{}",
        "text": b"hello, this is not a model at all",
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in files}
    for name, content in files.items():
        paths[name].write_bytes(content)
    other = {name.replace("lora_unet", "lora_unet_single"): tensor for name, tensor in load_file(KOHYA).items()}
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    return [
        (tmp_path / "none.safetensors", [], "does not exist"),
        (paths["truncated"], [], "truncated"),
        (paths["pickle"], [], "zip archive"),
        (paths["giant"], [], "declares a header"),
        (paths["text"], [], "declares a header"),
        (tmp_path / "other.safetensors", [], "does not fit|no place"),
        (KOHYA, ["--references", tmp_path / "empty"], "holds no pictures"),
        (KOHYA, ["--references", "no-such-set"], "neither a folder nor a reference set"),
        (KOHYA, ["--caption-file", tmp_path / "none.txt"], "cannot be read"),
        (KOHYA, ["--descriptor", "unknown"], "no descriptor"),
        (KOHYA, ["--base", tmp_path / "empty"], "model_index.json"),
    ]


@pytest.mark.parametrize("number", range(11))
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path: Path, number: int) -> None:
    import re

    file, arguments, words = bad_inputs(tmp_path)[number]
    done = scan(tmp_path, *arguments, file=file)
    message = [line for line in done.stderr.splitlines() if line.startswith("lora-audit: ")]
    assert done.returncode == 2
    assert len(message) == 1
    assert re.search(words, message[0])
    assert "Traceback" not in done.stderr
    leftovers = [p for p in (tmp_path / "w").rglob("*") if p.is_file() and p.name != "workspace.json"]
    assert leftovers == []


def test_a_killed_scan_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = (
        "scan",
        KOHYA,
        "--base",
        BASE,
        "--workspace",
        tmp_path / "w",
        *QUICK,
        "--batch-size",
        4,
        "--steps",
        "25",
    )
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "w").glob("spool/*/raw-00000004.parquet")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("spool/*/*.parquet")}
    assert kept
    assert not list((tmp_path / "w/tables").rglob("*.parquet")) if (tmp_path / "w/tables").exists() else True
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"sampling {4 * len(kept)}/40" in done.stderr
    count = run("query", "SELECT count(DISTINCT index) AS n FROM generations", "--json", "--workspace", tmp_path / "w")
    assert json.loads(count.stdout) == [{"n": 40}]


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = ("scan", KOHYA, "--base", BASE, "--workspace", tmp_path / "w", *QUICK, "--steps", "500")
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("sampling"):
            break
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in words


READERS = [
    ("query", "SELECT 1"), ("report", "abc"), ("status",), ("failures",), ("failures", "--retry"), ("verify",),
    ("compact",), ("catalog",), ("catalog", "fetch"), ("catalog", "refresh"), ("references", "list"),
    ("references", "remove", "mine"), ("estimate",), ("match", "--references", "mine"), ("migrate",),
    ("export", "out"),
    ("scan", "civitai:1:2:3", "--base", str(BASE)),
]  # fmt: skip


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_mistyped_workspace_is_said_and_not_created(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: a process for each would take minutes."""
    from audit.cli import app
    from audit.errors import WorkspaceError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkspaceError, match="there is no workspace at mistyped"):
        app([*command, "--workspace", "mistyped"], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_commands_that_write_create_the_workspace(tmp_path: Path) -> None:
    from audit.cli import app

    app(["catalog", "add", str(KOHYA), "--workspace", str(tmp_path / "w")], standalone_mode=False)
    assert Workspace(tmp_path / "w", reading=True, create=False).rows("SELECT state FROM checkpoints")
    app(["query", "SELECT 1", "--workspace", str(tmp_path / "w")], standalone_mode=False)


def test_a_slow_query_draws_no_progress_on_stdout(tmp_path: Path) -> None:
    Workspace(tmp_path / "w")
    sql = "SELECT count(*) AS n FROM range(12000) AS a, range(24000) AS b WHERE hash(a.range * b.range) <> 1"
    done = run("query", sql, "--json", "--workspace", tmp_path / "w")
    assert json.loads(done.stdout) == [{"n": 288_000_000}]


def test_sql_errors_are_said(tmp_path: Path) -> None:
    Workspace(tmp_path / "w")
    done = run("query", "SELECT nothing FROM nowhere", "--workspace", tmp_path / "w")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert run("query", 'SELECT * FROM "references"', "--workspace", tmp_path / "w").stdout == "no rows\n"
