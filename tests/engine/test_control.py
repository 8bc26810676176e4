"""Control generations: what the base alone draws as well is no match, by either rule; how they are made and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from audit import api
from audit.bench import Bench
from audit.config import Evidence, Precision, Rule, Settings, StoredImages
from audit.descriptors import Descriptor
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.errors import NotFiniteError, WorkspaceError
from audit.job import Job, Request, resolve
from audit.models.pair import ModelPair
from audit.sampling.guidance import CFG_WEIGHT, BaseAlone
from audit.sampling.sampler import Sampler
from audit.sampling.spooled import vectors_of
from audit.stages import Control, Controlled, Sample, precision
from audit.states import Verdict
from audit.workspace import Spool, Workspace
from tests.conftest import BASE, CAPTION, KOHYA

# A LoRA of which next to nothing is left: what comes out of the model is what the base draws.
STEPS = 8
FAINT = Settings(
    images_per_training_image=1, lora_scale=0.02, control_share=0.5, evidence=Evidence.extraction, steps=STEPS
)
IMAGES, CONTROL = 20, 10
ROWS = 'SELECT * FROM control_generations ORDER BY "index"'


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module")
def by_four() -> Bench:
    return Bench(batch_size=4)


@pytest.fixture(scope="module")
def sampler(kohya_pair: ModelPair) -> Sampler:
    return Sampler(kohya_pair, BaseAlone(), [CAPTION], steps=STEPS, w=CFG_WEIGHT)


@pytest.fixture(scope="module")
def drawn(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that the base alone draws: as references those of an audit's first seeds, others as decoys."""
    place = tmp_path_factory.mktemp("drawn")
    for name, numbers in (("references", range(6)), ("decoys", range(1000, 1024))):
        (place / name).mkdir()
        for batch in sampler.batches(numbers):
            for number, image in zip(batch.indices, batch.images, strict=True):
                Image.fromarray(image).save(place / name / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("once")


def job_of(bench: Bench, **settings: Any) -> Job:
    request = Request(KOHYA, str(BASE), captions=[CAPTION], n0=IMAGES, settings=replace(FAINT, **settings))
    return resolve(request, "nano", bench)


def scan(drawn: Path, once: Path, bench: Bench, rule: Rule, share: float) -> api.Result:
    request = Request(KOHYA, str(BASE), captions=[CAPTION], n0=IMAGES, settings=replace(FAINT, control_share=share))
    return api.scan(
        request, references=[drawn / "references"], background=[drawn / "decoys"], descriptor="nano",
        workspace=once / str(share), rule=rule, bench=bench, drawn=True,
    )  # fmt: skip


@pytest.mark.parametrize("rule", list(Rule))
def test_a_picture_of_the_base_is_no_match(rule: Rule, drawn: Path, once: Path, bench: Bench) -> None:
    without = scan(drawn, once, bench, rule, share=0)
    assert without.verdict.said is Verdict.match
    if rule is Rule.either:  # of 24 decoys twice the least p is 0.08: too many for a picture, and not for the set
        assert without.verdict.matched_sets
    else:
        assert len(without.matched) >= 4
    assert without.facts.control_generations == 0
    assert {one.control_similarity for one in without.facts.chances} == {None}

    found = scan(drawn, once, bench, rule, share=0.5)
    assert (found.verdict.said, found.matched, found.possible) == (Verdict.none, [], [])
    assert {one.name for one in found.verdict.common} >= set(without.matched) | {"0.png"}
    assert all(one.control_similarity == pytest.approx(1, abs=1e-3) for one in found.facts.chances)
    assert any("draws them as well" in sentence for sentence in found.verdict.explanation)
    assert {one.extraction_p for one in found.facts.chances} == {1.0}
    [whole] = found.facts.set_chances
    assert whole.extraction_p is not None
    assert whole.extraction_p > 0.5
    said = found.as_dict()
    assert said["control_generations"] == CONTROL
    assert {one["name"] for one in said["common_references"]} == {one.name for one in found.verdict.common}
    page = Path(found.page).read_text()
    assert "What the base alone draws as well" in page
    assert "it draws it as well" in page


def test_they_have_the_captions_and_seeds_of_the_images_and_are_the_bases_own(
    workspace: Workspace, bench: Bench, sampler: Sampler, nano: Descriptor
) -> None:
    job = job_of(bench)
    assert (job.images, job.control_images) == (IMAGES, CONTROL)
    records = run_stages([Sample(), Control()], job, Place(workspace, bench))
    assert records[1] == Controlled(records[1].seconds, CONTROL, CONTROL * STEPS * 2)
    assert Control().done(job, workspace)
    rows = workspace.rows(ROWS)
    assert [row["index"] for row in rows] == list(range(CONTROL))
    assert {(row["caption"], row["w"]) for row in rows} == {(CAPTION, CFG_WEIGHT)}
    [spooled] = workspace.spool(job.id).read(["index", "seed"])
    assert [row["seed"] for row in rows] == spooled["seed"].to_pylist()[:CONTROL]
    assert all(row["image"][:4] == b"RIFF" for row in rows)
    images = np.concatenate([batch.images for batch in sampler.batches(range(CONTROL))])
    np.testing.assert_allclose(vectors_of(workspace.select(ROWS)), nano.describe(images), atol=1e-4)


def test_hashes_only_keeps_no_pixel_of_them(workspace: Workspace, bench: Bench, monkeypatch: Any) -> None:
    job, discarded = job_of(bench, stored_images=StoredImages.hashes_only), []
    monkeypatch.setattr(Spool, "discard", lambda spool: discarded.append(spool))
    run_stages([Control()], job, Place(workspace, bench))
    assert {row["image"] for row in workspace.rows(ROWS)} == {None}
    spooled = list(workspace.spool(job.id, Control.batch).read())
    assert sum(rows["image"].null_count for rows in spooled) == CONTROL


def test_killed_on_the_way_it_goes_on_with_the_same_result(
    by_four: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, whole = job_of(by_four, steps=2), Workspace(tmp_path / "whole")
    run_stages([Control()], job, Place(whole, by_four))
    killed, add = Workspace(tmp_path / "killed"), Spool.add

    def stops(spool: Spool, first: int, rows: Any) -> None:
        if first >= 4:
            raise WorkspaceError("no room")
        add(spool, first, rows)

    monkeypatch.setattr(Spool, "add", stops)
    with pytest.raises(WorkspaceError):
        run_stages([Control()], job, Place(killed, by_four))
    monkeypatch.setattr(Spool, "add", add)
    assert not killed.has("control_generations", job.id)
    assert killed.spool(job.id, Control.batch).indices() == {0, 1, 2, 3}
    run_stages([Control()], job, Place(killed, by_four))
    assert killed.rows(ROWS) == whole.rows(ROWS)


def test_overflow_in_a_narrow_precision_is_drawn_again_in_a_wider_one(
    by_four: Bench, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, wider = BaseAlone.predict, [Precision.fp32]
    job = job_of(by_four, steps=2)
    latents: list[int] = []

    def overflows(self: BaseAlone, *asked: Any) -> torch.Tensor:
        latents.append(len(asked[1]))
        found = predict(self, *asked)
        return found * torch.inf if wider and len(latents) > 2 else found

    def next_one(*_: Any) -> Precision | None:
        return wider.pop() if wider else None

    monkeypatch.setattr(BaseAlone, "predict", overflows)
    monkeypatch.setattr(precision, "wider", next_one)
    run_stages([Control()], job, Place(workspace, by_four))
    assert latents == [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]  # the first batch was thrown away, and drawn again
    assert len(workspace.rows(ROWS)) == CONTROL

    monkeypatch.setattr(BaseAlone, "predict", lambda self, *asked: predict(self, *asked) * torch.inf)
    other = job_of(by_four, steps=3)
    with pytest.raises(NotFiniteError, match="not finite"):
        run_stages([Control()], other, Place(workspace, by_four))
    assert not workspace.spool(other.id).exists()


def test_a_finished_audit_without_them_is_made_up_for(drawn: Path, once: Path, bench: Bench) -> None:
    first = scan(drawn, once, bench, Rule.fixed, share=0.5)
    workspace = Workspace(once / "0.5")
    before = workspace.rows('SELECT * FROM generations ORDER BY "index"')
    workspace.remove("control_generations", first.audit_id)
    found = scan(drawn, once, bench, Rule.fixed, share=0.5)
    assert found.was_known
    assert found.audit_id == first.audit_id
    assert len(workspace.rows(ROWS)) == CONTROL
    assert not workspace.spool(found.audit_id).exists()
    assert workspace.rows('SELECT * FROM generations ORDER BY "index"') == before
    assert found.verdict.said is Verdict.none


def test_the_default_share_is_of_no_other_audit_and_others_are() -> None:
    assert "control_share" not in json.loads(json.dumps(Settings().as_dict()))
    assert Settings(control_share=0).as_dict()["control_share"] == 0


def test_a_tenth_of_the_images_and_one_at_least(bench: Bench) -> None:
    assert job_of(bench, control_share=0.1).control_images == 2
    assert job_of(bench, control_share=0.001).control_images == 1
    assert job_of(bench, control_share=0.0).control_images == 0
    assert job_of(bench, evidence=Evidence.membership).control_images == 0
