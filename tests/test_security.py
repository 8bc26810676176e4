"""What SECURITY.md states is what the code does."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from audit.config import RunSettings
from crawlers.http import Session

TEXT = (Path(__file__).parents[1] / "SECURITY.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| ([\d,]+)(?: (KiB|MiB|GiB|s))? \| `([a-z_.]+)\.([A-Z_]+)` \|$", TEXT, re.MULTILINE)
UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@pytest.mark.parametrize(("what", "number", "unit", "module", "name"), ROWS, ids=[row[0] for row in ROWS])
def test_a_limit_is_that_of_the_code(what: str, number: str, unit: str, module: str, name: str) -> None:
    assert int(number.replace(",", "")) * UNITS[unit] == getattr(importlib.import_module(module), name), what


def test_every_row_of_the_table_is_checked() -> None:
    table = TEXT[TEXT.index("## Limits") :]
    assert len(ROWS) == len(re.findall(r"^\| ", table, re.MULTILINE)) - 1, "all but the heading"


def test_the_limits_in_words_are_those_of_the_code() -> None:
    session = Session(["127.0.0.1"])
    assert f"Redirects end after {session._session.max_redirects}, connecting" in TEXT
    connect, read = inspect.signature(Session).parameters["timeout"].default
    assert f"after {connect:.0f} s, and a silent server after {read:.0f} s" in TEXT
    run = RunSettings()
    assert f"`run.sample_deadline`, {run.sample_deadline / 3600:.0f} h" in TEXT
    assert f"`run.finish_deadline`, {run.finish_deadline / 60:.0f} min" in TEXT
    assert f"{run.attempts} attempts (`run.attempts`)" in " ".join(TEXT.split())


def test_what_the_page_names_is_there() -> None:
    root = Path(__file__).parents[1]
    assert (root / "deploy/networkpolicy.yaml").is_file()
    assert "## Hardening" in (root / "docs/operations.md").read_text()
