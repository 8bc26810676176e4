"""The examples run as their docstrings say."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from audit.workspace import Workspace

ROOT = Path(__file__).parent.parent


def test_crawl_and_audit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/crawl_and_audit.py", tmp_path],
        capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fluent-animals.safetensors" in done.stdout
    assert len(list((tmp_path / "workspace/reports").glob("*.html"))) == 1


def _leaking(folder: Path) -> Workspace:
    """A workspace of audits, of which more recover more pictures the higher their rank is."""
    workspace = Workspace(folder)
    now = datetime(2026, 11, 1, tzinfo=UTC)
    pictures = [
        {
            "reference_set": "mine",
            "reference_id": f"{number:064d}",
            "name": f"{number}.png",
            "descriptor_name": "nano@1",
            "descriptor": [1.0],
            "added_at": now,
        }
        for number in range(10)
    ]
    workspace.write("references", "mine", pictures)
    tables: dict[str, list[dict[str, Any]]] = {"checkpoints": [], "audits": [], "matches": []}
    for number, (rank, matched) in enumerate([(4, 0), (4, 1), (16, 2), (16, 4), (64, 5), (64, 9), (64, 0)]):
        audit_id, sha256 = f"{number:032x}", f"{number:064x}"
        nothing = "no pictures" if number == 6 else None
        tables["checkpoints"].append(
            {"item_id": f"folder:a:{number}", "checkpoint_sha256": sha256, "tensor_rank": rank, "seen_at": now}
        )
        tables["audits"].append(
            {"audit_id": audit_id, "checkpoint_sha256": sha256, "descriptor": "nano@1", "tells_nothing": nothing}
        )
        tables["matches"] += [
            {
                "audit_id": audit_id,
                "rank": place,
                "reference_set": "mine",
                "is_match": place < matched,
                "reference_id": picture["reference_id"],
            }
            for place, picture in enumerate(pictures)
        ]
    for name, rows in tables.items():
        workspace.write(name, "k", rows)
    return workspace


def test_leak_by_rank(tmp_path: Path) -> None:
    _leaking(tmp_path / "w")
    done = subprocess.run(
        [sys.executable, ROOT / "examples/leak_by_rank.py", tmp_path / "w", tmp_path / "leak.svg"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    rows = [line.split() for line in done.stdout.splitlines()[1:4]]
    assert rows == [["4", "2", "5.0%"], ["16", "2", "30.0%"], ["64", "2", "70.0%"]], done.stderr
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "leak.svg").read_text().count("<use") >= 6
    else:
        assert "lora-audit[plots]" in done.stderr


def test_the_notebook_of_the_catalog_runs_as_plain_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    workspace = _leaking(tmp_path / "w")
    now = datetime(2026, 11, 2, tzinfo=UTC)
    items = workspace.rows("SELECT item_id, checkpoint_sha256, tensor_rank FROM checkpoints ORDER BY item_id")
    said = [
        {**one, "source": "folder", "family": "sd1", "base_model": "SD 1.5", "claimed_steps": 900, "seen_at": now}
        for one in items
    ]
    workspace.write("checkpoints", "again", said)
    monkeypatch.setenv("LORA_AUDIT_WORKSPACE", str(tmp_path / "w"))
    notebook = json.loads((ROOT / "examples/leakage.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    out = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(out):
        for cell in cells:
            exec(compile(cell, "examples/leakage.ipynb", "exec"), names)
    text = out.getvalue()
    assert "6 audits of crawled checkpoints" in text
    assert "SD 1.5, 64: 0.70 (0.50 to 0.90) of 2" in text
    figure = eval(cells[-1], names)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_notebook_keeps_small_outputs_of_a_whole_run_and_no_path_of_a_machine() -> None:
    text = (ROOT / "examples/leakage.ipynb").read_text()
    assert len(text) < 200_000
    outputs = [cell["outputs"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(outputs), "run it again: jupyter nbconvert --execute"
    assert not [one for some in outputs for one in some if one["output_type"] == "error"]
    assert not re.search(r"/(home|root|tmp|work|Users|var)/", text)
