"""What is slow, and what runs alone, is said of files and tests that exist."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ALONE, SLOW

TESTS = Path(__file__).parent


def test_every_place_that_a_tier_names_exists() -> None:
    for place in (*SLOW, *ALONE):
        file, _, name = place.partition("::")
        assert (TESTS / file).exists(), place
        assert not name or f"def {name}(" in (TESTS / file).read_text(), place


def test_what_runs_alone_is_not_in_the_fast_tier() -> None:
    assert all(place in SLOW or place.partition("::")[0] in SLOW for place in ALONE)
