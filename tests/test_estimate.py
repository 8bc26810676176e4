"""`lora-audit estimate`: known speeds and memory, the backlog of a catalog, and what the command says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from audit.claims.captions import DEFAULT_TRAINING_IMAGES
from audit.cli.estimate import estimate_row, model_row
from audit.config import Evidence, Method
from audit.estimate import (
    CEILING,
    DEVICES,
    Backlog,
    Estimate,
    Span,
    Work,
    backlog_of,
    estimate,
    hours,
    model_of,
    seconds_an_image,
    unseen_items,
)
from audit.models.batches import GPU_BATCH
from audit.models.published import PUBLISHED
from audit.models.sizing import CONTEXT_BYTES, Sizing, size
from audit.sampling.guidance import ClassifierFree, Direct, ModelGuidance
from audit.workspace import Workspace
from tests import warm

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return warm.run("estimate", *arguments)


class Sizings(dict[str, Sizing]):
    """Of the published models those that are asked for."""

    def __missing__(self, name: str) -> Sizing:
        self[name] = size(name)
        return self[name]


@pytest.fixture(scope="module")
def sizings() -> dict[str, Sizing]:
    return Sizings()


# Seconds an image of 30 evaluations on a card of 800 TFLOP/s at 40 to 60 % of it, decoding left out
KNOWN = {"sd15": (0.05, 0.075), "sdxl": (0.42, 0.63), "sd3.5-medium": (0.70, 1.06), "flux-dev": (4.6, 7.0)}


@pytest.mark.parametrize("name", list(KNOWN))
def test_speeds_are_the_known_ones(sizings: dict[str, Sizing], name: str) -> None:
    low, high = KNOWN[name]
    found = seconds_an_image(sizings[name].sampling.evaluation.flops, 30, 0, 800)
    assert found.low == pytest.approx(low, rel=0.02)
    assert found.high == pytest.approx(high, rel=0.02)
    for device in ("h100-pcie", "h100"):  # 756 and 989 TFLOP/s by the data sheet, decoding included
        image = estimate(sizings[name], device, Work()).seconds_an_image
        assert image.low < high
        assert image.high > low


def test_the_settings_decide_how_much_is_evaluated(sizings: dict[str, Sizing]) -> None:
    for guidance, method in (
        (Direct, Method.direct), (ClassifierFree, Method.cfg), (ModelGuidance, Method.model_guidance),
    ):  # fmt: skip
        assert Work(method, steps=7).evaluations == 7 * guidance.evaluations
    assert Work().images == 500
    assert Work(n0=3, images_per_training_image=4).images == 12
    sdxl = sizings["sdxl"]
    whole, direct = (estimate(sdxl, "h100", work) for work in (Work(), Work(Method.direct)))
    assert direct.seconds_an_image.low < whole.seconds_an_image.low < 2 * direct.seconds_an_image.low
    assert whole.seconds_an_audit.high == pytest.approx(
        500 * whole.seconds_an_image.high + whole.seconds_of_membership.high
    )
    assert whole.hours_an_audit.high == pytest.approx(whole.seconds_an_audit.high / 3600)
    assert Work.n0 == DEFAULT_TRAINING_IMAGES
    assert (Work().membership, Work(membership_evaluations=700).membership) == (2500 + 10 * 25, 700 + 2 * 25)
    assert Work(evidence=Evidence.extraction).membership == Work(evidence=Evidence.membership).images == 0
    extraction, alone = (
        estimate(sdxl, "h100", Work(evidence=one)) for one in (Evidence.extraction, Evidence.membership)
    )
    assert extraction.seconds_of_membership == Span(0.0, 0.0)
    assert alone.seconds_an_audit == alone.seconds_of_membership == whole.seconds_of_membership
    assert whole.seconds_an_audit.low == pytest.approx(extraction.seconds_an_audit.low + alone.seconds_an_audit.low)
    evaluation, decoding = sdxl.sampling.evaluation.flops, sdxl.sampling.decoding.flops
    at_best = 0.6 * DEVICES["h100"].teraflops * 1e12
    assert alone.seconds_an_audit.low == pytest.approx((2750 * evaluation + 50 * decoding) / at_best)
    assert CEILING == GPU_BATCH


def test_the_batch_that_fits_is_within_the_memory(sizings: dict[str, Sizing]) -> None:
    for model in (*KNOWN, "qwen-image", "flux2-dev"):
        sizing = sizings[model]
        for name, device in DEVICES.items():
            found = estimate(sizing, name, Work())
            memory = device.gib * 2**30
            for batch, changed in (
                (found.batch_everything, sizing.footprint.everything),
                (found.batch_attention, sizing.footprint.attention),
            ):
                if batch:
                    assert sizing.device_bytes(changed, batch) + CONTEXT_BYTES <= memory
                if batch < CEILING:  # another image would go into the margin, or beyond the memory
                    resident = sizing.footprint.resident_bytes(changed) + CONTEXT_BYTES
                    more = sizing.device_bytes(changed, batch + 1) - sizing.footprint.resident_bytes(changed)
                    assert more > 0.85 * (memory - resident) - 1
            assert found.batch_everything <= found.batch_attention
    assert estimate(sizings["flux-dev"], "rtx3060", Work()).batch_attention == 0
    assert estimate(sizings["sd15"], "h100", Work()).batch_everything == CEILING


def row(number: int, **values: Any) -> dict[str, Any]:
    now = datetime(2026, 11, 1, tzinfo=UTC)
    identity = f"{number:064x}"
    return {"item_id": f"folder:{number}", "source": "folder", "name": f"{number}.safetensors", "state": "stored",
            "identity": identity, "checkpoint_sha256": identity, "format": "lora-kohya", "family": "sd1",
            "first_seen_at": now, "seen_at": now} | values  # fmt: skip


def make_catalog(folder: Path) -> Workspace:
    workspace = Workspace(folder)
    twice = row(3, item_id="folder:3b")
    workspace.append("checkpoints", [
        row(1, training_images=4), row(2), row(3, training_images=7), twice,
        row(4, family="sdxl"), row(5, family="sd3", base_model="SD 3.5 Medium"), row(6, family="sd3"),
        row(7, family="other"), row(8, family=None), row(9, family="other"),
        row(10, state="opted-out"), row(11, format=None), row(12, identity=None, state="listed"), row(13),
    ])  # fmt: skip
    workspace.write("audits", "a" * 32, [{"audit_id": "a" * 32, "checkpoint_sha256": row(13)["checkpoint_sha256"]}])
    return workspace


def test_the_backlog_is_what_has_no_audit(tmp_path: Path) -> None:
    workspace = make_catalog(tmp_path / "w")
    found = backlog_of(workspace, None, 10)
    assert {(one.family, one.model): (one.networks, one.training_images) for one in found} == {
        ("sd1", "sd15"): (3, 4 + 10 + 7),
        ("sdxl", "sdxl"): (1, 10),
        ("sd3", "sd3.5-medium"): (1, 10),
        ("sd3", "sd3.5-large"): (1, 10),
        ("other", None): (2, 20),
        ("unknown", None): (1, 10),
    }
    assert [one.note for one in found if one.model == "sd3.5-large"] == ["the size is not said: counted as large"]
    assert backlog_of(workspace, 20, 10)[0].training_images == 60
    assert unseen_items(workspace) == 1


def test_every_family_has_a_cost_or_none() -> None:
    assert model_of("sd3", "SD 3.5 Large Turbo") == ("sd3.5-large", "")
    assert model_of("altdiffusion", None)[0] == "sd15"
    assert model_of("flux", "Flux.1 S")[0] == "flux-dev"
    assert model_of("wan", "Wan Video 1.3B t2v") == ("wan2.1-1.3b", "")
    assert model_of("wan", "wan2.1") == ("wan2.1-14b", "the size is not said: counted as 14B")
    assert model_of("wan", "Wan Video 2.2 T2V-A14B") == ("wan2.2-a14b", "")
    assert model_of("wan-5b", None) == ("wan2.2-5b", "")
    assert model_of("other", "Wan Video")[0] is None
    assert model_of(None, None)[0] is None


def test_hours_of_a_backlog_add_up() -> None:
    one = Estimate("sd15", "h100", Span(1.0, 2.0), Span(0, 0), Span(0, 0), 0, 0, 0, 0)
    backlog = [Backlog("sd1", "sd15", 2, 36), Backlog("altdiffusion", "sd15", 1, 36), Backlog("other", None, 5, 50)]
    assert hours(backlog, {"sd15": one}, Work(images_per_training_image=100)) == {"sd15": Span(2.0, 4.0)}
    measured = replace(one, seconds_of_membership=Span(1200.0, 2400.0))
    assert hours(backlog, {"sd15": measured}, Work(images_per_training_image=100)) == {"sd15": Span(3.0, 6.0)}
    alone = hours(backlog, {"sd15": measured}, Work(evidence=Evidence.membership))
    assert alone == {"sd15": Span(1.0, 2.0)}


def test_the_command_estimates_a_backlog_and_leaves_nothing_out(tmp_path: Path) -> None:
    make_catalog(tmp_path / "w")
    options = ("--family", "sd15", "--device", "h100", "--workspace", tmp_path / "w", "--usd-per-hour", "3")
    done = run(*options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (one,) = found["estimates"]
    assert one["usd_an_audit"]["high"] == pytest.approx(3 * one["seconds_an_audit"]["high"] / 3600)
    total = found["backlog"]["hours"]["h100"]
    assert total["all"] == total["sd15"]
    assert total["all"]["high"] == pytest.approx(
        (21 * 50 * one["seconds_an_image"]["high"] + 3 * one["seconds_of_membership"]["high"]) / 3600
    )
    assert found["work"]["evaluations_of_membership"] == 2750
    alone = json.loads(run(*options, "--json", "--evidence", "membership", "--membership-evaluations", "1000").stdout)
    assert (alone["work"]["images"], alone["work"]["evaluations_of_membership"]) == (0, 1100)
    assert found["backlog"]["not_estimated"] == 6
    assert found["models"][0]["evaluation"]["flops"] == pytest.approx(0.803e12, rel=1e-3)
    text = run(*options).stdout
    for words in ("not estimated", "no published model of this family", "unknown", "leave out --family",
                  "1 items are listed and not downloaded", "not measured on a card", "GPU hours"):  # fmt: skip
        assert words in text, words


def test_what_is_not_known_is_refused_in_words() -> None:
    for options, words in (
        (("--family", "sd9"), "choose one of sd15"),
        (("--device", "tpu"), "choose one of rtx3060"),
        (("--family", "sd15", "--resolution", "500"), "a multiple of 16"),
        (("--family", "sd3.5-large", "--device", "h200", "--resolution", "4096"), "does not sample 4096 pixels"),
    ):
        done = run(*options)
        assert done.returncode == 2
        assert words in done.stderr.replace("\n", " "), done.stderr
        assert "Traceback" not in done.stderr


def test_help_teaches_and_needs_no_torch() -> None:
    done = run("--help")
    assert done.returncode == 0
    for words in ("Example", "--usd-per-hour", "an assumption", "h200"):
        assert words in done.stdout
    probe = "import sys, audit.cli, audit.estimate, audit.models.published; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "False\n"


def test_the_documentation_has_the_figures_that_are_printed(sizings: dict[str, Sizing]) -> None:
    text = (ROOT / "docs/models.md").read_text()
    for name in PUBLISHED:
        sizing = sizings[name]
        assert f"| {' | '.join(model_row(sizing))} |" in text, name


def test_the_examples_of_the_documentation_are_what_is_printed(sizings: dict[str, Sizing]) -> None:
    lines = (ROOT / "docs/operations.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    by_title = {device.title: name for name, device in DEVICES.items()}
    rows = [row for row in cells if row[0] in PUBLISHED]
    assert len(rows) > 5
    for row in rows:
        device, image, _, _, *rest = estimate_row(estimate(sizings[row[0]], by_title[row[1]], Work()))
        assert row == [row[0], device, image, *rest]
