"""Pictures of membership: what they show and cost, where none may be kept, and how they go."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from audit import api
from audit.bench import Bench
from audit.config import Evidence, Settings, StoredImages
from audit.demo import set_folder
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.errors import NotFiniteError
from audit.evidence import effort
from audit.job import Job, Request, resolve
from audit.models.pair import ModelPair
from audit.references import ReferenceSets, denoised
from audit.stages import Membership, Remembered
from audit.workspace import Workspace
from tests.conftest import BASE, KOHYA

ROWS = """SELECT d.*, m.score, r.name, r.thumbnail FROM denoised AS d
JOIN memberships AS m USING (audit_id, reference_set, reference_id)
JOIN "references" AS r USING (reference_set, reference_id) ORDER BY m.score DESC"""
EACH = effort.BASE_PICTURES + effort.TUNED_PICTURES


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture
def animals(workspace: Workspace, bench: Bench, animal_pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with the set "animals", ten training pictures and ten others, and their latents."""
    monkeypatch.setattr(effort, "NOISES", 1)
    add(workspace, bench, "animals", animal_pictures)
    return workspace


def add(workspace: Workspace, bench: Bench, name: str, folder: Path, thumbnails: bool = True) -> None:
    api.add_references(
        name, folder, descriptor="nano", workspace=workspace, bases=[str(BASE)], bench=bench, thumbnails=thumbnails
    )


def job_of(bench: Bench, **settings: Any) -> Job:
    asked = replace(Settings(evidence=Evidence.membership), **settings)
    return resolve(Request(KOHYA, str(BASE), n0=10, settings=asked), "nano", bench)


def measure(workspace: Workspace, bench: Bench, job: Job, *sets: str) -> Remembered:
    [found] = run_stages([Membership(sets or ("animals",))], job, Place(workspace, bench))
    assert isinstance(found, Remembered)
    return found


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), np.float32)


def apart(row: dict[str, Any], part: str) -> float:
    return float(np.abs(pixels(row[part]) - pixels(row["thumbnail"])).mean())


def test_what_was_learnt_comes_back_out_of_the_noise_and_what_was_not_does_not(
    animals: Workspace, bench: Bench
) -> None:
    measure(animals, bench, job_of(bench))
    rows = animals.rows(ROWS)
    assert len(rows) == 10
    assert [row["name"].partition("/")[0] for row in rows] == ["train"] * 9 + ["control"]
    [lowest] = animals.rows("SELECT min(score) AS score FROM memberships")
    assert rows[-1]["score"] == lowest["score"]
    for row in rows[:9]:
        for way in ("estimate", "replay"):
            assert apart(row, f"tuned_{way}") < apart(row, f"base_{way}") < apart(row, "noised"), row["name"]
    learnt = np.mean([apart(row, "base_replay") - apart(row, "tuned_replay") for row in rows[:9]])
    assert learnt > 5 > apart(rows[-1], "base_replay") - apart(rows[-1], "tuned_replay")
    assert {(row["timestep"], row["steps"], row["evaluations"]) for row in rows} == {(500, 8, EACH)}
    assert all(row[part][:4] == b"RIFF" for row in rows for part in denoised.PARTS)


def test_what_the_pictures_cost_is_counted(animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("predict_base", "predict_tuned"):
        inner = getattr(ModelPair, name)

        def counted(self: ModelPair, latents: Any, *rest: Any, inner: Any = inner) -> Any:
            made.append(len(latents))
            return inner(self, latents, *rest)

        monkeypatch.setattr(ModelPair, name, counted)
    job = job_of(bench)
    bench.pair(job, animals)
    made.clear()
    found = measure(animals, bench, job)
    assert sum(made) == found.evaluations
    assert found.picture_evaluations == 10 * EACH <= job.settings.membership_evaluations / effort.SHARE


def test_all_sets_have_their_turn_and_a_short_budget_has_fewer(animals: Workspace, bench: Bench) -> None:
    add(animals, bench, "few", set_folder("fluent-animals", "train"))
    measure(animals, bench, job_of(bench, membership_evaluations=10 * 5 * EACH), "animals", "few")
    sql = "SELECT reference_set, count(*) AS n FROM denoised WHERE audit_id = ? GROUP BY ALL ORDER BY ALL"
    job = job_of(bench, membership_evaluations=10 * 5 * EACH)
    assert [row["n"] for row in animals.rows(sql, [job.id])] == [3, 2]
    few = job_of(bench, membership_evaluations=10 * EACH - 1)
    assert measure(animals, bench, few).picture_evaluations == 0
    assert animals.rows(sql, [few.id]) == []


def test_hashes_only_and_pictures_that_are_not_kept_have_none(
    animals: Workspace, bench: Bench, animal_pictures: Path
) -> None:
    found = measure(animals, bench, job_of(bench, stored_images=StoredImages.hashes_only))
    assert (found.references, found.picture_evaluations) == (20, 0)
    assert animals.rows("SELECT 1 FROM denoised") == []
    measure(animals, bench, job_of(bench))
    assert len(animals.rows("SELECT 1 FROM denoised")) == 10
    add(animals, bench, "animals", animal_pictures, thumbnails=False)
    assert_gone(animals)
    assert measure(animals, bench, job_of(bench, seed=1)).picture_evaluations == 0


def test_removing_a_set_removes_its_pictures(animals: Workspace, bench: Bench) -> None:
    measure(animals, bench, job_of(bench))
    ReferenceSets(animals).remove("animals")
    assert_gone(animals)


def assert_gone(workspace: Workspace) -> None:
    """Neither a row nor a file has a WebP."""
    assert workspace.rows("SELECT 1 FROM denoised") == []
    files = [file for file in (workspace.root / "tables/denoised").rglob("*") if file.is_file()]
    assert not any(b"WEBP" in file.read_bytes() for file in files)


def test_stopped_while_pictures_are_made_nothing_is_measured_twice(
    animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, inner = job_of(bench), denoised.webp

    def stopped(picture: np.ndarray) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(denoised, "webp", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(animals, bench, job)
    assert not Membership(["animals"]).done(job, animals)
    monkeypatch.setattr(denoised, "webp", inner)
    found = measure(animals, bench, job)
    assert (found.base_evaluations, found.tuned_evaluations) == (0, 0)
    assert found.picture_evaluations == 10 * EACH
    assert len(animals.rows(ROWS)) == 10
    assert Membership(["animals"]).done(job, animals)


def test_an_answer_that_is_not_finite_costs_its_picture_and_no_score(
    animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = denoised.denoise

    def broken(*arguments: Any) -> Any:
        found = inner(*arguments)
        found[0, 3] = float("inf")
        return found

    monkeypatch.setattr(denoised, "denoise", broken)
    measure(animals, bench, job_of(bench))
    assert len(animals.rows("SELECT 1 FROM denoised")) == 9

    def overflowing(self: ModelPair, latents: Any) -> Any:
        raise NotFiniteError("the decoded images are not finite")

    monkeypatch.setattr(ModelPair, "decode", overflowing)
    found = measure(animals, bench, job_of(bench, seed=1))
    assert (found.references, found.picture_evaluations) == (20, 10 * EACH)  # spent in vain
    assert len(animals.rows("SELECT 1 FROM denoised")) == 9
    assert all(row["score"] is not None for row in animals.rows("SELECT score FROM memberships"))
