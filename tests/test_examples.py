"""The examples run as their docstrings say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
