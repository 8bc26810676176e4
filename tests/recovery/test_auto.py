"""Captions that nobody told: recovered once, kept, part of the audit's id, and said on the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from audit import api
from audit.bench import Bench
from audit.claims.captions import Caption
from audit.config import CaptionChoice, CaptionSettings, Config, Evidence, Recovery, RunSettings, Settings
from audit.custody.again import reproduce
from audit.errors import WorkspaceError
from audit.job import Request
from audit.models.soft import is_soft
from audit.recovery.ask import recover_captions
from audit.recovery.gradient import VECTORS
from audit.recovery.kept import soft_prompts
from audit.workspace import Workspace
from crawlers.catalog import Catalog
from crawlers.crawl import Crawl
from crawlers.sources.folder import Folder
from tests.conftest import BASE, CAPTION, KOHYA
from tests.warm import run

AUTO = CaptionSettings(choice=CaptionChoice.auto, evaluations=0)
QUICK = Settings(steps=2, images_per_training_image=8, evidence=Evidence.extraction)


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped LoRA without a word of metadata."""
    path = tmp_path_factory.mktemp("untold") / "untold.safetensors"
    save_file(load_file(KOHYA), path)
    return path


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("cpu")


def test_a_scan_recovers_what_nobody_tells_and_says_so(untold: Path, bench: Bench, workspace: Workspace) -> None:
    def scan(recovery: CaptionSettings, file: Path = untold, **more: object) -> api.Result:
        request = Request(file, str(BASE), n0=1, settings=QUICK, recovery=recovery, **more)  # type: ignore[arg-type]
        return api.scan(request, descriptor="nano", workspace=workspace, bench=bench, rule="fixed")

    plain, found = scan(CaptionSettings()), scan(AUTO)
    assert [caption.text for caption in plain.job.captions] == [""]
    assert found.audit_id != plain.audit_id
    assert {caption.source for caption in found.job.captions} == {"recovered by attention"}
    assert sum(one["images"] for one in found.facts.captions) == 8
    document = found.as_dict()
    recovered = document["estimates"]["recovered"]
    assert [one["caption"] for one in recovered["captions"]] == [caption.text for caption in found.job.captions]
    assert plain.as_dict()["estimates"]["recovered"] is None
    page = Path(found.page).read_text()
    assert f"“<bdi>{recovered['keywords'][0]['word']}</bdi>”" in page
    assert any("recovered from the model" in warning for warning in found.facts.row["warnings"])

    rows = workspace.rows("SELECT * FROM recoveries")
    assert {row["kind"] for row in rows} == {"keyword", "caption"}
    again = scan(AUTO)
    assert (again.audit_id, again.was_known) == (found.audit_id, True)
    assert workspace.rows("SELECT * FROM recoveries") == rows
    assert scan(AUTO, captions=[CAPTION]).job.captions[0].source == "user"

    told = scan(AUTO, KOHYA)  # its metadata claims captions, and the model heeds them
    assert [caption.text for caption in told.job.captions] == [
        caption.text for caption in scan(CaptionSettings(), KOHYA).job.captions
    ]
    assert any("captions as claimed" in warning for warning in told.job.warnings)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("kept") / "workspace")


def test_a_recovery_is_kept_by_what_it_depends_on(untold: Path, bench: Bench, kept: Workspace) -> None:
    def recovered(iterations: int = 1, method: Recovery = Recovery.attention, **more: object) -> object:
        settings = CaptionSettings(method=method, evaluations=0, iterations=iterations)
        request = Request(untold, str(BASE))
        return recover_captions(request, settings=settings, workspace=kept, bench=bench, **more)  # type: ignore[arg-type]

    first = recovered()
    assert recovered() == first  # seconds too: it was not done again
    assert recovered(iterations=2) == first  # which attention knows nothing of
    assert recovered(words=["lantern"]) != first
    assert recovered(method=Recovery.gradient) != first
    assert kept.rows("SELECT count(DISTINCT recovery_id) AS n FROM recoveries")[0]["n"] == 3


def test_the_command_prints_ranked_keywords_with_reasons(untold: Path, kept: Workspace) -> None:
    done = run(
        "captions", untold, "--base", BASE, "--caption-evaluations", "0", "--workspace", kept.root, "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert "sks" in [one["word"] for one in document["keywords"][:10]]
    assert all("cross attention" in one["why"] for one in document["keywords"])
    assert document["evaluations"] == 0


def test_a_run_settles_captions_before_it_audits_and_finds_them_again(untold: Path, tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    save_file(load_file(untold), uploads / "untold.safetensors", {"ss_base_model_version": "sd_v1"})
    told = {name: 1.01 * tensor if "lora_up" in name else tensor for name, tensor in load_file(untold).items()}
    claims = {"ss_dataset_dirs": '{"1_sks 3d render of an animal": {"n_repeats": 1, "img_count": 1}}'}
    save_file(told, uploads / "told.safetensors", claims | {"ss_base_model_version": "sd_v1"})
    workspace = Workspace(tmp_path / "w")
    catalog = Catalog(workspace)
    Crawl(Folder(catalog, str(uploads), settle=0), catalog).run()
    config = Config(
        workspace=str(workspace.root), descriptor="nano", bases={"sd1": str(BASE)}, captions=AUTO,
        settings=replace(QUICK, images_per_training_image=1), run=RunSettings(device="cpu"),
    )  # fmt: skip
    first = api.run(config)
    assert (first.finished, first.failed, first.skipped) == (2, 0, {})
    sources = {row["checkpoint_name"]: row["captions"][0]["source"] for row in workspace.rows("SELECT * FROM audits")}
    assert sources == {"untold.safetensors": "recovered by attention", "told.safetensors": "ss_dataset_dirs"}
    warnings = workspace.rows("SELECT warnings FROM audits WHERE checkpoint_name = 'told.safetensors'")
    assert any("captions as claimed" in warning for warning in warnings[0]["warnings"])
    kept = workspace.rows("SELECT * FROM recoveries ORDER BY ALL")
    again = api.run(config)
    assert (again.finished, again.failed) == (0, 0)
    assert workspace.rows("SELECT * FROM recoveries ORDER BY ALL") == kept
    assert api.run(replace(config, captions=CaptionSettings())).finished == 1  # the empty caption is another audit


def test_a_scan_samples_with_prompts_that_are_no_words(untold: Path, bench: Bench, workspace: Workspace) -> None:
    asked = CaptionSettings(choice=CaptionChoice.auto, method=Recovery.gradient, iterations=2)
    request = Request(untold, str(BASE), n0=1, settings=QUICK, recovery=asked)
    found = api.scan(request, descriptor="nano", workspace=workspace, bench=bench, rule="fixed")
    names = [caption.text for caption in found.job.captions]
    assert all(is_soft(name) for name in names)
    assert len(set(names)) == 4
    assert "embeddings and no words" in Path(found.page).read_text()
    assert soft_prompts(workspace, found.job.captions)[names[0]].shape == (VECTORS, 128)
    assert reproduce(workspace, found.audit_id, untold, str(BASE), descriptor="nano", device="cpu").agrees
    with pytest.raises(WorkspaceError, match="recover it again"):
        soft_prompts(workspace, [Caption("soft prompt 0123456789abcdef", "user")])
