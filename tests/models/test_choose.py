"""``--base auto``: by claims, by the distance of full weights, and else a refusal that asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import ConfigError
from audit.models.base import locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.choose import choose_base
from tests.conftest import BASE, DREAMBOOTH, KOHYA

UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The embedded base, and one that has moved away from it a little."""
    folder = tmp_path_factory.mktemp("bases") / "moved"
    shutil.copytree(BASE, folder)
    moved = {
        name: tensor * (1.2 if name.endswith("conv1.weight") else 1) for name, tensor in load_file(BASE / UNET).items()
    }
    save_file(moved, folder / UNET, {"format": "pt"})
    return {"nano": str(BASE), "moved": str(folder)}


def lora(tmp_path: Path, **metadata: str) -> Path:
    save_file(load_file(KOHYA), tmp_path / "f.safetensors", metadata)
    return tmp_path / "f.safetensors"


def test_claims_come_first(bases: dict[str, str], tmp_path: Path) -> None:
    by_hash = lora(tmp_path, ss_new_sd_model_hash=locate_base(bases["moved"]).revision)
    assert choose_base(open_checkpoint(by_hash), bases, {}).name == "moved"
    by_name = open_checkpoint(lora(tmp_path, ss_sd_model_name="anyloraCheckpoint.safetensors"))
    named = {"sd15": bases["nano"], "anylora": bases["moved"]}
    choice = choose_base(by_name, named, {})
    assert choice.name == "anylora"
    assert "that ss_sd_model_name claims" in choice.why
    assert choose_base(open_checkpoint(lora(tmp_path)), named, {}, [("AnyLoRA", "base_model")]).name == "anylora"


def test_a_claimed_base_that_is_not_at_hand_is_asked_for(bases: dict[str, str], tmp_path: Path) -> None:
    claimed = open_checkpoint(lora(tmp_path, ss_sd_model_name="counterfeitV30_v30.safetensors"))
    with pytest.raises(ConfigError, match=r"wants Counterfeit V3.0 .* none of the bases at hand \(nano, moved\)"):
        choose_base(claimed, bases, {})
    pinned = choose_base(open_checkpoint(lora(tmp_path, ss_sd_model_name="v1-5-pruned.ckpt")), bases, {})
    assert pinned.source == "sd15"


def test_factors_choose_nothing_where_several_bases_fit(bases: dict[str, str], tmp_path: Path) -> None:
    unsaid = open_checkpoint(lora(tmp_path))
    with pytest.raises(ConfigError, match=r"does not say what it was trained on .* name one of nano, moved"):
        choose_base(unsaid, bases, {})
    with pytest.raises(ConfigError, match="none are given"):
        choose_base(unsaid, {}, {})
    family = open_checkpoint(lora(tmp_path, ss_base_model_version="sd_v1"))
    assert choose_base(family, {"sd1": bases["nano"], "sdxl": bases["moved"]}, {}).name == "sd1"


def test_full_weights_go_to_the_nearest_base(bases: dict[str, str], tmp_path: Path) -> None:
    choice = choose_base(open_checkpoint(DREAMBOOTH), bases, {})
    assert choice.name == "nano"
    assert "its weights are nearest to it" in choice.why
    twin = tmp_path / "twin"
    shutil.copytree(BASE, twin)
    with pytest.raises(ConfigError, match="about as far from several bases"):
        choose_base(open_checkpoint(DREAMBOOTH), {"nano": bases["nano"], "twin": str(twin)}, {})


def test_the_commands_take_it(bases: dict[str, str]) -> None:
    at_hand = [word for name, source in bases.items() for word in ("--among", f"{name}={source}")]
    run = CliRunner().invoke(app, ["inspect", str(DREAMBOOTH), "--base", "auto", *at_hand, "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["base"] == BASE.name
    refused = CliRunner().invoke(app, ["scan", str(KOHYA), "--base", "auto", *at_hand, "--references", str(BASE)])
    assert isinstance(refused.exception, ConfigError)  # exit code 2 where a person asks
