"""What a verdict makes a command end with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import typer

from audit.cli.common import leave
from audit.config import Rule, VerdictSettings
from audit.report.verdict import Alike, verdict_of
from audit.states import Verdict
from tests.report.test_verdict import LACKING, SMALL, WHOLE, chance, evidenced

MATCH, POSSIBLE = chance(0.001, Verdict.match), chance(0.04, Verdict.possible, 1)
LACKED = [WHOLE, replace(LACKING, reference_set="yours")]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({}, 0),
        ({"chances": [POSSIBLE]}, 13),
        ({"chances": [POSSIBLE, MATCH], "set_chances": LACKED, "tells_nothing": "it is noise"}, 10),
        ({"chances": [POSSIBLE], "tells_nothing": "it is noise"}, 11),
        ({"chances": [POSSIBLE], "sets": ["mine", "yours"], "set_chances": LACKED}, 12),
        ({"set_chances": [replace(WHOLE, p=0.04, verdict=Verdict.possible)]}, 13),
        ({"sets": [], "references": 0, "set_chances": []}, 0),
    ],
)
def test_a_verdict_has_its_exit_code(found: dict[str, Any], code: int) -> None:
    assert left_with(verdict_of(evidenced(**found), VerdictSettings())) == code


def test_what_is_possible_by_the_fixed_rule_is_so_too() -> None:
    assert left_with(verdict_of(evidenced(alike=Alike([], [SMALL])), VerdictSettings(Rule.fixed))) == 13


def left_with(verdict: Any) -> int:
    try:
        leave(verdict.said, verdict.tells_nothing is not None)
    except typer.Exit as stop:
        return stop.exit_code
    return 0
