"""The benchmark of adding sets at a tiny size."""

from __future__ import annotations

import os
from pathlib import Path

from audit import add_references
from audit.workspace import Workspace
from benchmarks import ingest


def test_what_is_made_up_is_added_whole(tmp_path: Path) -> None:
    ingest.make_pictures(tmp_path / "pictures", 12, 24)
    ingest.make_tar(tmp_path / "pictures", tmp_path / "shard.tar")
    ingest.make_hashes(tmp_path / "h.csv", 50)
    assert ingest.plain_loop(tmp_path / "pictures") == 12
    place = Workspace(tmp_path / "w")
    sources = {"pictures": 12, "shard.tar": 12, "h.csv": 50}
    for name, number in sources.items():
        assert add_references("a", tmp_path / name, descriptor="pdq", workspace=place).images == number
    ingest.make_vectors(tmp_path / "v.parquet", 30)
    nano = ingest._nano().name
    added = add_references("a", tmp_path / "v.parquet", descriptor="nano", workspace=place, described_by=nano)
    assert (added.images, added.skipped) == (30, [])


def test_a_process_and_what_it_starts_are_looked_at() -> None:
    held, computed = ingest.processes_of(os.getpid())[os.getpid()]
    assert held > 1 << 20
    assert computed > 0
