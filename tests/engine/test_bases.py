"""Which of the configured bases an item is audited on, and what is said where it is not the claimed one."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from audit.bench import Bench
from audit.config import load_config
from audit.demo import FLOW_BASE
from audit.engine.due import Due, Skipped
from audit.job import Job
from audit.models.base import BaseLocation, BaseModel, load_base, locate_base
from audit.models.choose import NEARER
from audit.workspace import Workspace
from crawlers.catalog import Catalog
from crawlers.crawl import Crawl
from crawlers.sources.folder import Folder
from tests.conftest import BASE, DREAMBOOTH

UNET = Path("unet/diffusion_pytorch_model.safetensors")
NOW = datetime(2026, 5, 1, tzinfo=UTC)
PONY = "67ab2fd8ec439a89b3fedb15cc65f54336af163c7eb5e4f2acc98f090a29b0b3"


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has moved away from the embedded one."""
    folder = tmp_path_factory.mktemp("bases") / "moved"
    shutil.copytree(BASE, folder)
    state = {
        name: value * (1.2 if name.endswith("conv1.weight") else 1) for name, value in load_file(BASE / UNET).items()
    }
    save_file(state, folder / UNET, {"format": "pt"})
    return folder


def jobs(
    workspace: Workspace, claims: dict[str, list[list[str]]], family: str, skipped: Skipped | None = None, **bases: str
) -> list[Job]:
    """The job of one item with these claims, where ``bases`` are configured."""
    row_of(workspace, claims, family)
    config = load_config(None, {}, {"workspace": str(workspace.root), "descriptor": "nano"})
    config.bases.update(bases)
    return list(Due(workspace, config, skipped or Skipped({})))


def row_of(workspace: Workspace, claims: dict[str, list[list[str]]], family: str) -> None:
    """An item with these claims in the catalog."""
    row = {
        "item_id": "folder:a:x", "source": "folder", "identity": "1" * 64, "checkpoint_sha256": "2" * 64,
        "tensors_sha256": "3" * 64, "format": "lora-kohya", "state": "stored", "name": "x", "bytes": 1,
        "base_model": None, "family": family, "claims": json.dumps(claims), "seen_at": NOW, "first_seen_at": NOW,
    }  # fmt: skip
    workspace.append("checkpoints", [row])


