"""A base whose denoiser is one file in the model's own layout, and everything else the folder of --base-config."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import CheckpointError
from audit.models.base import BaseModel, load_base, load_vae, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.choose import choose_base
from audit.models.tuning import family_warnings
from tests.models import nano
from tests.models.test_hostile_layouts import FAMILIES, good, original_state

COMFY = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def wan(folder: Path) -> BaseModel:
    return nano.make("wan", folder)


def without_denoiser(base: BaseModel, source: Path, target: Path) -> Path:
    """A folder with the denoiser's configuration and none of its weights."""
    part = base.architecture.denoiser
    shutil.copytree(source, target)
    for file in (target / part).glob("*.safetensors"):
        file.unlink()
    return target


@pytest.mark.parametrize(
    ("family", "prefix"),
    [*((name, "") for name in FAMILIES if name not in ("z-image", "klein")), ("z-image", COMFY), ("sd1", "")],
)
def test_a_file_of_the_denoiser_and_a_folder_of_the_rest(
    folder: Path, tmp_path: Path, family: str, prefix: str
) -> None:
    """Every weight of the file is in its place, all others are the folder's, and the network computes."""
    own = nano.make(family, folder)
    rest = without_denoiser(own, folder / family, tmp_path / "rest")
    file = tmp_path / "transformer.safetensors"
    state = {
        prefix + name.removeprefix("net.") if prefix else name: value for name, value in original_state(own).items()
    }
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    base = load_base(locate_base(str(file), str(rest)))
    before = dict(own.denoiser.named_parameters())
    for name, parameter in base.denoiser.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.01, atol=1e-6, rtol=0, msg=name)
    for part in base.architecture.networks:
        if part in (base.architecture.denoiser, "text_conditioner") or base.part(part) is None:
            continue
        ours, theirs = base.part(part).state_dict(), own.part(part).state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    architecture, device = base.architecture, torch.device("cpu")
    condition = architecture.encode(base.pipeline, ["a dog"], device)
    latents = torch.randn(1, *architecture.latent_shape(base.pipeline, 64))
    with torch.inference_mode():
        answers = [
            architecture.predict(one.pipeline, latents, torch.tensor(500.0), condition, 3.5) for one in (base, own)
        ]
    assert torch.isfinite(answers[0]).all()
    assert not torch.allclose(*answers)


