"""Every field of PEFT's configurations: put into effect as PEFT does, without effect, or refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.formats.detect import Format
from audit.models.formats.patterns import PatternKeys, checked
from audit.models.formats.scaling import HARMLESS, HONOURED, REFUSED, TYPES, problems
from audit.models.inspect import inspect
from audit.models.tuning import tune
from tests.models import nano
from tests.models.test_formats import assert_same_function, encoded, randomised

CONFIGS = (LoraConfig, LoHaConfig, LoKrConfig, OFTConfig, BOFTConfig, IA3Config)
LINEAR = ["to_q", "to_v", "ff.net.2"]
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def sd1(folder: Path) -> BaseModel:
    return nano.make("sd1", folder)


def by_peft(base: BaseModel, config: Any, path: Path, said: dict[str, Any] | None = None, size: float = 0.1) -> Any:
    """PEFT's own network with the adapter, whose file and configuration are in ``path``."""
    unet = copy.deepcopy(base.denoiser)
    inject_adapter_in_model(config, unet)
    randomised(unet.eval(), size)
    state = {f"base_model.model.{name}": t.clone() for name, t in get_peft_model_state_dict(unet).items()}
    save_file(state, path / "adapter_model.safetensors")
    config.save_pretrained(path)
    if said:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return unet


def assert_as_peft(base: BaseModel, config: Any, path: Path, size: float = 0.1) -> None:
    unet = by_peft(base, config, path, size=size)
    tuned = tune(base, open_checkpoint(path / "adapter_model.safetensors"))
    assert tuned.unused == []
    assert tuned.warnings == []
    assert_same_function(tuned.networks["unet"], unet, base.denoiser)


def test_every_field_of_every_configuration_is_in_one_table() -> None:
    """A new field of PEFT's fails here: it has to be put into effect, shown to be without effect, or refused."""
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    assert fields == HONOURED | HARMLESS | REFUSED
    assert len(HONOURED) + len(HARMLESS) + len(REFUSED) == len(fields)
    assert {config(target_modules=["x"]).peft_type.value for config in CONFIGS} == set(TYPES)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_plain_configuration_is_read(config: Any) -> None:
    said = json.loads(json.dumps(config(target_modules=["to_q"]).to_dict(), default=list))
    assert problems({"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in said.items()})}) == []


STARTS = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
WORDS = [name for one in STARTS for name in typing.get_args(one)]
READ = ("gaussian", "eva", "orthogonal", "mica", "pissa", "olora")


@pytest.mark.parametrize("start", [True, False, *READ, "OLoRA"])
@pytest.mark.parametrize("scaled", ["plain", "rslora"])
def test_initialisations_as_peft_undoes_them(sd1: BaseModel, tmp_path: Path, start: Any, scaled: str) -> None:
    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start, use_rslora=scaled == "rslora"
    )
    assert_as_peft(sd1, config, tmp_path)


def test_initialisations_are_all_decided() -> None:
    """PEFT's own list: a new one has to be looked at. (lora_ga is read by PEFT and not on its list.)"""
    assert set(WORDS) == {*READ, "pissa_niter_[number of iters]", "corda", "loftq"}


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga", "milora", "something new"])
def test_initialisations_that_cannot_be_undone_are_refused_by_name(sd1: BaseModel, tmp_path: Path, start: str) -> None:
    by_peft(sd1, LoraConfig(r=RANK, target_modules=LINEAR), tmp_path, {"init_lora_weights": start})
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match=re.escape(f"init_lora_weights is '{start}'")):
        tune(sd1, open_checkpoint(path))
    assert "init_lora_weights" in str(inspect(path).problem)


def test_a_start_from_a_convolution_is_refused(sd1: BaseModel, tmp_path: Path) -> None:
    by_peft(sd1, LoraConfig(r=RANK, target_modules=["conv1"]), tmp_path, {"init_lora_weights": "pissa"})
    with pytest.raises(CheckpointError, match="pissa of rank 4 does not fit"):
        tune(sd1, open_checkpoint(tmp_path / "adapter_model.safetensors"))


def test_the_start_is_part_of_the_identity(sd1: BaseModel, tmp_path: Path) -> None:
    by_peft(sd1, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR), tmp_path)
    plain = open_checkpoint(tmp_path / "adapter_model.safetensors").identity
    config = tmp_path / "adapter_config.json"
    for said in ({"init_lora_weights": "pissa"}, {"alpha_pattern": {"to_q": 9}}, {"use_rslora": True}):
        before = config.read_text()
        config.write_text(json.dumps(json.loads(before) | said))
        assert open_checkpoint(tmp_path / "adapter_model.safetensors").identity != plain
        config.write_text(before)


