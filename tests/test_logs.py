"""What commands tell on stderr: for people, for machines, more and less of it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from audit.cli import app, logs
from audit.demo import set_folder
from audit.workspace import Workspace
from tests.test_cli import run

ANIMALS = set_folder("fluent-animals", "train")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    shutil.copytree(ANIMALS, tmp_path / "pictures")
    (tmp_path / "pictures/broken.jpg").write_bytes(b"\xff\xd8\xff no")
    return tmp_path / "pictures"


def test_the_version_is_said() -> None:
    assert run("--version").stdout == f"lora-audit {version('lora-audit')}\n"


def test_every_line_of_stderr_is_an_object(tmp_path: Path, pictures: Path) -> None:
    where = ("--workspace", tmp_path / "w", "--log-format", "json")
    added = run("references", "add", "mine", pictures, "--descriptor", "nano", *where)
    said = [json.loads(line) for line in added.stderr.splitlines()]
    assert {one["level"] for one in said} == {"info", "warning"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", one["time"]) for one in said)
    assert [one["message"].split(":")[0] for one in said if one["level"] == "warning"] == ["passed over broken.jpg"]
    assert {"stage": "describing", "done": 11, "total": 11}.items() <= said[0].items() | said[1].items()
    failed = run("query", "SELECT x FROM nowhere", *where)
    [error] = [json.loads(line) for line in failed.stderr.splitlines()]
    assert (failed.returncode, error["level"]) == (2, "error")
    assert "nowhere" in error["message"]


def test_quiet_leaves_warnings_and_verbose_says_where_an_error_comes_from(tmp_path: Path, pictures: Path) -> None:
    quiet = run("references", "add", "mine", pictures, "--descriptor", "nano", "--workspace", tmp_path / "w", "--quiet")
    assert [line.split(":")[0] for line in quiet.stderr.splitlines()] == ["warning passed over broken.jpg"]
    verbose = run("--verbose", "query", "SELECT x FROM nowhere", "--workspace", tmp_path / "w")
    assert verbose.stderr.startswith("lora-audit: the query failed")
    assert "Traceback" in verbose.stderr


def test_requests_are_told_without_their_queries(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(verbose=True)
    logging.getLogger("urllib3.connectionpool").warning("Retrying after /file?X-Amz-Signature=secret")
    logging.getLogger("crawlers.http").debug("%s", "GET [bold]x[/bold]")
    assert capsys.readouterr().err == "GET [bold]x[/bold]\n"


def test_the_options_stand_before_or_behind_the_command() -> None:
    assert logs.hoisted(["scan", "a", "--quiet", "--log-format", "json", "--n0", "3"]) == [
        "--quiet", "--log-format", "json", "scan", "a", "--n0", "3"
    ]  # fmt: skip
    assert logs.hoisted(["query", "--", "--quiet"]) == ["query", "--", "--quiet"]
    assert logs.hoisted(["status", "--log-format"]) == ["--log-format", "status"]


def test_contradictions_are_said(workspace: Workspace) -> None:
    with pytest.raises(typer.BadParameter, match="contradict"):
        app(["--quiet", "--verbose", "status", "--workspace", str(workspace.root)], standalone_mode=False)
