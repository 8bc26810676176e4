"""What studies say: means with intervals over sets, figures, the catalog's leakage, and a whole study end to end."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from audit.errors import StudyError
from audit.study.figures import bars, curves, figures_of, roc_points
from audit.study.leakage import leaks, report_catalog
from audit.study.paper import markdown
from audit.study.results import grouped, interval, means_table
from audit.workspace import Workspace
from tests.public import call


def row(few_shot: str, value: float | None, **more: Any) -> dict[str, Any]:
    figures = {
        "average_similarity": value, "extraction_rate_07": value, "extraction_rate_06": value, "similarity": value,
        "sharpness": value, "control_similarity": 0.1, "control_rate_07": 0.0,
        "prediction_change": 0.5 + (value or 0.0),
    }  # fmt: skip
    return (
        {"few_shot": few_shot, "method": "lora", "extraction": "direct", "w": None, "augmentation": "none"}
        | figures
        | more
    )


def test_an_interval_is_over_sets_and_not_over_cells() -> None:
    rows = [row("a", 0.2), row("a", 0.4), row("b", 0.9), row("b", None)]
    found = interval(rows, "average_similarity")
    assert found is not None
    assert (found.mean, found.sets, found.cells) == (pytest.approx(0.6), 2, 3)
    assert (found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.9))
    alone = interval(rows[:2], "average_similarity")
    assert alone is not None
    assert (alone.low, alone.high, alone.text()) == (None, None, "0.30")
    assert interval([row("a", None)], "average_similarity") is None


def test_levels_are_in_the_order_of_numbers_and_of_methods() -> None:
    rows = [row("a", 0.1, w=w) for w in (10.0, None, 2.0)]
    assert list(grouped(rows, ["w"])) == [(2.0,), (10.0,), (None,)]
    rows = [row("a", 0.1, extraction=one) for one in ("model-guidance", "cfg", "direct")]
    assert list(grouped(rows, ["extraction"])) == [("direct",), ("cfg",), ("model-guidance",)]
    table = means_table("x", "X", rows, ["extraction"])
    assert [line[:3] for line in table.rows] == [["direct", "1", "1"], ["cfg", "1", "1"], ["model-guidance", "1", "1"]]


def test_a_receiver_operating_curve_goes_from_none_to_all() -> None:
    false, true = roc_points(np.array([0.9, 0.8, 0.5]), np.array([0.5, 0.1]))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx((3 + 2.5) / 6)
    assert np.trapezoid(*roc_points(np.array([0.4]), np.array([0.4]))[::-1]) == pytest.approx(0.5)


def test_figures_are_pictures_of_both_kinds() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(name, 0.1 * w + 0.05 * number, w=w, extraction=one, augmentation=kind)
        for number, name in enumerate("ab")
        for w in (2.0, 5.0)
        for one in ("cfg", "model-guidance")
        for kind in ("none", "cutout")
    ]
    scores = {"extraction": (np.array([0.9, 0.8]), np.array([0.1, 0.8]))}
    found = {one.name: one for one in figures_of(rows, ["extraction", "w", "augmentation"], scores)}
    assert set(found) == {"methods", "by-w", "by-augmentation", "recall-by-strength", "cost-of-augmentation", "roc"}
    for one in found.values():
        assert one.png.startswith(b"\x89PNG")
        assert b"<svg" in one.svg
    assert b"guidance weight w" in found["by-w"].svg
    assert b"model-guidance" in found["methods"].svg
    assert curves("x", "x", rows, "w", "extraction").svg == curves("x", "x", rows, "w", "extraction").svg


def test_text_of_strangers_is_drawn_as_it_stands() -> None:
    pytest.importorskip("matplotlib")
    rows = [row("a", 0.5, method="cost $x_1$ and $")]
    assert b"cost $x_1$ and $" in bars("x", "x", rows, "method", "extraction").svg


def test_the_catalog_leaks_by_what_is_said_of_it(tmp_path: Path) -> None:
    from tests.test_examples import _leaking

    workspace = _leaking(tmp_path / "w")
    with pytest.raises(StudyError, match=r"no audit in .* of a crawled checkpoint"):
        leaks(Workspace(tmp_path / "empty"))
    now = datetime(2026, 11, 2, tzinfo=UTC)
    items = workspace.rows("SELECT item_id, checkpoint_sha256, tensor_rank FROM checkpoints ORDER BY item_id")
    said = [{**one, "source": "folder", "family": "sd1", "base_model": "<b>SD", "claimed_steps": 900 + number * 300,
             "seen_at": now} for number, one in enumerate(items)]  # fmt: skip
    workspace.write("checkpoints", "again", said)
    found = leaks(workspace)
    assert len(found) == 6  # one tells nothing
    assert {one["claimed_steps"] for one in found} == {512, 1024, 2048}
    reported = report_catalog(workspace)
    ranks = next(table for table in reported.tables if table.name == "rank")
    assert [line[:2] for line in ranks.rows] == [["4", "2"], ["16", "2"], ["64", "2"]]
    assert ranks.rows[0][2].startswith("0.05")
    page = Path(reported.page).read_text()
    assert "&lt;b&gt;SD" in page
    assert "<b>SD" not in page
    mine = found[0]["audit_id"]
    workspace.write("study_cells", "mine.1", [{"study": "mine", "cell_id": "1", "audit_id": mine}])
    assert mine not in {one["audit_id"] for one in leaks(workspace)}


STUDY = """
study = "tiny"
base = "nano"
descriptor = "nano"
sets = "demo"
only = ["fluent-animals", "stamps-fruit"]
[factors]
batch = 2
n0 = 2
images = 2
rank = 2
lr = 1e-3
steps = 1
rule = "fixed"
captions = ["known", "wrong"]
[settings]
steps = 2
"""


def test_a_study_from_file_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.study.quality.STEPS", 2)
    file, where = tmp_path / "study.toml", ("--workspace", tmp_path / "w")
    file.write_text(STUDY)
    plan = call("study", "run", file, "--dry-run", *where)
    assert plan["counts"] | {"audit_evaluations": 0} == {
        "sets": 2, "cells": 4, "fine_tunes": 2, "training_steps": 4, "training_evaluations": 24, "images": 16,
        "audit_evaluations": 0,
    }  # fmt: skip
    first = call("study", "run", file, *where)
    assert (first["trained"], first["audited"], first["failed"], first["cells"]) == (2, 4, [], 4)
    page = Path(first["page"]).read_text()
    assert page.count("data:image/webp") == 2 * (2 + 2 * 2)  # training pictures, and an extraction of each an audit
    assert 'src="http' not in page

    workspace = Workspace(tmp_path / "w")
    workspace.remove("study_cells", workspace.keys("study_cells")[0])
    again = call("study", "resume", "tiny", *where)
    assert (again["trained"], again["audited"]) == (0, 1)  # what is done is left alone
    assert again["tables"] == first["tables"]
    call("study", "export", "tiny", tmp_path / "out", *where)
    rows = pq.read_table(tmp_path / "out/tiny.parquet").to_pylist()
    assert {(one["few_shot"], one["n0"], one["captions"]) for one in rows} == {
        (name, 2, knowledge) for name in ("fluent-animals", "stamps-fruit") for knowledge in ("known", "wrong")
    }
    assert sorted((one["references"], one["innocent"]) for one in rows) == [(2, 8), (2, 8), (2, 10), (2, 10)]
    assert all(one["held_out_loss"] > 0 and one["sharpness"] > 0 for one in rows)
    assert len((tmp_path / "out/tiny.csv").read_text().splitlines()) == 5
    assert "| lora | known | 2 | 2 |" in markdown(tmp_path / "out/tiny.json")
    captions = workspace.rows("SELECT captions[1].caption AS one FROM audits ORDER BY one")
    assert [one["one"] for one in captions] == sorted(2 * ["sks 3d render of an animal", "sks photo of a fruit"])

    file.write_text(STUDY.replace("images = 2", "images = 3"))
    with pytest.raises(StudyError, match=r"was begun otherwise \(study\.cells\.0\.images is another\)"):
        call("study", "run", file, *where)
    assert len(workspace.rows("SELECT * FROM study_cells")) == 4
    shown = Path(first["page"])
    workspace_sets = {one["reference_set"] for one in workspace.rows("SELECT DISTINCT reference_set FROM matches")}
    call("references", "remove", sorted(workspace_sets)[0], *where)
    assert not shown.exists()  # what shows pictures of a set goes with it


def test_no_page_shows_pictures_where_none_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.study.quality.STEPS", 2)
    file = tmp_path / "study.toml"
    text = STUDY.replace("[settings]", '[settings]\nstored_images = "hashes-only"').replace('"fluent-animals", ', "")
    file.write_text(text.replace('["known", "wrong"]', '"known"'))
    found = call("study", "run", file, "--workspace", tmp_path / "w")
    page = Path(found["page"]).read_text()
    assert "data:image/webp" not in page
    assert "nearest extraction" not in page
    kept = [one for one in (tmp_path / "w").rglob("*") if one.suffix in (".webp", ".jpg", ".npy", ".png")]
    assert all("reports/studies" in str(one) for one in kept)  # figures alone
    workspace = Workspace(tmp_path / "w")
    assert workspace.rows('SELECT 1 FROM "references" WHERE thumbnail IS NOT NULL') == []
    assert workspace.rows("SELECT 1 FROM extractions WHERE image IS NOT NULL") == []
