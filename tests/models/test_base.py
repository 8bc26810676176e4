"""Base models: a folder, a single file, a pinned revision on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audit.errors import CheckpointError, ConfigError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.families.registry import FAMILIES
from audit.models.hub import is_commit, is_hub_id
from audit.models.published import EMBEDDED, PINNED, PUBLISHED, source_of
from tests.conftest import BASE
from tests.models.ldm import to_ldm
from tests.simulators.hub import Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def same_weights(first: BaseModel, second: BaseModel) -> bool:
    pairs = [(first.part(part), second.part(part)) for part in ("unet", "vae", "text_encoder")]
    return all(torch.equal(tensor, b.state_dict()[name]) for a, b in pairs for name, tensor in a.state_dict().items())


def test_the_revision_of_a_folder_follows_its_content_and_not_its_place(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "copy")
    assert locate_base(str(tmp_path / "copy")).revision == locate_base(str(BASE)).revision
    config = tmp_path / "copy/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    assert locate_base(str(tmp_path / "copy")).revision != locate_base(str(BASE)).revision


def test_short_names_stand_for_pinned_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_base("nano").revision == locate_base(str(BASE)).revision
    for name, source in PINNED.items():
        assert source_of(name) == source
        assert is_hub_id(source.partition("@")[0])
        assert is_commit(source.partition("@")[2])
    assert PINNED["sd15"] == FAMILIES["sd1"].default_config
    assert source_of("owner/name") == "owner/name"
    for name in set(PUBLISHED) - set(PINNED):
        with pytest.raises(ConfigError, match=f"no commit of {name} "):
            locate_base(name)
    with pytest.raises(CheckpointError, match="nor one of nano, nano-flow, sd15, sdxl"):
        locate_base("sd16")


def test_a_folder_of_that_name_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, tmp_path / "sd15")
    assert locate_base("sd15").revision == locate_base(str(BASE)).revision


def test_a_single_file_takes_its_configuration_by_a_short_name(base: BaseModel, tmp_path: Path) -> None:
    save_file(to_ldm(base), tmp_path / "model.safetensors")
    assert locate_base(str(tmp_path / "model.safetensors"), config="nano").config == EMBEDDED


def test_a_single_file_in_the_original_layout_is_the_same_model(base: BaseModel, tmp_path: Path) -> None:
    save_file(to_ldm(base), tmp_path / "model.safetensors")
    loaded = load_base(locate_base(str(tmp_path / "model.safetensors"), config=str(BASE)))
    assert same_weights(loaded, base)


def test_a_pinned_hub_revision_is_downloaded_by_the_real_client(
    base: BaseModel, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("someone/nano", COMMIT, BASE)
    location = locate_base(f"someone/nano@{COMMIT}")
    assert (location.name, location.revision) == ("someone/nano", COMMIT)
    assert same_weights(load_base(location), base)


def test_a_branch_instead_of_a_commit_is_refused() -> None:
    for source in ("someone/nano", "someone/nano@main"):
        with pytest.raises(CheckpointError, match="name the commit"):
            locate_base(source)


def test_an_unknown_hub_model_is_a_clear_error(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        locate_base(f"someone/else@{COMMIT}")


def test_a_folder_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "base/unet/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        locate_base(str(tmp_path / "base"))


def test_other_sources_are_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        locate_base(str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a folder"):
        locate_base("./no/such/place")
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="not a whole single-file"):
        locate_base(str(tmp_path / "unet.safetensors"))
