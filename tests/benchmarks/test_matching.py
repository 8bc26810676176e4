"""The benchmark of matching at a tiny size: every answer is right, and what it counts is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import matching


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_vectors_are_found_as_by_brute_force(rng: np.random.Generator) -> None:
    row = matching.one_size(2_500, 40, 500, rng)
    assert row["right"] == 1
    assert row["rows"] >= 40 * matching.TOP
    assert row["index_mib"] > 2_500 * 512 * 5 / 2**20
    assert row["verify_cpu_s"] > 0
    assert "2,500" in matching.markdown({"vectors": [row], "hashes": []})


def test_hashes_are_found_as_by_brute_force(rng: np.random.Generator) -> None:
    row = matching.hash_lookups(30_000, 300, 100, rng)
    assert row["right"] == 1
    assert row["found"] > 100  # of 300 with up to 40 bits changed about three quarters


def test_an_index_alone_is_searched_as_by_brute_force_and_its_row_put_beside_others(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"vectors": [1], "indexes": [{"references": 9_000_000}, {"references": 5_000}]}))
    matching.one_index(5_000, 45, file)
    found = json.loads(file.read_text())
    assert found["vectors"] == [1]
    assert [row["references"] for row in found["indexes"]] == [5_000, 9_000_000]
    row = found["indexes"][0]
    assert row["right"] == 1
    assert row["rows"] >= 45 * matching.TOP
    assert row["index_mib"] > 5_000 * 512 * 5 / 2**20