@pytest.mark.parametrize(
    ("claims", "key"),
    [
        ({"base_hash": [[PONY, "ss_new_sd_model_hash"]], "base_model": [["SDXL 1.0", "baseModel"]]}, "pony-v6"),
        ({"base_model": [["SDXL 1.0", "baseModel"], ["ponyDiffusionV6XL", "ss_sd_model_name"]]}, "pony-v6"),
        ({"base_model": [["Pony", "baseModel"]]}, "pony-v6"),
        ({"base_model": [["Illustrious", "baseModel"]]}, "sdxl"),
    ],
)  # fmt: skip
def test_claims_choose_among_the_configured_bases(
    workspace: Workspace, claims: dict[str, list[list[str]]], key: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.symlink_to(BASE)
    bases = {"sdxl": str(other), "pony-v6": str(BASE)}
    (job,) = jobs(workspace, claims, "sdxl", **bases)
    assert job.base.source == bases[key]
    said = [one for one in job.warnings if "it claims to be trained on" in one]
    if claims.get("base_model") == [["Illustrious", "baseModel"]]:
        assert "Illustrious XL (version not said) (baseModel): whether the base" in said[0]
    else:
        assert said == []


def test_a_parent_in_the_place_of_its_child_is_said(workspace: Workspace, tmp_path: Path) -> None:
    child = tmp_path / "sd_xl_base_1.0"
    child.symlink_to(BASE)
    (job,) = jobs(workspace, {"base_model": [["Pony", "baseModel"]]}, "sdxl", sdxl=str(child))
    assert any("is Stable Diffusion XL 1.0, a parent of it" in one for one in job.warnings)


def test_the_file_that_a_hash_names_is_found_by_its_content(workspace: Workspace, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.symlink_to(BASE)
    claims = {"base_hash": [[locate_base(str(mine)).revision, "ss_new_sd_model_hash"]]}
    (job,) = jobs(workspace, claims, "sdxl", **{"my own": str(mine)})
    assert job.base.source == str(mine)
    assert not any("it claims" in one for one in job.warnings)


def test_the_file_of_a_denoiser_is_found_by_its_hash(workspace: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copy(BASE / UNET, file)
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    claims = {"base_hash": [[own, "ss_new_sd_model_hash"]]}
    row_of(workspace, claims, "sdxl")
    config = load_config(None, {}, {"workspace": str(workspace.root), "descriptor": "nano"})
    config.bases.update({"sdxl": str(BASE), "my own": str(file)})
    config.base_configs["my own"] = str(BASE)
    [job] = Due(workspace, config, Skipped({}))
    assert job.base.source == str(file)
    assert job.checkpoint.claimed_bases == ((own, "ss_new_sd_model_hash"),)
    assert Job.from_dict(job.as_dict()) == job


def test_a_base_that_is_not_at_hand_costs_the_items_that_may_be_its_own(dreambooth: Workspace, tmp_path: Path) -> None:
    found, skipped = due(dreambooth, gone=str(tmp_path / "gone"), sd1=str(BASE))
    assert found == []
    [said] = skipped
    assert "cannot be told now: the base gone is not at hand" in said


def test_a_worker_knows_what_the_catalog_claims(dreambooth: Workspace) -> None:
    [row] = dreambooth.newest(
        "checkpoints", "item_id", [dreambooth.rows("SELECT * FROM checkpoints")[0]["item_id"]]
    ).values()
    claims = json.dumps({"base_model": [["SD 1.5", "baseModel"]]})
    dreambooth.append("checkpoints", [row | {"claims": claims, "seen_at": row["seen_at"] + timedelta(seconds=1)}])
    [job], _ = due(dreambooth, sd1=str(BASE))
    assert Bench().checkpoint(job, dreambooth).claimed_bases == (("SD 1.5", "baseModel"),)


def test_an_adapter_that_claims_nothing_goes_to_the_only_base_of_its_family(workspace: Workspace) -> None:
    (job,) = jobs(workspace, {}, "sdxl", sdxl=str(BASE))
    assert job.base.source == str(BASE)
    assert not any("claim" in one for one in job.warnings)


@pytest.mark.parametrize("claims", [{}, {"base_model": [["a merge of mine", "ss_sd_model_name"]]}])
def test_an_adapter_that_claims_nothing_is_not_audited_where_several_bases_are_its_family(
    workspace: Workspace, tmp_path: Path, claims: dict[str, list[list[str]]]
) -> None:
    other, skipped = tmp_path / "other", Skipped({})
    other.symlink_to(BASE)
    assert jobs(workspace, claims, "sdxl", skipped, **{"sdxl": str(other), "pony-v6": str(BASE)}) == []
    [(said, count)] = skipped.counts.items()
    assert count == 1
    assert "which of the bases sdxl, pony-v6 adapters of family sdxl were trained on is not claimed" in said
    assert "audit them with 'lora-audit scan ITEM --base SOURCE'" in said


@pytest.fixture
def dreambooth(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A catalog with full weights that say nothing of their base."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    shutil.copy(DREAMBOOTH / UNET, uploads / "mine.safetensors")
    catalog = Catalog(workspace)
    assert Crawl(Folder(catalog, str(uploads), settle=0), catalog).run().states == {"stored": 1}
    [row] = workspace.rows("SELECT * FROM checkpoints")
    assert (row["format"], row["family"]) == ("unet", None)  # the embedded model is too small to show its family
    workspace.append("checkpoints", [row | {"family": "sd1", "seen_at": row["seen_at"] + timedelta(seconds=1)}])
    return workspace


def due(workspace: Workspace, bench: Bench | None = None, **bases: str) -> tuple[list[Job], dict[str, int]]:
    config = load_config(None, {}, {"workspace": str(workspace.root), "descriptor": "nano"})
    config.bases.clear()
    config.bases.update(bases)
    skipped = Skipped({})
    return list(Due(workspace, config, skipped, bench=bench)), skipped.counts


def test_full_weights_that_claim_nothing_go_to_the_nearest_base(
    dreambooth: Workspace, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def loading(location: BaseLocation, as_stored: bool = False) -> BaseModel:
        loaded.append(location.name)
        if len(loaded) == 1:
            raise MemoryError("no room")
        return load_base(location, as_stored)

    monkeypatch.setattr("audit.bench.load_base", loading)
    bases = {"sd1": str(BASE), "my own": str(moved), "mystery": str(FLOW_BASE)}
    found, skipped = due(dreambooth, **bases)  # what fails now is measured by another run
    assert found == []
    assert "cannot be told now: the base sd1 cannot be loaded: unforeseen MemoryError" in next(iter(skipped))
    loaded[:] = ["as before"]
    (job,), skipped = due(dreambooth, Bench(), **bases)  # as a run in this process
    assert (job.base.source, skipped) == (str(BASE), {})
    assert any("no base is claimed: its weights are nearest to sd1 (relative change: sd1 0." in w for w in job.warnings)
    assert len(loaded) == len({*loaded})
    rows = dreambooth.rows("SELECT distance, reason FROM base_distances ORDER BY distance NULLS LAST")
    assert rows[1]["distance"] > NEARER * rows[0]["distance"]
    assert rows[2]["distance"] is None  # it does not fit
    assert rows[2]["reason"]
    # what was measured is known to the next run, by Ray, too, which reads the catalog without a worker's bench
    loaded.clear()
    assert [one.id for one in due(dreambooth, **bases)[0]] == [job.id]
    assert loaded == []


def test_full_weights_that_no_base_is_nearest_to_are_not_audited(dreambooth: Workspace, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(BASE)
    found, skipped = due(dreambooth, sd1=str(BASE), twin=str(twin))
    assert found == []
    [said] = skipped
    assert said.startswith("full weights are about as far from several of the bases sd1, twin, and claim none")
    assert "lora-audit scan ITEM --base SOURCE" in said
