"""Which of the configured bases an item is audited on, and what is said where it is not the claimed one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from audit.config import load_config
from audit.engine.due import Due, Skipped
from audit.job import Job
from audit.models.base import locate_base
from audit.workspace import Workspace
from tests.conftest import BASE

NOW = datetime(2026, 5, 1, tzinfo=UTC)
PONY = "67ab2fd8ec439a89b3fedb15cc65f54336af163c7eb5e4f2acc98f090a29b0b3"


def jobs(workspace: Workspace, claims: dict[str, list[list[str]]], family: str, **bases: str) -> list[Job]:
    """The job of one item with these claims, where ``bases`` are configured."""
    row = {
        "item_id": "folder:a:x", "source": "folder", "identity": "1" * 64, "checkpoint_sha256": "2" * 64,
        "tensors_sha256": "3" * 64, "format": "lora-kohya", "state": "stored", "name": "x", "bytes": 1,
        "base_model": None, "family": family, "claims": json.dumps(claims), "seen_at": NOW, "first_seen_at": NOW,
    }  # fmt: skip
    workspace.append("checkpoints", [row])
    config = load_config(None, {}, {"workspace": str(workspace.root), "descriptor": "nano"})
    config.bases.update(bases)
    return list(Due(workspace, config, Skipped({})))


@pytest.mark.parametrize(
    ("claims", "key"),
    [
        ({"base_hash": [[PONY, "ss_new_sd_model_hash"]], "base_model": [["SDXL 1.0", "baseModel"]]}, "pony-v6"),
        ({"base_model": [["SDXL 1.0", "baseModel"], ["ponyDiffusionV6XL", "ss_sd_model_name"]]}, "pony-v6"),
        ({"base_model": [["Pony", "baseModel"]]}, "pony-v6"),
        ({"base_model": [["Illustrious", "baseModel"]]}, "sdxl"),
        ({}, "sdxl"),
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
