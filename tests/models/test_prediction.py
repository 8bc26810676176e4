"""What a file says that it predicts: followed in a single-file base, refused where it contradicts the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from audit.config import Solver
from audit.errors import CheckpointError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.inspect import inspect
from audit.models.pair import ModelPair
from audit.models.tuning import tune
from audit.sampling.guidance import ModelGuidance
from audit.sampling.sampler import Sampler
from tests.conftest import BASE, KOHYA
from tests.models import nano
from tests.models.files import full_change
from tests.models.ldm import to_ldm

EMPTY = torch.zeros(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def epsilon(folder: Path) -> BaseModel:
    base = nano.make("sd1", folder)
    assert base.pipeline.scheduler.config.prediction_type == "epsilon"
    return base


def with_scheduler(source: Path, target: Path, **values: Any) -> BaseModel:
    shutil.copytree(source, target)
    config = target / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return load_base(locate_base(str(target)))


@pytest.fixture(scope="module")
def velocity(epsilon: BaseModel, folder: Path) -> BaseModel:
    return with_scheduler(folder / "sd1", folder / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True)


@pytest.fixture(scope="module")
def shipped(folder: Path) -> BaseModel:
    """The small model that comes along, as if it predicted eps: diffusers reads its single file."""
    return with_scheduler(BASE, folder / "shipped", prediction_type="epsilon", rescale_betas_zero_snr=False)


def full(base: BaseModel, path: Path, metadata: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
    """The base's UNet with noise, in one file, with markers and metadata beside."""
    state = load_file(full_change(base, path) / "unet/diffusion_pytorch_model.safetensors")
    save_file({**state, **more}, path / "f.safetensors", metadata)
    return path / "f.safetensors"


MARKED: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
    "key": ({"v_pred": EMPTY}, {}),
    "keys": ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}),
    "ModelSpec": ({}, {"modelspec.prediction_type": "v"}),
    "ModelSpec, spelled out": ({}, {"modelspec.prediction_type": "v_prediction"}),
    "ComfyUI": ({}, {"modelspec.predict_key": "v"}),
    "sd-scripts": ({}, {"ss_v_parameterization": "True"}),
}


@pytest.mark.parametrize("kind", list(MARKED))
def test_a_model_of_v_against_a_base_of_eps_is_refused_in_words(epsilon: BaseModel, tmp_path: Path, kind: str) -> None:
    tensors, metadata = MARKED[kind]
    checkpoint = open_checkpoint(full(epsilon, tmp_path, metadata, **tensors))
    with pytest.raises(CheckpointError, match="predicts v_prediction, sd1 predicts epsilon: give as --base"):
        tune(epsilon, checkpoint)


@pytest.mark.parametrize("kind", list(MARKED))
def test_against_a_base_of_its_kind_it_is_taken(velocity: BaseModel, tmp_path: Path, kind: str) -> None:
    tensors, metadata = MARKED[kind]
    tuned = tune(velocity, open_checkpoint(full(velocity, tmp_path, metadata, **tensors)))
    assert tuned.unused == []
    assert tuned.warnings == []
    assert tuned.networks


def test_the_other_way_round_and_an_adapter(velocity: BaseModel, tmp_path: Path) -> None:
    path = full(velocity, tmp_path, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match="says that it predicts epsilon"):
        tune(velocity, open_checkpoint(path))
    save_file(load_file(KOHYA), tmp_path / "lora.safetensors", {"modelspec.prediction_type": "epsilon"})
    shipped = load_base(locate_base(str(BASE)))
    assert shipped.pipeline.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match=r"modelspec\.prediction_type says that it predicts epsilon"):
        tune(shipped, open_checkpoint(tmp_path / "lora.safetensors"))


def test_zero_terminal_snr_needs_a_base_with_it(epsilon: BaseModel, folder: Path, tmp_path: Path) -> None:
    other = with_scheduler(folder / "sd1", tmp_path / "v", prediction_type="v_prediction")
    checkpoint = open_checkpoint(full(other, tmp_path, v_pred=EMPTY, ztsnr=EMPTY))
    with pytest.raises(CheckpointError, match="zero terminal SNR"):
        tune(other, checkpoint)


