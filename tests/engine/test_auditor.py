"""A whole audit: exactly once, resumable at any image, nothing half-written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from audit.bench import Bench
from audit.config import Clustering, Method, Settings, StoredImages
from audit.demo import set_folder
from audit.descriptors import load_descriptor
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.errors import AuditError
from audit.job import Job, Request, resolve
from audit.progress import Tell, quiet
from audit.references import ReferenceSets
from audit.references.folder import known_pictures
from audit.sampling.spooled import vectors_of
from audit.stages import Cluster, Match, Sample, Scores
from audit.states import Known
from audit.workspace import Workspace
from tests.conftest import BASE, CAPTION, DREAMBOOTH, KOHYA

QUICK = Settings(steps=3, images_per_training_image=2)


def job_for(settings: Settings = QUICK, **changes: object) -> Job:
    request = replace(Request(KOHYA, str(BASE), captions=[CAPTION], n0=10, settings=settings), **changes)  # type: ignore[arg-type]
    return resolve(request, "nano", Bench())


def audit(workspace: Workspace, job: Job, batch_size: int = 0, progress: Tell = quiet) -> bool:
    """Audit it; whether anything had to be done."""
    return bool(run_stages([Sample(), Cluster()], job, Place(workspace, Bench(batch_size=batch_size)), progress))


def match(workspace: Workspace, job: Job, sets: list[str]) -> None:
    run_stages([Match(sets)], job, Place(workspace, Bench()))


def tables(workspace: Workspace) -> dict[str, int]:
    names = ("checkpoints", "audits", "generations", "extractions", "matches")
    return {name: workspace.rows(f"SELECT count(*) AS n FROM {name}")[0]["n"] for name in names}


def test_an_audit_fills_the_tables_once(workspace: Workspace) -> None:
    job = job_for()
    ReferenceSets(workspace).add("train", set_folder("fluent-animals", "train"), load_descriptor("nano"))
    assert audit(workspace, job)
    match(workspace, job, ["train"])
    first = tables(workspace)
    assert first["generations"] == 20
    assert (first["audits"], first["checkpoints"]) == (1, 1)
    [row] = workspace.rows("SELECT captions FROM audits")
    assert row["captions"] == [{"caption": CAPTION, "source": "user", "truncated": False, "images": 20}]
    assert 0 < first["extractions"] <= 20
    assert first["matches"] >= first["extractions"]
    assert not audit(workspace, job)
    match(workspace, job, ["train"])
    assert tables(workspace) == first
    assert not (workspace.root / "spool" / job.id).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"settings": replace(QUICK, w=2.5)}, {"settings": replace(QUICK, seed=1)},
        {"settings": replace(QUICK, steps=4)},
        {"settings": replace(QUICK, method=Method.direct)}, {"captions": ["other"]}, {"n0": 9},
        {"checkpoint": DREAMBOOTH},
    ],
)  # fmt: skip
def test_whatever_changes_the_result_changes_the_id(change: dict[str, object]) -> None:
    assert job_for(**change).id != job_for().id  # type: ignore[arg-type]


def test_the_same_request_has_the_same_id() -> None:
    assert job_for().id == job_for().id


def test_a_stopped_audit_goes_on_and_ends_with_the_same_images(tmp_path: Path) -> None:
    job = job_for(replace(QUICK, stored_images=StoredImages.all))
    whole = Workspace(tmp_path / "whole")
    audit(whole, job, batch_size=4)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "sampling" and done >= 8:
            raise KeyboardInterrupt

    stopped = Workspace(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        audit(stopped, job, batch_size=4, progress=stop)
    assert tables(stopped) == dict.fromkeys(tables(stopped), 0)
    told: list[int] = []
    audit(stopped, job, batch_size=7, progress=lambda stage, done, total: told.append(done))
    assert 8 in told  # what was there is not sampled again
    read = "SELECT * FROM generations ORDER BY index"
    np.testing.assert_allclose(vectors_of(stopped.select(read)), vectors_of(whole.select(read)), atol=0.02)
    assert stopped.select(read)["seed"].equals(whole.select(read)["seed"])


def test_hashes_only_keeps_no_pixels_anywhere(workspace: Workspace) -> None:
    job = job_for(replace(QUICK, stored_images=StoredImages.hashes_only))
    seen: list[int] = []

    def look(stage: str, done: int, total: int) -> None:
        for batch in workspace.spool(job.id).read():
            seen.append(batch["image"].null_count == len(batch))

    audit(workspace, job, progress=look)
    assert seen
    assert all(seen)
    for table in ("generations", "extractions"):
        assert workspace.rows(f"SELECT count(image) AS n FROM {table}") == [{"n": 0}]
    assert b"\x89PNG" not in b"".join(path.read_bytes() for path in workspace.root.rglob("*.parquet"))


def test_the_papers_clustering_can_be_chosen(workspace: Workspace) -> None:
    job = job_for(replace(QUICK, clustering=Clustering.cliques))
    audit(workspace, job)
    assert workspace.rows("SELECT count(*) >= 10 AS enough FROM extractions") == [{"enough": True}]


def test_a_caption_that_is_too_long_is_cut_and_said(workspace: Workspace) -> None:
    job = job_for(captions=[CAPTION + " and more" * 40])
    audit(workspace, job)
    (row,) = workspace.rows("SELECT warnings, captions FROM audits")
    assert any("its end was cut off" in warning for warning in row["warnings"])
    assert [caption["truncated"] for caption in row["captions"]] == [True]


def test_known_pictures_are_scored_with_the_ceiling(workspace: Workspace) -> None:
    job = job_for()
    audit(workspace, job)
    for kind in Known:
        folder = set_folder("fluent-animals", "train" if kind == "training" else "control")
        run_stages([Scores(kind, known_pictures(folder))], job, Place(workspace, Bench()))
    rows = workspace.rows("SELECT * FROM evaluations ORDER BY kind DESC")
    assert [row["kind"] for row in rows] == ["training", "control"]
    assert all(-1 <= row["average_similarity"] <= 1 and row["images"] == 10 for row in rows)
    assert all(row["ceiling"] > 0.9 for row in rows)


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="does not exist"):
        job_for(checkpoint=tmp_path / "none.safetensors")
    with pytest.raises(AuditError, match="no descriptor"):
        resolve(Request(KOHYA, str(BASE)), "unknown", Bench())
    assert list(tmp_path.iterdir()) == []
