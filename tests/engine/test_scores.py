"""Scoring a finished audit: no denoiser is loaded for it, and a known ceiling is not computed again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from audit import bench as bench_module
from audit.bench import Bench
from audit.demo import set_folder
from audit.descriptors import Descriptor
from audit.descriptors.base import stacked
from audit.job import Job, Request, resolve
from audit.models.pair import ModelPair
from audit.references.folder import known_pictures
from audit.stages import Scores
from audit.states import Known
from audit.workspace import Workspace
from tests.conftest import BASE, KOHYA

PICTURES = known_pictures(set_folder("fluent-animals", "train"))


@pytest.fixture(scope="module")
def job() -> Job:
    return resolve(Request(KOHYA, str(BASE)), "nano", Bench())


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a bench loads and merges."""
    found: list[str] = []

    def counted(name: str) -> Any:
        inner = getattr(bench_module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            found.append(name)
            return inner(*arguments, **named)

        return call

    for name in ("load_base", "load_vae", "tune", "ModelPair"):
        monkeypatch.setattr(bench_module, name, counted(name))
    return found


def score(job: Job, workspace: Workspace, pictures: Any = PICTURES, bench: Bench | None = None) -> float:
    return Scores(Known.training, pictures).run(job, workspace, bench or Bench()).ceiling


def test_the_ceiling_needs_the_vae_alone_and_is_computed_once(workspace: Workspace, job: Job, loads: list[str]) -> None:
    first = score(job, workspace)
    assert loads == ["load_vae"]
    assert score(job, workspace) == first
    assert loads == ["load_vae"]


def test_the_ceiling_is_what_the_pair_of_models_gives(
    workspace: Workspace, job: Job, kohya_pair: ModelPair, nano: Descriptor
) -> None:
    images = stacked(PICTURES, (64, 64))
    cosines = nano.describe(kohya_pair.reconstruct(images)) * nano.describe(images)
    assert score(job, workspace) == pytest.approx(float(cosines.sum(axis=1).mean()), abs=1e-6)


def test_other_pictures_and_other_settings_have_a_ceiling_of_their_own(
    workspace: Workspace, job: Job, loads: list[str]
) -> None:
    bench = Bench()
    ceilings = [
        score(job, workspace, bench=bench),
        score(job, workspace, PICTURES[:5], bench),
        score(replace(job, settings=replace(job.settings, resolution=96)), workspace, bench=bench),
    ]
    assert len(set(ceilings)) == 3
    assert loads == ["load_vae"]


def test_a_damaged_ceiling_is_computed_again(workspace: Workspace, job: Job) -> None:
    first = score(job, workspace)
    [entry] = workspace.files.list("ceilings")
    workspace.files.write(entry.key, b'{"ceiling": "high"}')
    assert score(job, workspace) == first


def test_a_base_that_is_loaded_already_is_used(workspace: Workspace, job: Job, loads: list[str]) -> None:
    bench = Bench()
    bench.base(job)
    score(job, workspace, bench=bench)
    assert loads == ["load_base"]


def test_without_extractions_every_score_is_zero(workspace: Workspace, job: Job) -> None:
    found = Scores(Known.control, PICTURES).run(job, workspace, Bench())
    assert (found.kind, found.images, found.average_similarity) == ("control", 10, 0.0)
    [row] = workspace.rows("SELECT * FROM evaluations")
    assert row["audit_id"] == job.id
    assert np.isclose(row["ceiling"], found.ceiling)
