"""Audits on a base with two experts, from files to tables: each expert alone, both, and items of a catalog."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from audit import api
from audit.bench import Bench
from audit.config import Evidence, Expert, Latents, Rule, Settings, load_config
from audit.demo import set_folder
from audit.engine.due import Due, Skipped
from audit.errors import CheckpointError
from audit.evidence import effort
from audit.evidence.levels import expert_at, timesteps_of
from audit.evidence.membership import level_of
from audit.job import Job, Request, resolve
from audit.models.checkpoint import open_checkpoint
from audit.references.losses import Side
from audit.workspace import Workspace
from crawlers.catalog import Catalog
from crawlers.crawl import Crawl
from crawlers.sources.folder import Folder
from tests.models import nano
from tests.models.test_experts import write_lora

HIGH, LOW = Expert.high_noise, Expert.low_noise
SETTINGS = Settings(steps=2, images_per_training_image=2, resolution=32, membership_evaluations=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experts")
    nano.make("wan22", made)
    write_lora(made / "cat_high_noise.safetensors", 1)
    write_lora(made / "cat_low_noise.safetensors", 2)
    write_lora(made / "cat.safetensors", 1)
    (made / "pictures").mkdir()
    for picture in sorted(set_folder("stamps-fruit", "train").iterdir())[:2]:
        shutil.copy(picture, made / "pictures")
    return made


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def request_of(folder: Path, name: str, low_noise: str | None = None, expert: Expert | None = None) -> Request:
    return Request(
        folder / name, str(folder / "wan22"), captions=["a photo of sks dog"], n0=1,
        settings=replace(SETTINGS, expert=expert), low_noise=None if low_noise is None else folder / low_noise,
    )  # fmt: skip


def scanned(folder: Path, workspace: Workspace, bench: Bench, *asked: Any) -> api.Result:
    return api.scan(
        request_of(folder, *asked), references=[folder / "pictures"], descriptor="nano", workspace=workspace,
        bench=bench, latents=Latents.always, rule=Rule.fixed,
    )  # fmt: skip


def test_scans_of_each_expert_alone_and_of_both(
    folder: Path, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Membership asks where the changed expert acts, finds it changed, and the page says what was not changed."""
    monkeypatch.setattr(effort, "NOISES", 1)
    workspace = Workspace(tmp_path / "w")
    high = scanned(folder, workspace, bench, "cat_high_noise.safetensors")
    low = scanned(folder, workspace, bench, "cat_low_noise.safetensors")
    both = scanned(folder, workspace, bench, "cat_high_noise.safetensors", "cat_low_noise.safetensors")
    assert len({high.audit_id, low.audit_id, both.audit_id}) == 3
    found = {"high": (high, [HIGH]), "low": (low, [LOW]), "both": (both, [HIGH, LOW])}
    for result, experts in found.values():
        rows = workspace.rows("SELECT * FROM memberships WHERE audit_id = ?", [result.audit_id])
        assert len(rows) == 2
        for row in rows:
            assert tuple(row["timesteps"]) == timesteps_of(0.875, experts)
            assert {expert_at(t, 0.875) for t in row["timesteps"]} == {*experts}
            assert all(abs(score) > 1e-6 for score in row["by_timestep"])
        assert len(workspace.rows("SELECT 1 FROM generations WHERE audit_id = ?", [result.audit_id])) == 2
        shown = workspace.rows("SELECT timestep FROM denoised WHERE audit_id = ?", [result.audit_id])
        assert {row["timestep"] for row in shown} == {500 if LOW in experts else max(timesteps_of(0.875, [HIGH]))}
        page = " ".join(Path(result.page).read_text().split())
        assert ("is changed, and the" in page) == (len(experts) == 1)
    assert "taken for a low-noise file, which its name says" in " ".join(low.facts.row["warnings"])
    again = resolve(request_of(folder, "cat.safetensors", expert=HIGH), "nano", bench)  # the same under another name
    assert again.id == high.audit_id
    with pytest.raises(CheckpointError, match="told neither by its name"):
        resolve(request_of(folder, "cat.safetensors"), "nano", bench)