VARIATIONS: dict[str, Any] = {
    "alpha by a regular expression": LoraConfig(
        r=RANK, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False,
        alpha_pattern={r"mid_block.*attn[12]\.to_q": 1, "to_v": 2, r"down_blocks\.\d+\.attentions.*net\.2": 3},
    ),
    "alpha of the first pattern": LoraConfig(
        r=RANK, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False,
        alpha_pattern={".*to_q": 2, "^mid_block.*": 30, "attn1.to_q": 1},  # sorted, as PEFT saves them
    ),
    "ranks": LoraConfig(
        r=RANK, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False, rank_pattern={r".*attn2\.to_.*": 2},
    ),
    "a regular expression of targets": LoraConfig(
        r=RANK, lora_alpha=8, init_lora_weights=False, target_modules=r".*(down|up)_blocks.*attn1\.to_(q|v)",
        exclude_modules=r".*down_blocks.*",
    ),
    "layers": LoraConfig(
        r=RANK, lora_alpha=8, init_lora_weights=False, target_modules=["to_q"], layers_to_transform=[1],
        layers_pattern="down_blocks",
    ),
    "biases of the factors": LoraConfig(r=RANK, target_modules=["ff.net.2"], init_lora_weights=False, lora_bias=True),
    "DoRA": LoraConfig(r=RANK, lora_alpha=6, target_modules=LINEAR, init_lora_weights=False, use_dora=True),
    "LoHa": LoHaConfig(r=RANK, alpha=9, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 2}),
    "LoHa of convolutions": LoHaConfig(r=RANK, alpha=9, target_modules=["conv1"], use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=RANK, alpha=9, target_modules=["to_q", "conv1"], decompose_factor=4),
    "LoKr, whole factors": LoKrConfig(
        r=32, alpha=9, target_modules=["to_q", "ff.net.2"], rank_pattern={"to_q": 64}, alpha_pattern={"to_q": 5},
    ),
    "LoKr, factored both": LoKrConfig(r=2, alpha=5, target_modules=LINEAR, decompose_both=True, decompose_factor=8),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "OFT, exact": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False),
    "OFT, nine terms": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, num_cayley_neumann_terms=9),
    "OFT, constrained": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, coft=True, eps=0.4),
    "OFT, shared": OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, block_share=True),
    "OFT of convolutions": OFTConfig(r=0, oft_block_size=4, target_modules=["proj_in"]),
    "BOFT": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=LINEAR, boft_dropout=0.1),
    "IA3": IA3Config(target_modules=LINEAR, feedforward_modules=["ff.net.2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(VARIATIONS))
def test_variations_are_what_peft_makes_of_them(sd1: BaseModel, tmp_path: Path, name: str) -> None:
    assert_as_peft(sd1, VARIATIONS[name], tmp_path, size=0.3 if name.startswith("OFT") else 0.1)


HARMLESS_VALUES = {
    "fan_in_fan_out": True, "lora_dropout": 0.5, "inference_mode": False, "task_type": "FEATURE_EXTRACTION",
    "base_model_name_or_path": "x/y", "revision": "main", "megatron_core": "other", "qalora_group_size": 4,
    "peft_version": "9.9", "auto_mapping": {"base_model_class": "UNet"}, "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {"num_groups": 4}, "runtime_config": {"ephemeral_gpu_offload": True},
}  # fmt: skip


def test_fields_without_effect_change_nothing(sd1: BaseModel, tmp_path: Path) -> None:
    """All at once; the others of their table are of the tensors' shapes and in the variations above."""
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=LINEAR, init_lora_weights=False)
    unet = by_peft(sd1, config, tmp_path, HARMLESS_VALUES)
    tuned = tune(sd1, open_checkpoint(tmp_path / "adapter_model.safetensors"))
    assert_same_function(tuned.networks["unet"], unet, sd1.denoiser)
    assert set(HARMLESS_VALUES) <= HARMLESS


@pytest.mark.parametrize("name", sorted(REFUSED | {"a_field_of_tomorrow"}))
def test_fields_that_are_not_put_into_effect_are_refused_by_name(sd1: BaseModel, tmp_path: Path, name: str) -> None:
    value = {"bias": "all", "modules_to_save": ["conv_in"], "layer_replication": [[0, 2], [1, 3]]}.get(name, {"x": 1})
    by_peft(sd1, LoraConfig(r=RANK, target_modules=["to_q"]), tmp_path, {name: value})
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match=f"says {name} = "):
        tune(sd1, open_checkpoint(path))
    assert f"says {name} = " in str(inspect(path).problem)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"peft_type": "VERA"}, "is of VERA"), ({"lora_alpha": "much"}, "no finite number"),
        ({"lora_alpha": float("nan")}, "no finite number"), ({"use_rslora": "yes"}, "neither true nor false"),
        ({"alpha_pattern": {"to_q": "2"}}, "no table of finite numbers"), ({"alpha_pattern": ["to_q"]}, "no table"),
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"target_modules": ["to_k"]}, "leaves this module out"),
        ({"exclude_modules": ["to_q"]}, "leaves this module out"), ({"target_modules": 3}, "neither a name nor a list"),
        ({"r": 16}, "says rank 16, its tensors 4"), ({"use_dora": True}, "use_dora = True"),
        ({"rank_pattern": {"to_q": 2}}, "says rank 2, its tensors 4"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_words(sd1: BaseModel, tmp_path: Path, said: dict[str, Any], words: str) -> None:
    by_peft(sd1, LoraConfig(r=RANK, target_modules=["to_q"]), tmp_path, said)
    with pytest.raises(CheckpointError, match=words):
        tune(sd1, open_checkpoint(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', '{"unet.alpha_pattern": 1e999}', '{"lora_alpha": 64}'])
def test_a_header_that_cannot_be_read_is_refused(sd1: BaseModel, tmp_path: Path, text: str) -> None:
    by_peft(sd1, LoraConfig(r=RANK, target_modules=["to_q"]), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file(state, tmp_path / "f.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"its alpha_pattern is no table|cannot be read|of no part"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))


KEYS = (
    ["to_q"], ["attn1.to_q", "to_q"], [r".*\.to_q"], [r"^down.*"], ["down_blocks.0.attentions.0.proj_in"],
    [r"down_blocks\.[01]\..*"], [r"attentions\.\d\.proj_(in|out)"], ["o_q"], ["(?:to_q|to_k)"], ["a|to_q"], [""],
    ["to_.", "to_q"], [r"[\w.]+to_q"], ["mid_block?.to_q"],
)  # fmt: skip
NAMES = (
    "to_q", "a.to_q", "mid_block.attentions.0.attn1.to_q", "down_blocks.0.attentions.0.proj_in", "auto_q",
    "down_blocks.11.attentions.1.proj_out", "to_k", "",
)  # fmt: skip


@pytest.mark.parametrize("keys", KEYS)
def test_patterns_are_matched_as_peft_matches_them(keys: list[str]) -> None:
    found = PatternKeys(keys)
    for name in NAMES:
        theirs = get_pattern_key(keys, name)
        assert (found.find(name) if found.find(name) is not None else name) == theirs


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*x",
        "(a|a)*b",
        "(?=a)b",
        r"(a)\1",
        "a" * 300,
        ".*.*.*.*.*x",
        "((a{1,9}){1,9}){1,9}",
        "(",
        "(?P=x)",
    ],
)
def test_patterns_that_could_run_for_long_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        checked(pattern, 2)


def test_the_worst_patterns_that_are_read_take_seconds_for_a_large_model() -> None:
    worst = PatternKeys([f".*.*x{number}" for number in range(64)])
    names = [f"down_blocks.{number}.attentions.0.transformer_blocks.0.attn1.processor.to_out.0" for number in range(20)]
    started = time.process_time()
    assert all(worst.find(name) is None for name in names)
    assert (time.process_time() - started) * 1000 / len(names) < 60
    with pytest.raises(ValueError, match="too many"):
        PatternKeys([f".*x{number}" for number in range(65)])
    plain = PatternKeys([f"down_blocks.{number}.to_q" for number in range(5000)])
    assert plain.find("x.down_blocks.4999.to_q") == "down_blocks.4999.to_q"


@pytest.mark.parametrize("parts", [("unet", "text_encoder"), ("text_encoder",), ("unet",)])
def test_folders_that_peft_saved_for_each_part(sd1: BaseModel, tmp_path: Path, parts: tuple[str, ...]) -> None:
    """unet/ and text_encoder/, each with its own file and configuration: the alphas differ."""
    theirs = {}
    for part in parts:
        network = copy.deepcopy(sd1.part(part))
        modules = ["to_q", "to_v"] if part == "unet" else ["q_proj", "fc1"]
        alpha = 9 if part == "unet" else 2
        config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=modules, init_lora_weights=False)
        inject_adapter_in_model(config, network)
        state = {f"base_model.model.{name}": t.clone() for name, t in get_peft_model_state_dict(network).items()}
        (tmp_path / part).mkdir()
        save_file(state, tmp_path / part / "adapter_model.safetensors")
        config.save_pretrained(tmp_path / part)
        theirs[part] = network
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format is Format.lora_peft
    tuned = tune(sd1, checkpoint)
    assert (tuned.unused, tuned.warnings, set(tuned.networks)) == ([], [], set(parts))
    if "unet" in parts:
        assert_same_function(tuned.networks["unet"], theirs["unet"], sd1.denoiser)
    if "text_encoder" in parts:
        ours, wanted = encoded(tuned.networks["text_encoder"]), encoded(theirs["text_encoder"])
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    found = inspect(tmp_path)
    assert found.problem is None
    assert set(found.parts) == {{"unet": "denoiser", "text_encoder": "te1"}[part] for part in parts}
    before = checkpoint.identity
    config_file = tmp_path / parts[-1] / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"lora_alpha": 5}))
    assert open_checkpoint(tmp_path).identity != before


def test_a_folder_with_one_adapter_is_that_adapter(sd1: BaseModel, tmp_path: Path) -> None:
    unet = by_peft(sd1, LoraConfig(r=RANK, lora_alpha=9, target_modules=LINEAR, init_lora_weights=False), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.identity == open_checkpoint(tmp_path / "adapter_model.safetensors").identity
    assert_same_function(tune(sd1, checkpoint).networks["unet"], unet, sd1.denoiser)
