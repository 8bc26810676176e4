"""The library: light to import, silent, and what its page says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import audit
from audit.demo import set_folder
from tests.conftest import KOHYA

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_importing_it_loads_nothing_heavy() -> None:
    probe = (
        "import sys, time; started = time.perf_counter(); import audit; took = time.perf_counter() - started; "
        "print({'torch', 'duckdb', 'ray', 'pyarrow', 'numpy', 'typer'} & set(sys.modules), took < 0.2)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "set() True\n"


def test_every_name_it_offers_is_there() -> None:
    for name in audit.__all__:
        assert getattr(audit, name) is not None
        assert name in dir(audit)
    assert re.fullmatch(r"\d+\.\d+.*", audit.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = audit.nothing  # type: ignore[attr-defined]


def test_the_page_of_the_library_runs_and_prints_nothing_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The blocks, one after the other as one program; between them, what they promise."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(KOHYA, "animals.safetensors")
    shutil.copytree(set_folder("fluent-animals", "train"), "paintings")
    blocks = BLOCK.findall((ROOT / "docs/api.md").read_text())
    assert len(blocks) == 10
    names: dict[str, object] = {}
    said = []
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
        said.append(capfd.readouterr().out)
    result, again = names["result"], names["again"]
    assert isinstance(result, audit.Result)
    assert isinstance(again, audit.Result)
    assert result.verdict.alike
    assert (result.matched, result.verdict.said) == ([], "uncalibrated")
    assert said[0].splitlines() == ["uncalibrated", result.verdict.headline, "None", result.page]
    assert Path(result.page).is_file()
    json.dumps(result.as_dict())
    assert set(result.to_arrow()["verdict"].to_pylist()) <= {"match", "possible", "none"}
    [scores] = again.facts.evaluations
    assert scores["kind"] == "training"
    bench = names["bench"]
    assert isinstance(bench, audit.Bench)
    assert bench.loaded_base() is None
    assert "does not exist" in said[-1]
    rows = json.loads(said[-4].replace("'", '"').replace("None", "null"))
    assert [one["pictures"] for one in rows] == [10, 10]  # of both sets
    assert said[-2] == "True []\n"  # the pages are as they were written
    assert said[-3] == "1 []\n"  # one audit, no failure, and everything is as recorded


def test_a_request_and_arguments_for_it_are_not_mixed() -> None:
    with pytest.raises(audit.ConfigError, match="one or the other"):
        audit.scan(audit.Request(KOHYA, "nano"), base="sd15")
    with pytest.raises(audit.ConfigError, match="one or the other"):
        audit.scan(KOHYA, "nano", bench=audit.Bench(), device="cpu")
    with pytest.raises(audit.ConfigError, match="which base model"):
        audit.scan(KOHYA)
    with pytest.raises(audit.ConfigError, match="no base model is configured"):
        audit.run(audit.Config())