def test_what_contradicts_itself_or_is_made_for_other_noise_is_refused(epsilon: BaseModel, tmp_path: Path) -> None:
    path = full(epsilon, tmp_path, {"modelspec.prediction_type": "epsilon"}, v_pred=EMPTY)
    with pytest.raises(CheckpointError, match="contradicts itself: v_pred says v_prediction"):
        tune(epsilon, open_checkpoint(path))
    assert "contradicts itself" in str(inspect(path).problem)
    path = full(epsilon, tmp_path, {"modelspec.prediction_type": "rectified flow"})
    with pytest.raises(CheckpointError, match="predicts 'rectified flow', which is not sampled"):
        tune(epsilon, open_checkpoint(path))
    path = full(epsilon, tmp_path, **{"edm_vpred.sigma_max": torch.tensor(120.0)})
    with pytest.raises(CheckpointError, match="EDM"):
        tune(epsilon, open_checkpoint(path))


def test_a_folder_says_it_by_its_scheduler(
    epsilon: BaseModel, velocity: BaseModel, folder: Path, tmp_path: Path
) -> None:
    full_change(velocity, tmp_path / "m")
    shutil.copytree(folder / "v" / "scheduler", tmp_path / "m" / "scheduler")
    assert tune(velocity, open_checkpoint(tmp_path / "m")).networks
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json says that it predicts v_prediction"):
        tune(epsilon, open_checkpoint(tmp_path / "m"))


@pytest.mark.parametrize("kind", list(MARKED))
def test_a_base_in_one_file_is_sampled_as_it_says(shipped: BaseModel, folder: Path, tmp_path: Path, kind: str) -> None:
    """Whatever the configuration says that it is loaded with; and then its fine-tunes are of its kind."""
    tensors, metadata = MARKED[kind]
    save_file(to_ldm(shipped) | tensors, tmp_path / "b.safetensors", metadata)
    base = load_base(locate_base(str(tmp_path / "b.safetensors"), config=str(folder / "shipped")))
    config = base.pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert bool(config.rescale_betas_zero_snr) == ("ztsnr" in tensors)
    assert config.beta_end == shipped.pipeline.scheduler.config.beta_end
    if "ztsnr" in tensors:
        assert float(base.pipeline.scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)
    assert tune(base, open_checkpoint(full(base, tmp_path, metadata, **tensors))).networks


@pytest.mark.parametrize("solver", list(Solver))
def test_a_base_of_zero_terminal_snr_is_sampled(velocity: BaseModel, tmp_path: Path, solver: Solver) -> None:
    pair = ModelPair(velocity, open_checkpoint(full(velocity, tmp_path, v_pred=EMPTY, ztsnr=EMPTY)))
    assert pair.prediction_type == "v_prediction"
    latents = Sampler(pair, ModelGuidance(), ["a photo"], solver, 6, w=1.5).latents([0])
    assert torch.isfinite(latents).all()