def test_a_scan_of_a_few_frames(folder: Path, tmp_path: Path, bench: Bench) -> None:
    """One picture a generation, of another audit; what no latents stand for is refused."""
    workspace, request = Workspace(tmp_path / "w"), request_of(folder, "cat_low_noise.safetensors")
    found = {}
    for frames in (1, 3, 4):
        settings = replace(request.settings, frames=frames, evidence=Evidence.extraction)
        asked = replace(request, settings=settings)
        if frames == 4:
            with pytest.raises(CheckpointError, match="--frames 4: of this base it is 1, 3, 5"):
                api.scan(asked, descriptor="nano", workspace=workspace, bench=bench)
            continue
        result = api.scan(asked, descriptor="nano", workspace=workspace, bench=bench)
        rows = workspace.rows("SELECT pdq FROM generations WHERE audit_id = ?", [result.audit_id])
        found[result.audit_id] = [row["pdq"] for row in rows]
    one, three = found.values()
    assert len(one) == len(three) == 2
    assert one != three


def test_the_usual_levels_would_have_acquitted_the_high_noise_expert(
    folder: Path, bench: Bench, tmp_path: Path
) -> None:
    """At each of them the other expert answers, and nothing is changed there."""
    workspace = Workspace(tmp_path / "w")
    pair = bench.pair(resolve(request_of(folder, "cat_high_noise.safetensors"), "nano", bench), workspace)
    sides = [Side(pair, tuned, 2) for tuned in (False, True)]
    latents = torch.randn(1, *pair.latent_shape, generator=torch.Generator().manual_seed(1))
    for levels, same in ((effort.TIMESTEPS, True), (timesteps_of(0.875, [HIGH]), False)):
        for t in levels:
            level = level_of(t, pair.prediction_type, pair.scheduler)
            before, after = (side.predict(latents, level.asked(pair.device)) for side in sides)
            assert bool((before == after).all()) is same


def test_jobs_of_both_files_travel(folder: Path, bench: Bench, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    given = resolve(request_of(folder, "cat_high_noise.safetensors", "cat_low_noise.safetensors"), "nano", bench)
    travelled = Job.from_dict(given.as_dict())
    assert travelled == given
    assert Bench().checkpoint(travelled, workspace).identity == given.checkpoint.identity
    alone = resolve(request_of(folder, "cat_low_noise.safetensors"), "nano", bench)
    assert Bench().checkpoint(Job.from_dict(alone.as_dict()), workspace).expert is LOW


def test_a_version_with_both_files_is_two_items_and_what_is_not_told_is_left_out(folder: Path, tmp_path: Path) -> None:
    workspace, uploads = Workspace(tmp_path / "w"), tmp_path / "uploads"
    for number, name in enumerate(("cat_high_noise", "cat_low_noise", "dog")):
        write_lora(uploads / f"{name}.safetensors", number, ss_base_model_version="wan22_14b")
    catalog = Catalog(workspace)
    Crawl(Folder(catalog, str(uploads), settle=0), catalog).run()

    def due(**settings: Any) -> tuple[dict[str, Job], dict[str, int]]:
        skipped = Skipped({})
        config = load_config(None, {}, {"bases": {"wan": str(folder / "wan22")}, "descriptor": "nano", **settings})
        return {job.name: job for job in Due(workspace, config, skipped)}, skipped.counts

    jobs, skipped = due()
    assert {name: job.settings.expert for name, job in jobs.items()} == {
        "cat_high_noise.safetensors": HIGH, "cat_low_noise.safetensors": LOW,
    }  # fmt: skip
    assert {name: job.checkpoint.experts for name, job in jobs.items()} == {
        "cat_high_noise.safetensors": (HIGH,), "cat_low_noise.safetensors": (LOW,),
    }  # fmt: skip
    [(reason, count)] = skipped.items()
    assert ("which of the base's two experts" in reason, count) == (True, 1)
    items = {name: Path(job.item_id) for name, job in jobs.items()}
    high, low = (items[f"cat_{name}_noise.safetensors"] for name in ("high", "low"))
    both, _ = api.from_catalog(Request(high, "wan", low_noise=low), workspace)
    assert open_checkpoint(Path(both.checkpoint), both.low_noise).own_experts == (HIGH, LOW)
    with pytest.raises(CheckpointError, match="given as the low-noise file, and its name says high-noise"):
        api.from_catalog(Request(low, "wan", low_noise=high), workspace)
    jobs, skipped = due(**{"settings.expert": "both"})  # for what no name tells
    assert {name: job.settings.expert for name, job in jobs.items()} == {
        "cat_high_noise.safetensors": HIGH, "cat_low_noise.safetensors": LOW, "dog.safetensors": Expert.both,
    }  # fmt: skip
    assert not skipped
