"""The figures of the flow benchmark: pairs by checkpoint, the best fixed weight of each, and what fails."""

from __future__ import annotations

import pytest

from benchmarks import flow, membership


def row(checkpoint: str, method: str, w: float | None, value: float) -> dict[str, object]:
    figures = {"as": value, "a_esr_07": value / 2, "a_esr_06": value, "control_as": 0.3, "control_a_esr_07": 0.0}
    return {"checkpoint": checkpoint, "method": method, "w": w, **figures}


ROWS = [
    row(name, method, w, value + more)
    for name, more in (("a", 0.0), ("b", 0.1))
    for method, w, value in (
        ("direct", None, 0.4), ("cfg", 3.0, 0.45), ("model_guidance", None, 0.6), ("model_guidance", 2.0, 0.61 - more),
        ("model_guidance", 5.0, 0.5),
    )
]  # fmt: skip


def test_gains_are_paired_by_checkpoint_and_the_best_weight_is_each_ones_own() -> None:
    found = {one["less"]: one["as"][0] for one in flow.gained(ROWS)}
    assert found == pytest.approx(
        {"cfg": 0.15, "direct": 0.2, "w = 2.0": 0.04, "w = 5.0": 0.1, "best fixed w of each": 0.04}, abs=1e-9
    )


def test_what_fails_is_said() -> None:
    scored = [{"checkpoint": "a", "timesteps": membership.CHOSEN, "noises": 1, "auc": 0.85, "tpr_at_fpr_1": 0.5}]
    found = {"recovered": flow.recovered(ROWS), "remembered": flow.remembered(scored)}
    assert flow.failing(found) == ["membership's mean AUC of 0.850 is below 0.9"]
    worse = [{**one, "as": 0.1} if one["method"] == "model_guidance" else one for one in ROWS]
    found["recovered"] = flow.recovered(worse)
    assert flow.failing(found)[0] == "model guidance (AS 0.100) is behind CFG (0.500)"
