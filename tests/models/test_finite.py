"""Numbers that are not finite: refused anywhere in a file, and never printed as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.cli.common import print_json
from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.inspect import inspect
from audit.models.tuning import tune
from audit.workspace import Workspace
from tests.models import nano
from tests.models.test_formats import flux_original
from tests.models.test_trainers import POINT, RANK, drawn, flat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def sd1(folder: Path) -> BaseModel:
    return nano.make("sd1", folder)


PLACES = ("lora", "lora without a place", "alpha", "embedding", "half a lora", "full", "vae")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_is_not_finite_anywhere_is_refused(
    sd1: BaseModel, tmp_path: Path, place: str, value: float
) -> None:
    """In the file as a whole, and in what is said of it."""
    bad = drawn(RANK, 32, 1, 1)
    bad[1, 2] = value
    stem = flat(POINT)
    good = {f"{stem}.lora_down.weight": drawn(RANK, 32, 1, 1), f"{stem}.lora_up.weight": drawn(32, RANK, 1, 1)}
    state = {
        "lora": good | {f"{stem}.lora_down.weight": bad},
        "lora without a place": good
        | {"lora_unet_no.lora_down.weight": bad, "lora_unet_no.lora_up.weight": drawn(32, RANK, 1, 1, size=1e-9)},
        "alpha": good | {f"{stem}.alpha": torch.tensor(value)},
        "embedding": good | {"bundle_emb.x.clip_l": bad[..., 0, 0]},
        "half a lora": good | {"lora_unet_no.lora_down.weight": bad},
        "full": {**sd1.denoiser.state_dict(), "conv_in.bias": torch.full((32,), value)},
        "vae": {f"model.diffusion_model.{n}": t for n, t in sd1.denoiser.state_dict().items()}
        | {"first_stage_model.x": bad},
    }[place]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors")
    if place != "vae":
        with pytest.raises(CheckpointError, match="is not finite"):
            tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "f.safetensors"), "--json"])
    assert done.exit_code == 2, done.output
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert "is not finite" in found["problem"]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "f.safetensors")], env={"COLUMNS": "200"})
    assert (shown.exit_code, shown.exception.__class__) == (2, SystemExit)
    assert "cannot be audited" in shown.output


def test_constants_of_checkpoints_may_be_infinite(folder: Path, tmp_path: Path) -> None:
    """OpenCLIP's mask has minus infinity above its diagonal, the noise of the first step none."""
    base = nano.make("flux", folder)
    state = {f"model.diffusion_model.{name}": t for name, t in flux_original(base).items()}
    state["model.diffusion_model.img_in.weight"] = state["model.diffusion_model.img_in.weight"] + 0.1
    state["cond_stage_model.model.attn_mask"] = torch.full((4, 4), -float("inf"))
    state["log_one_minus_alphas_cumprod"] = torch.tensor([-float("inf")])
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors")
    assert tune(base, open_checkpoint(tmp_path / "f.safetensors")).unused == []
    assert inspect(tmp_path / "f.safetensors", base).problem is None


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    value = {
        "a": float("nan"), "b": [float("inf"), {"c": (-float("inf"), 1.5)}], "d": np.array([1.0, np.nan]),
        "e": np.float32("inf"), float("nan"): 1, "f": {1.5}, "g": torch.tensor(float("nan")), "h": True, "i": None,
    }  # fmt: skip
    print_json(value)
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found == {
        "a": None, "b": [None, {"c": [None, 1.5]}], "d": [1.0, None], "e": None, "nan": 1, "f": [1.5], "g": None,
        "h": True, "i": None,
    }  # fmt: skip


def test_queries_print_valid_json(tmp_path: Path) -> None:
    sql = "SELECT 'nan'::DOUBLE AS a, 'inf'::FLOAT AS b, ['-inf'::DOUBLE, 1] AS c, {'d': 'nan'::DOUBLE} AS e"
    Workspace(tmp_path / "w")
    done = CliRunner().invoke(app, ["query", sql, "--json", "--workspace", str(tmp_path / "w")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert found == [{"a": None, "b": None, "c": [None, 1], "e": {"d": None}}]