def test_it_predicts_what_its_file_says(folder: Path, tmp_path: Path) -> None:
    """Whatever the folder's scheduler does, as a whole file's base; what is not sampled is refused."""
    state = {name: value.contiguous() for name, value in nano.make("sd1", folder).denoiser.state_dict().items()}
    file = tmp_path / "a.safetensors"
    for mark, metadata in (({"v_pred": torch.zeros(0)}, {}), ({}, {"modelspec.prediction_type": "v"})):
        save_file(state | mark, file, metadata)
        config = load_base(locate_base(str(file), str(folder / "sd1"))).pipeline.scheduler.config
        assert config.prediction_type == "v_prediction"
    save_file(state, file)
    assert load_base(locate_base(str(file), str(folder / "sd1"))).pipeline.scheduler.config.prediction_type == "epsilon"
    save_file(state | {"edm_mean": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="made for EDM's noise, which is not sampled"):
        locate_base(str(file), str(folder / "sd1"))


def test_its_precision_is_kept_where_a_gpu_computes(wan: BaseModel, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "wan.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in original_state(wan).items()}, file)
    location = locate_base(str(file), str(folder / "wan"))
    assert {one.dtype for one in load_base(location, as_stored=True).denoiser.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in load_base(location).denoiser.parameters()} == {torch.float32}
    vae = load_vae(location)
    assert torch.equal(vae.part("vae").decoder.conv_in.weight, wan.part("vae").decoder.conv_in.weight)


def test_the_revision_is_of_the_file_and_of_all_parts_but_the_folders_denoiser(
    wan: BaseModel, folder: Path, tmp_path: Path
) -> None:
    state = original_state(wan)
    save_file(state, tmp_path / "a.safetensors")
    one = locate_base(str(tmp_path / "a.safetensors"), str(folder / "wan"))
    bare = without_denoiser(wan, folder / "wan", tmp_path / "rest")
    assert locate_base(str(tmp_path / "a.safetensors"), str(bare)).revision == one.revision
    (bare / "scheduler/scheduler_config.json").write_text(
        json.dumps(json.loads((bare / "scheduler/scheduler_config.json").read_text()) | {"flow_shift": 5.0})
    )
    assert locate_base(str(tmp_path / "a.safetensors"), str(bare)).revision != one.revision
    state["head.head.bias"] += 1
    save_file(state, tmp_path / "b.safetensors")
    assert locate_base(str(tmp_path / "b.safetensors"), str(folder / "wan")).revision != one.revision


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "1 tensors of its transformer are missing, such as 'proj_out.bias'"),
        ("strange", "blocks.0.extra.weight has no place in it"),
        ("shape", r"head.head.bias has the shape \(3,\), the base"),
        ("twice", "is there twice, in two spellings"),
        ("number", "head.head.bias is not finite"),
        ("adapter", "is an adapter and no base model"),
        ("other folder", "no transformer of the QwenImagePipeline in"),
        ("real name", "is of family wan, and .* is a QwenImagePipeline: give the folder of a WanPipeline"),
        ("no config", r"has no transformer/config\.json"),
        ("no encoder", "text_encoder has no model.safetensors"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(
    wan: BaseModel, folder: Path, tmp_path: Path, what: str, said: str
) -> None:
    rest, state = folder / "wan", original_state(wan)
    if what == "missing":
        del state["head.head.bias"]
    elif what == "strange":
        state["blocks.0.extra.weight"] = torch.ones(2)
    elif what == "shape":
        state["head.head.bias"] = torch.ones(3)
    elif what == "twice":
        state["proj_out.bias"] = state["head.head.bias"].clone()
    elif what == "number":
        state["head.head.bias"][0] = float("inf")
    elif what == "adapter":
        state = good(wan)
    elif what in ("other folder", "real name"):
        nano.make("qwen", folder)
        rest = folder / "qwen"
        if what == "real name":
            state = {"blocks.0.self_attn.q.weight": torch.ones(1536, 2)}
    else:
        rest = tmp_path / "rest"
        shutil.copytree(folder / "wan", rest)
        (rest / ("transformer/config.json" if what == "no config" else "text_encoder/model.safetensors")).unlink()
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said):
        load_base(locate_base(str(tmp_path / "a.safetensors"), str(rest)))


def test_without_a_folder_it_is_asked_for(wan: BaseModel, folder: Path, tmp_path: Path) -> None:
    save_file(original_state(wan), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="name the diffusers folder of the others with --base-config"):
        locate_base(str(tmp_path / "a.safetensors"))


def test_inspect_takes_such_a_base(wan: BaseModel, folder: Path, tmp_path: Path) -> None:
    save_file(original_state(wan), tmp_path / "wan.safetensors")
    save_file(good(wan), tmp_path / "lora.safetensors")
    arguments = ["inspect", str(tmp_path / "lora.safetensors"), "--base", str(tmp_path / "wan.safetensors"),
                 "--base-config", str(folder / "wan"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["base"] == "wan.safetensors"


def test_of_two_denoisers_none_is_guessed(wan: BaseModel, folder: Path, tmp_path: Path) -> None:
    save_file(original_state(wan), tmp_path / "a.safetensors")
    shutil.copytree(folder / "wan", tmp_path / "two")
    index = tmp_path / "two/model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"transformer_2": ["diffusers", "WanTransformer3DModel"]})
    )
    with pytest.raises(CheckpointError, match="has two denoisers"):
        locate_base(str(tmp_path / "a.safetensors"), str(tmp_path / "two"))


def test_a_claimed_hash_is_that_of_the_file(wan: BaseModel, folder: Path, tmp_path: Path) -> None:
    """As sd-scripts writes it, of the denoiser's file."""
    save_file(original_state(wan), tmp_path / "a.safetensors")
    own = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    save_file(good(wan), tmp_path / "lora.safetensors", {"ss_new_sd_model_hash": own})
    bases = {"one": str(folder / "wan"), "two": str(tmp_path / "a.safetensors")}
    choice = choose_base(open_checkpoint(tmp_path / "lora.safetensors"), bases, {"two": str(folder / "wan")})
    assert choice.name == "two"
    base, named = load_base(locate_base(bases["two"], str(folder / "wan"))), {"ss_sd_model_name": "Wan2.1-T2V-14B"}
    for metadata, warned in ((named, True), ({"ss_new_sd_model_hash": own} | named, False)):
        save_file(good(wan), tmp_path / "lora.safetensors", metadata)
        said = family_warnings(open_checkpoint(tmp_path / "lora.safetensors"), base)
        assert any("cannot be told by its name or hash" in one for one in said) is warned
