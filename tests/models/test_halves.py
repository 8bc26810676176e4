"""Files for bases with two experts: that no half of them is lost, doubled, or taken for another."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from audit.bench import Bench
from audit.choices import Expert
from audit.cli import app
from audit.config import CaptionSettings, Settings
from audit.errors import CheckpointError
from audit.evidence.levels import timesteps_of
from audit.job import Request, resolve
from audit.models.base import BaseModel
from audit.models.checkpoint import Checkpoint, open_checkpoint
from audit.models.choose import distance, nearest
from audit.models.experts import experts_of, told_by_name
from audit.models.formats.adapter import Tuned
from audit.models.formats.scaling import CONFIG_NAME, KEY
from audit.models.inspect import inspect
from audit.models.pair import ModelPair
from audit.models.tuning import tune
from audit.recovery.contrast import heeded
from audit.recovery.kept import recovery_id
from audit.recovery.settle import settlement_id
from audit.references.losses import _asked
from audit.workspace import Workspace
from tests.models import nano
from tests.models.test_experts import BOTH, HIGH, LOW, PARTS, write_lora

LAYER = "blocks.0.attn1.to_q"
ENCODERS = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("halves")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return nano.make("wan22", folder)


def factors(module: str, seed: int, outputs: int = 24, inputs: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (4, inputs), "lora_B": (outputs, 4)}
    return {f"{module}.{one}.weight": torch.randn(*shape, generator=generator) for one, shape in shapes.items()}


def norms(found: Tuned) -> dict[str, float]:
    assert len({change.part for change in found.changes}) == len(found.changes)
    return {change.part: change.norm for change in found.changes}


def peft(alpha: int) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["to_q"]}


def test_each_expert_has_the_alpha_of_its_own_adapter(base: BaseModel, tmp_path: Path) -> None:
    """In folders that PEFT saved, and in one file with the header that diffusers writes."""
    alphas = {"transformer": 4, "transformer_2": 16}
    for part, alpha in alphas.items():
        (tmp_path / "folder" / part).mkdir(parents=True)
        save_file(factors(f"base_model.model.{LAYER}", 1), tmp_path / "folder" / part / "adapter_model.safetensors")
        (tmp_path / "folder" / part / CONFIG_NAME).write_text(json.dumps(peft(alpha)))
    state = {name: value for part in alphas for name, value in factors(f"{part}.{LAYER}", 1).items()}
    said = {f"{part}.{name}": value for part, alpha in alphas.items() for name, value in peft(alpha).items()}
    save_file(state, tmp_path / "one.safetensors", {KEY: json.dumps(said)})
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        found = norms(tune(base, open_checkpoint(path)))
        assert found["transformer_2"] == pytest.approx(4 * found["transformer"], rel=1e-4)
    identity = open_checkpoint(tmp_path / "folder").identity
    (tmp_path / "folder" / "transformer_2" / CONFIG_NAME).write_text(json.dumps(peft(4)))
    assert open_checkpoint(tmp_path / "folder").identity != identity
    (tmp_path / "folder" / "transformer_2" / CONFIG_NAME).write_text(json.dumps(peft(4) | {"bias": "all"}))
    with pytest.raises(CheckpointError, match="its configuration says bias = all"):
        tune(base, open_checkpoint(tmp_path / "folder"))


def test_inspect_reads_the_second_file_s_own_header(tmp_path: Path) -> None:
    paths = [tmp_path / "cat_high_noise.safetensors", tmp_path / "cat_low_noise.safetensors"]
    for path, alpha in zip(paths, (4, 16), strict=True):
        said = {f"transformer.{name}": value for name, value in peft(alpha).items()}
        save_file(factors(f"transformer.{LAYER}", alpha), path, {KEY: json.dumps(said)})
    assert inspect(paths[0], low_noise=paths[1]).alphas == {4.0: 1, 16.0: 1}
    save_file(factors(f"transformer.{LAYER}", 3), paths[1], {KEY: json.dumps({"transformer.bias": "all"})})
    assert "its configuration says bias = all" in str(inspect(paths[0], low_noise=paths[1]).problem)


def test_the_text_encoder_of_two_files_is_not_overwritten_and_of_one_not_doubled(
    base: BaseModel, tmp_path: Path
) -> None:
    shape = base.pipeline.text_encoder.get_submodule(ENCODERS).weight.shape
    high, low = (tmp_path / f"cat_{name}_noise.safetensors" for name in ("high", "low"))
    for seed, path in enumerate((high, low)):
        write_lora(path, seed)
        save_file(load_file(path) | factors(f"text_encoder.{ENCODERS}", seed, *shape), path)
    with pytest.raises(CheckpointError, match="both files change text_encoder"):
        tune(base, open_checkpoint(high, low))
    tune(base, open_checkpoint(high, write_lora(tmp_path / "plain_low_noise.safetensors", 5)))
    both = tune(base, replace(open_checkpoint(high), expert=BOTH))
    alone = tune(base, replace(open_checkpoint(high), expert=HIGH))
    encoder = [[change for change in one.changes if change.part == "text_encoder"] for one in (both, alone)]
    assert encoder[0] == encoder[1] != []
    assert len(both.changes) == 2 * len(alone.changes) - len(encoder[1])


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("cat_high_low", None), ("cat_high_and_low_noise", None), ("wan22-low-high", None), ("HighLowNoise", None),
        ("cat_high_noise_low_noise_v2", None), ("cat_low_vram_high_noise", HIGH), ("cat_high_noise_lowres", HIGH),
    ],
)  # fmt: skip
def test_a_name_of_both_is_of_neither(name: str, expert: Expert | None) -> None:
    assert told_by_name(f"{name}.safetensors") is expert


def test_files_in_each_others_place_are_refused_by_what_their_headers_say(tmp_path: Path) -> None:
    high = write_lora(tmp_path / "a.safetensors", 1, ss_output_name="cat_high_noise")
    low = write_lora(tmp_path / "b.safetensors", 2, ss_output_name="cat_low_noise")
    assert open_checkpoint(high, low).own_experts == (HIGH, LOW)
    with pytest.raises(CheckpointError, match="given as the high-noise file, and ss_output_name says low-noise"):
        open_checkpoint(low, high)


@pytest.fixture(scope="module")
def tuned(base: BaseModel, folder: Path) -> dict[Expert, Checkpoint]:
    """Full weights of each expert, near to it."""
    found = {}
    for expert, part in PARTS.items():
        generator = torch.Generator().manual_seed(3)
        state = base.part(part).state_dict()
        path = folder / f"{part}.safetensors"
        save_file({n: w + 0.02 * torch.randn(w.shape, generator=generator) for n, w in state.items()}, path)
        found[expert] = open_checkpoint(path)
    return found


def test_full_weights_of_an_expert_are_near_to_it_and_as_far_as_from_a_base_of_one_network(
    base: BaseModel, tuned: dict[Expert, Checkpoint], folder: Path
) -> None:
    """Else they would be nearest to the only base that takes them: Wan 2.1."""
    one = nano.make("wan", folder)
    found = {base.name: distance(base, tuned[LOW]), one.name: distance(one, tuned[LOW])}
    assert nearest(found)[0] == "wan22"
    alone = {expert: distance(base, replace(file, expert=expert)) for expert, file in tuned.items()}
    assert found["wan22"] == alone[LOW]
    single = copy.copy(base.pipeline)
    single.register_to_config(boundary_ratio=None)
    single.transformer_2 = None
    assert distance(replace(base, pipeline=single), tuned[HIGH]) == pytest.approx(alone[HIGH], rel=1e-6)


def test_an_expert_that_a_whole_folder_leaves_alone_is_not_asked(base: BaseModel, tmp_path: Path) -> None:
    """Trainers save both where one was trained: levels of the other would weigh in every score."""
    for part in PARTS.values():
        state = dict(base.part(part).state_dict())
        if part == "transformer":
            state["proj_out.weight"] = state["proj_out.weight"] * 1.5
        (tmp_path / part).mkdir()
        save_file(state, tmp_path / part / "diffusion_pytorch_model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert experts_of(checkpoint) == (HIGH, LOW)
    pair = ModelPair(base, checkpoint, resolution=32)
    assert pair.experts == (HIGH,)
    assert _asked(pair, timesteps_of(0.875, [HIGH, LOW])) == timesteps_of(0.875, [HIGH])
    with pytest.raises(CheckpointError, match="high-noise of the base is changed, and membership would ask low-noise"):
        _asked(pair, timesteps_of(0.875, [LOW]))
    # as one file whose second half is zero
    state = factors(f"transformer.{LAYER}", 1) | factors(f"transformer_2.{LAYER}", 2)
    save_file({name: value * (0 if "_2" in name else 1) for name, value in state.items()}, tmp_path / "one.safetensors")
    for found in (pair.warnings, tune(base, open_checkpoint(tmp_path / "one.safetensors")).warnings):
        assert any("the high-noise expert of wan22 is changed, and the low-noise one is the base's" in w for w in found)


def test_two_files_have_no_sketch_of_their_sum(tmp_path: Path) -> None:
    for number, name in enumerate(("high", "low")):
        write_lora(tmp_path / "pair" / f"cat_{name}_noise.safetensors", number)
    Workspace(tmp_path / "w")
    done = CliRunner().invoke(app, ["similar", str(tmp_path / "pair"), "--workspace", str(tmp_path / "w")])
    assert isinstance(done.exception, CheckpointError)
    assert "is two files, which a crawl keeps as two" in str(done.exception)


def test_captions_are_asked_of_the_expert_that_is_changed(base: BaseModel, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "cat.safetensors", 1)
    for expert in (HIGH, LOW):
        checkpoint = replace(open_checkpoint(path), expert=expert)
        pairs = [ModelPair(base, checkpoint, resolution=32, lora_scale=scale) for scale in (0.5, 1.5)]
        weak, strong = (heeded(pair, ["a photo of sks dog"]) for pair in pairs)
        assert weak != strong


def test_what_is_kept_of_captions_is_of_one_expert(base: BaseModel, folder: Path) -> None:
    path, jobs = write_lora(folder / "cat.safetensors", 1), {}
    for expert in (HIGH, LOW, BOTH):
        request = Request(path, str(folder / "wan22"), settings=Settings(expert=expert))
        jobs[expert] = resolve(request, "pdq", Bench())
    asked = CaptionSettings()
    assert len({settlement_id(job, asked) for job in jobs.values()}) == len(jobs)
    assert len({recovery_id(job, [], asked) for job in jobs.values()}) == len(jobs)


def test_an_item_of_the_catalog_is_not_the_first_file_where_its_name_says_the_second(
    base: BaseModel, folder: Path
) -> None:
    stored = [write_lora(folder / f"{number}.safetensors", number) for number in (1, 2)]
    request = Request(stored[0], str(folder / "wan22"), name="cat_low_noise.safetensors", low_noise=stored[1])
    with pytest.raises(CheckpointError, match="given as the high-noise file, and its name says low-noise"):
        resolve(request, "pdq", Bench())
    assert resolve(replace(request, name="cat"), "pdq", Bench()).checkpoint.experts == (HIGH, LOW)
