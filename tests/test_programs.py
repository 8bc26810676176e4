"""Every `python -m` of the repository says what it is for."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "testbed", "tests")


def programs() -> list[str]:
    """The modules that do something when they are run."""
    found = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        guards = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        if any(ast.unparse(node.test) == "__name__ == '__main__'" for node in guards):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return sorted(found)


def test_all_kinds_of_programs_are_found() -> None:
    assert {"benchmarks.counts", "benchmarks.gpu", "docs.generate", "testbed.xl", "tests.fuzz"} <= {*programs()}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", programs())
def test_a_program_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, whose environment is left as it was: importing torch for each would take minutes."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert said.out.lower().lstrip().startswith("usage: ")
    assert "--help" in said.out
