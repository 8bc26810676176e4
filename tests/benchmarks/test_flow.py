"""The flow benchmark: pairs by LoRA, the best fixed weight of each, the base alone, times of membership, what fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from audit.config import Settings
from audit.demo import FLOW_BASE, FLOW_CHECKPOINTS
from audit.evidence.membership import level_of
from audit.workspace import Workspace
from benchmarks import flow, flow_levels, tables
from benchmarks.flow_tables import by_set, gains
from benchmarks.grid import Job, available
from benchmarks.judge import JudgeName

RESULTS = Path(flow.__file__).parent / "results"


def row(checkpoint: str, way: flow.Way, value: float) -> dict[str, object]:
    figures = {"as": value, "a_esr_07": value / 2, "a_esr_06": value, "control_as": 0.3, "control_a_esr_07": 0.0}
    return {"checkpoint": checkpoint, **dict(zip(("method", "w", "k"), way, strict=True)), **figures}


ROWS = [
    row(name, way, value + more)
    for name, more in (("a", 0.0), ("b", 0.1))
    for way, value in (
        (flow.DIRECT, 0.4), (flow.CFG, 0.45), (flow.AUTO, 0.6), (("model_guidance", 2.0, 0.0), 0.61 - more),
        (("model_guidance", 5.0, 0.0), 0.5), (("model_guidance", None, -0.02), 0.59), (flow.ALONE, 0.1),
    )
]  # fmt: skip


def test_gains_are_paired_by_lora_and_the_best_weight_is_each_ones_own() -> None:
    found = {one["less"]: one["as"][0] for one in flow.gained(ROWS)}
    assert found == pytest.approx(
        {"cfg": 0.15, "direct": 0.2, "base alone": 0.5, "w = 2.0": 0.04, "w = 5.0": 0.1, "w = auto, k = -0.02": 0.01,
         "best fixed w of each": 0.04}, abs=1e-9
    )  # fmt: skip


def test_a_lora_that_lacks_a_way_counts_in_no_pair_of_it_and_a_judge_that_did_not_speak_has_no_figure() -> None:
    some = [one for one in ROWS if (one["checkpoint"], flow.way_of(one)) != ("b", flow.CFG)]
    (cfg,) = (one for one in flow.gained(some) if one["less"] == "cfg")
    assert (cfg["sets"], cfg["as"][0]) == (1, pytest.approx(0.15))
    assert cfg["sscd_native_as"] is None
    assert "absent" in flow._span(cfg["sscd_native_as"])


def scored(auc: float, choice: str = flow_levels.CHOSEN) -> dict[str, object]:
    return {"checkpoint": "a", "choice": choice, "auc": auc, "tpr_at_fpr_1": 0.5}


def test_what_fails_is_said() -> None:
    found = {"recovered": flow.recovered(ROWS), "remembered": {"x": flow_levels.remembered([scored(0.85)])}}
    assert flow.failing(found, "x") == ["membership's mean AUC of 0.850 is below 0.9"]
    worse = [{**one, "as": 0.1} if flow.way_of(one) == flow.AUTO else one for one in ROWS]
    found["recovered"] = flow.recovered(worse)
    assert flow.failing(found, "x")[0] == "model guidance (AS 0.100) is behind CFG (0.500)"


def test_choices_of_times_cost_the_same_and_the_first_is_what_audits_take() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    levels = [level_of(t, "flow_prediction", scheduler) for t in (100, 300, 500)]
    assert flow_levels.CHOICES[flow_levels.CHOSEN] == tuple(round(1000 * one.sigma) for one in levels)
    assert {len(chosen) for chosen in flow_levels.CHOICES.values()} == {1, flow_levels.NOISES}
    assert flow_levels.shifted((0, 500, 1000), 3) == (0, 750, 1000)
    gains = {one["choice"]: one["gain_auc"][0] for one in flow_levels.remembered([scored(0.8), scored(0.9, "even")])}
    assert gains == pytest.approx({flow_levels.CHOSEN: 0.0, "even": -0.1})


def test_the_page_of_results_has_the_tables_of_what_was_measured() -> None:
    half = json.loads((RESULTS / "flow-half.json").read_text())
    parts = [tables.markdown(RESULTS / "flow.json"), *(part(half, tables.table) for part in (gains, by_set))]
    printed = [line for part in parts for line in part.splitlines() if line.startswith("|")]
    assert len(printed) > 60
    page = (RESULTS.parents[1] / "docs" / "results.md").read_text().splitlines()
    assert [line for line in printed if line not in page] == []


def test_a_stopped_run_goes_on_and_the_base_alone_is_scored_on_as_many_images(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (recipe,) = available(FLOW_CHECKPOINTS)
    ways = (Settings(steps=2, images_per_training_image=1),)
    job = Job(recipe, ways, FLOW_CHECKPOINTS, FLOW_BASE, tmp_path, judge=JudgeName.none)
    place = flow.opened(tmp_path, False)
    guided, alone = flow.extracted(job, place)
    assert (flow.way_of(guided), flow.way_of(alone)) == (flow.AUTO, flow.ALONE)
    assert guided["images"] == alone["images"] == 8
    assert guided["w_taken"] == pytest.approx(1 + 1.45 / guided["prediction_change"] ** 2, abs=0.01)
    assert alone["as"] < guided["as"]
    workspace: Workspace = place.workspace
    sampled = {path: path.stat().st_mtime_ns for path in workspace.root.glob("tables/*generations/**/*.parquet")}
    assert len(sampled) == 2
    assert flow.extracted(job, place) == [guided, alone]
    assert {path: path.stat().st_mtime_ns for path in sampled} == sampled
    assert not list(workspace.root.glob("spool/*"))
