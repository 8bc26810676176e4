"""The benchmark of matching at a tiny size: every answer is right, and what it counts is there."""

from __future__ import annotations

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
