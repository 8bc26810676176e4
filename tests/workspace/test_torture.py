"""A short torture run; ``python -m tests.torture --minutes N`` is the long one, TORTURE_SECONDS lengthens this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torture import Said, problems, torture

SECONDS = float(os.environ.get("TORTURE_SECONDS", "20"))


@pytest.mark.timeout(SECONDS + 200)
def test_every_count_is_right_whatever_is_killed(tmp_path: Path) -> None:
    outcome = torture(tmp_path, SECONDS)
    assert outcome.wrong == []
    assert outcome.polls > 3
    assert outcome.kills > 1
    assert outcome.acts > 20


def test_the_torture_run_knows_a_wrong_count() -> None:
    said = Said({"failures/w0-1": [("append", 1, True)], "evaluations/w0-1": [("write", 2, True)]})
    rows = [{"audit_id": "w0-1:1", "stage": "0"}, {"audit_id": "w0-1:1", "stage": "1"}]
    keyed = [{"audit_id": "w0-1", "kind": str(n), "images": 2} for n in range(3)]
    assert problems(said, rows, keyed, said) == []
    assert problems(said, rows + rows, keyed, said)
    assert problems(said, [], keyed, said)
    assert problems(said, rows, keyed * 2, said)
    assert problems(said, rows, [], said)
    removed = Said({**said.acts, "failures/w0-1": [("append", 1, True), ("remove-where", 3, True)]})
    assert problems(removed, rows, keyed, removed)
    assert problems(removed, [], keyed, removed) == []