def test_a_marked_adapter_is_one_of_v(epsilon: BaseModel, velocity: BaseModel, tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{stem}.lora_down.weight": torch.ones(2, 32, 1, 1), f"{stem}.lora_up.weight": torch.ones(32, 2, 1, 1)}
    save_file(state | {"v_pred": EMPTY}, tmp_path / "f.safetensors")
    assert tune(velocity, open_checkpoint(tmp_path / "f.safetensors")).unused == []
    with pytest.raises(CheckpointError, match="v_pred says that it predicts v_prediction"):
        tune(epsilon, open_checkpoint(tmp_path / "f.safetensors"))


def test_a_base_that_says_nothing_keeps_its_configuration(shipped: BaseModel, folder: Path, tmp_path: Path) -> None:
    save_file(to_ldm(shipped), tmp_path / "b.safetensors")
    base = load_base(locate_base(str(tmp_path / "b.safetensors"), config=str(folder / "shipped")))
    assert dict(base.pipeline.scheduler.config) == dict(shipped.pipeline.scheduler.config)


def test_a_base_that_contradicts_itself_is_refused(shipped: BaseModel, folder: Path, tmp_path: Path) -> None:
    save_file(to_ldm(shipped) | {"v_pred": EMPTY}, tmp_path / "b.safetensors", {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: it contradicts itself"):
        locate_base(str(tmp_path / "b.safetensors"), config=str(folder / "shipped"))


@pytest.mark.parametrize(
    ("prefix", "words"), [("first_stage_model.", "has no VAE"), ("cond_stage_model.", "has no text encoder")]
)
def test_a_base_in_one_file_without_a_part_is_refused_by_the_part(
    epsilon: BaseModel, folder: Path, tmp_path: Path, prefix: str, words: str
) -> None:
    state = {name: tensor for name, tensor in to_ldm(epsilon).items() if not name.startswith(prefix)}
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=words):
        locate_base(str(tmp_path / "b.safetensors"), config=str(folder / "sd1"))


def test_a_base_of_no_known_family_asks_for_its_configuration(tmp_path: Path) -> None:
    state = {"model.diffusion_model.double_layers.0.attn.w1q.weight": torch.ones(3072, 2)}
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"of no family that is known .* --base-config"):
        locate_base(str(tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    ("family", "held", "words"),
    [
        ("sdxl", ("first_stage_model.x", "conditioner.embedders.0.x"), "has no text encoder 2"),
        ("sd3", ("first_stage_model.x",), "has no text encoder 1 and no text encoder 2"),
        ("flux", ("vae.x", "text_encoders.clip_l.x"), "has no text encoder 2"),
        ("chroma", ("vae.x",), "has no text encoder"),
    ],
)
def test_parts_of_every_family_are_named(
    folder: Path, tmp_path: Path, family: str, held: tuple[str, ...], words: str
) -> None:
    nano.make(family, folder)
    names = ("model.diffusion_model.x", *held)
    save_file({name: torch.ones(1) for name in names}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=words):
        locate_base(str(tmp_path / "b.safetensors"), config=str(folder / family))


def test_a_part_that_is_damaged_is_one_sentence(epsilon: BaseModel, folder: Path, tmp_path: Path) -> None:
    state = to_ldm(epsilon)
    for name in [n for n in state if n.startswith("cond_stage_model.") and "layers.1" in n]:
        del state[name]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="does not load with the configuration"):
        load_base(locate_base(str(tmp_path / "b.safetensors"), config=str(folder / "sd1")))


@pytest.mark.parametrize("shards", [None, "100KB"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_of_bases_and_of_checkpoints_are_read(
    epsilon: BaseModel, tmp_path: Path, variant: str, shards: str | None
) -> None:
    """As save_pretrained(variant=...) names them, whole and in several files."""
    pipeline = nano.sd1()
    for name in ("unet", "text_encoder", "vae"):
        getattr(pipeline, name).load_state_dict(epsilon.part(name).state_dict())
    options = {"max_shard_size": shards} if shards else {}
    pipeline.save_pretrained(tmp_path / "m", variant=variant, **options)
    assert (tmp_path / "m/unet" / f"diffusion_pytorch_model.{variant}.safetensors").is_file() == (shards is None)
    base = load_base(locate_base(str(tmp_path / "m")))
    for name in ("unet", "text_encoder", "vae"):
        for key, tensor in base.part(name).state_dict().items():
            assert torch.equal(tensor, epsilon.part(name).state_dict()[key]), key
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    pipeline.unet.save_pretrained(tmp_path / "t" / "unet", variant=variant, **options)
    tuned = tune(epsilon, open_checkpoint(tmp_path / "t"))
    assert [change.module for change in tuned.changes] == ["conv_in"]


def test_the_older_name_of_a_variant_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.fp16.safetensors"
        save_file({f"t{number}": torch.ones(1)}, tmp_path / "unet" / name)
    assert set(open_checkpoint(tmp_path).files) == {"unet", "unet/2"}
