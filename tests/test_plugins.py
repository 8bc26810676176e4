"""Families, sources, descriptors and stages of other packages: a file each, and an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import audit
from audit.cli import app
from audit.config import load_config
from audit.demo import set_folder
from audit.descriptors.registry import DESCRIPTORS, load_descriptor
from audit.errors import ConfigError
from audit.models.base import load_base, locate_base
from audit.models.families.identify import family_of_name, family_of_shapes
from audit.models.families.registry import FAMILIES
from audit.models.safetensors_header import TensorInfo
from audit.registry import Registry
from audit.stages import STAGES, StageKind, stages_for
from audit.workspace import Workspace
from crawlers.source import SOURCES
from tests.conftest import BASE, KOHYA
from tests.models import nano

REGISTRIES: tuple[Registry[Any], ...] = (FAMILIES, SOURCES, DESCRIPTORS, STAGES)
QUICK = {"steps": 2, "images_per_training_image": 2}
POINTS = Path(__file__).parent / "plugin/entry_points.txt"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, points: str) -> None:
    """What pip leaves of a package: its metadata, on the path. Its code is ``tests.plugin``."""
    metadata = folder / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(folder))
    for registry in REGISTRIES:
        registry.forget()


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    for registry in REGISTRIES:
        registry.forget()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    install(tmp_path / "site", monkeypatch, POINTS.read_text())


def test_what_comes_with_the_package_is_there() -> None:
    assert set(FAMILIES) == {
        "sd1",
        "sdxl",
        "sd3",
        "flux",
        "chroma",
        "altdiffusion",
        "flux2",
        "flux2-klein",
        "z-image",
        "qwen-image",
        "wan",
        "ernie-image",
        "krea-2",
        "hidream",
        "kolors",
        "anima",
    }
    assert set(SOURCES) == {"civitai", "huggingface", "folder"}
    assert set(DESCRIPTORS) == {"nano", "sscd", "sscd-int8", "pdq"}
    assert [stage.name for stage in stages_for([])] == ["sample", "control", "membership", "cluster", "match", "report"]


@pytest.mark.usefixtures("plugin")
def test_others_are_there_once_their_package_is_installed() -> None:
    assert all("toy" in registry for registry in (FAMILIES, SOURCES, DESCRIPTORS))
    names = [stage.name for stage in stages_for([])]
    assert names == ["sample", "control", "membership", "cluster", "count", "match", "report"]
    assert family_of_name("Toy Video 1.0") == "toy"
    assert family_of_shapes({"x.adaln_single.linear.weight": TensorInfo("F32", (4, 4), 0, 64)}) == "toy"
    assert load_descriptor("toy").dimensions == 192


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ("[lora_audit.families]\nnone = tests.plugin.nowhere:FAMILY", "cannot be loaded: ModuleNotFoundError"),
        ("[lora_audit.families]\ntoy = tests.plugin.toy_source:SOURCE", "is no ModelFamily"),
        ("[lora_audit.families]\nother = tests.plugin.toy_family:FAMILY", "calls itself 'toy'"),
        ("[lora_audit.descriptors]\nnano = audit.descriptors.nano:DESCRIPTOR", "takes a name that is taken"),
        ("[lora_audit.stages]\nlost = tests.test_plugins:LOST", "to come after 'nowhere', which is not there"),
    ],
)
def test_a_package_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: str, words: str
) -> None:
    install(tmp_path, monkeypatch, points)
    with pytest.raises(ConfigError, match=words):
        [list(registry) for registry in REGISTRIES] and stages_for([])


LOST = StageKind("lost", "nowhere", lambda references: None)


def video(folder: Path) -> Path:
    """A nano PixArt, saved as its pipeline saves itself."""
    torch.manual_seed(9)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=16, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    pipeline = diffusers.PixArtSigmaPipeline(
        nano.word_tokenizer(), nano.t5(16), nano.vae(4), transformer, nano.scheduler()
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("plugin")
def test_a_family_with_a_time_axis_is_audited_from_a_file_to_a_page(tmp_path: Path) -> None:
    base = video(tmp_path / "base")
    loaded = load_base(locate_base(str(base)))
    assert loaded.family == "toy"
    torch.manual_seed(1)
    state = {
        f"transformer.transformer_blocks.{block}.attn1.{layer}.lora_{side}.weight": torch.randn(shape)
        for block in (0, 1)
        for layer in ("to_q", "to_v")
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    result = audit.scan(
        tmp_path / "pytorch_lora_weights.safetensors", str(base), captions=["a red dog"], n0=2, descriptor="toy",
        references=[set_folder("fluent-animals", "train")], workspace=tmp_path / "w", device="cpu",
        settings=audit.Settings(steps=2, images_per_training_image=2),
        training_images=set_folder("stamps-fruit", "train"),
    )  # fmt: skip
    [row] = Workspace(tmp_path / "w").rows("SELECT images, descriptor FROM audits")
    assert row == {"images": 4, "descriptor": "toy-8"}
    assert Path(result.page).is_file()
    assert (tmp_path / "w/toy" / f"{result.audit_id}.txt").read_text().endswith(" 1")  # the stage knows the question


@pytest.mark.usefixtures("plugin")
def test_a_source_is_a_command_and_its_files_run_through_the_stage(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{KOHYA}\n{tmp_path / 'missing.safetensors'}\n")
    where = ("--workspace", str(tmp_path / "w"))
    shown = CliRunner().invoke(app, ["crawl", "toy", "--help"], env={"COLUMNS": "200"})
    assert "Take in the files of a list." in shown.output
    assert "--containing" in shown.output
    words = ["crawl", "toy", str(tmp_path / "list.txt"), "--containing", "fluent", *where, "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [row] = Workspace(tmp_path / "w").rows("SELECT source, state, family FROM checkpoints")
    assert (row["state"], row["family"]) == ("stored", "sd1")
    overrides: dict[str, Any] = {"workspace": str(tmp_path / "w"), "descriptor": "nano", "bases.sd1": str(BASE)}
    config = load_config(None, {}, overrides | {f"settings.{name}": value for name, value in QUICK.items()})
    state = audit.run(config)
    assert (state.finished, state.failed) == (1, 0)
    [counted] = list((tmp_path / "w/toy").glob("*.txt"))
    counted.unlink()  # not done: the next run makes up for it, and samples nothing
    state = audit.run(config)
    assert (state.finished, state.images) == (1, 0)
    assert counted.is_file()
    assert audit.run(config).finished == 0
