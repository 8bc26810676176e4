"""What a run does once an audit, and once a process: counted, as it creeps in unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.counts import counts_of_a_run


@pytest.mark.parametrize("audits", [1, 10])
def test_a_run_does_everything_once(tmp_path: Path, audits: int) -> None:
    found = counts_of_a_run(audits, tmp_path)
    for what in ("jobs made", "ids computed", "checkpoints hashed"):
        assert found[what] == audits, what
    for what in ("bases located", "bases loaded", "descriptors loaded"):
        assert found[what] == 1, what
    assert found["DuckDB connections"] <= 12 + 3 * audits  # two, and what is asked again after some seconds
    assert found["listings of files"] <= 106 + 76 * audits  # a table that audits write and read is seven of them
