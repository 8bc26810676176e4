"""A release is one version, told in the changelog."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import audit
from audit.cli import app
from tests import wheel
from tests.release import note, releases

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_is_written_in_one_place() -> None:
    assert audit.__version__ == version("lora-audit")
    assert CliRunner().invoke(app, ["--version"]).stdout == f"lora-audit {audit.__version__}\n"
    assert not re.search(r"__version__ = [\"']", (ROOT / "audit" / "__init__.py").read_text())


def test_the_changelog_begins_with_the_version_that_is_built() -> None:
    found = releases()
    assert next(name for name in found if name != "Unreleased") == VERSION
    for name, text in found.items():
        assert set(re.findall(r"^### (.*)$", text, re.M)) <= {
            "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
        }, name  # fmt: skip
    dates = re.findall(r"^## \[[^\]]+\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert dates == sorted(dates, reverse=True)


def test_a_release_note_is_the_changelog_of_that_version() -> None:
    text = note(VERSION)
    assert text.startswith(f"# lora-audit {VERSION}\n")
    assert "### Added" in text
    assert "## [" not in text
    with pytest.raises(SystemExit, match=r"has no release 99\.0"):
        note("99.0")


def test_the_wheel_has_what_users_need_and_nothing_else(tmp_path: Path) -> None:
    wheel.look_into(wheel.build(tmp_path))
