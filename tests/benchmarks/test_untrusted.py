"""The benchmark of the boundary runs at a tiny size, both ways."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.untrusted import main


def test_both_ways_are_measured_side_by_side(tmp_path: Path) -> None:
    main(headers=2, pictures=2, rounds=1, json_file=tmp_path / "results" / "untrusted.json")
    found = json.loads((tmp_path / "results" / "untrusted.json").read_text())
    assert [row["what"] for row in found["rows"]] == ["header", "picture, one by one", "picture, described"]
    assert all(row["ratio"] == row["child_per_second"] / row["here_per_second"] > 0 for row in found["rows"])
    assert found["start_seconds"] > 0
