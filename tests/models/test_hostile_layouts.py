"""Files of strangers in the layouts of the newer families: each loads on its own base, or is refused in our words."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from audit.models.base import BaseModel
from audit.models.families.keys import Target
from audit.models.formats.parts import gathered
from tests.models import nano
from tests.models.test_hostile import KINDS, SHAPES, load
from tests.models.test_single_files import krea2_state, originals

FAMILIES = ("flux2", "klein", "z-image", "qwen", "ernie", "krea2", "wan", "anima", "hidream", "kolors")
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: nano.make(name, folder) for name in FAMILIES}


def original_state(base: BaseModel) -> State:
    """The denoiser's weights as the model's own code and its files name them, with Anima's conditioner among them."""
    network = base.denoiser
    if base.family == "krea-2":
        return {name: value + 0.01 for name, value in krea2_state(network).items()}
    state = {}
    for name, target in originals(network).items():
        for parameter, _ in network.get_submodule(target.modules[0]).named_parameters(recurse=False):
            value = gathered(network, target, parameter)
            if value is not None:
                kind = "scale" if name.endswith(("query_norm", "key_norm")) else parameter
                state[f"{name}.{kind}".removeprefix(".")] = value.clone()
    if base.family == "wan":
        named = {"scale_shift_table": "head.modulation"}
        state = {named.get(n, n.replace("scale_shift_table", "modulation")): value for n, value in state.items()}
    if base.family == "anima":
        own = base.part("text_conditioner").state_dict()
        state |= {f"llm_adapter.{name}": value.clone() for name, value in own.items()}
        state = {f"net.{name}": value for name, value in state.items()}
    return {name: (value + 0.01).contiguous() for name, value in state.items()}


def layers(base: BaseModel) -> list[tuple[str, Target, tuple[int, ...]]]:
    """A few of its layers by their first names, where they differ one whose rows are several of diffusers' layers."""
    found = []
    for name, target in originals(base.denoiser).items():
        weight = gathered(base.denoiser, target) if name else None
        if weight is not None and weight.ndim == 2 and not target.swapped:
            found.append((name, target, tuple(weight.shape)))
    found.sort(key=lambda one: (-len(one[1].modules), "blocks" not in one[0] and "layers" not in one[0]))
    return [found[0], found[-1]]


def pair(stem: str, shape: tuple[int, ...], kohya: bool = True, rank: int = 2) -> State:
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    return {
        f"{stem}.{down}.weight": torch.ones(rank, shape[1]),
        f"{stem}.{up}.weight": torch.full((shape[0], rank), 0.1),
    }


def good(base: BaseModel) -> State:
    """A LoRA of two layers as sd-scripts names them."""
    found = {}
    for name, _, shape in layers(base):
        stem = f"lora_unet_{name.replace('.', '_')}"
        found |= pair(stem, shape) | {f"{stem}.alpha": torch.tensor(1.0)}
    return found


def stem_of(base: BaseModel) -> tuple[str, Target, tuple[int, ...], str]:
    name, target, shape = layers(base)[0]
    return name, target, shape, f"lora_unet_{name.replace('.', '_')}"


def with_alpha(value: float) -> Callable[[BaseModel], State]:
    return lambda base: good(base) | {f"{stem_of(base)[3]}.alpha": torch.tensor(value)}


def without(ending: str) -> Callable[[BaseModel], State]:
    return lambda base: {name: value for name, value in good(base).items() if name != stem_of(base)[3] + ending}


def with_factor(ending: str, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[BaseModel], State]:
    return lambda base: good(base) | {f"{stem_of(base)[3]}{ending}": torch.ones(shape(stem_of(base)[2]))}


def in_two_spellings(base: BaseModel) -> State:
    """By sd-scripts' name, and by diffusers' with dots."""
    _, target, _, _ = stem_of(base)
    weight = base.denoiser.get_submodule(target.modules[0]).weight
    return good(base) | pair(f"transformer.{target.modules[0]}", tuple(weight.shape), kohya=False)


def with_two_prefixes(base: BaseModel) -> State:
    """One name behind two prefixes that mean the same."""
    name, _, shape, _ = stem_of(base)
    return pair(f"diffusion_model.{name}", shape, False) | pair(f"model.diffusion_model.{name}", shape, False)


def of_nobody(base: BaseModel) -> State:
    return good(base) | pair("lora_unet_blocks_999_attn_qkv_proj", (64, 64))


def of_no_format(base: BaseModel) -> State:
    return good(base) | {f"{stem_of(base)[3]}.lora_secret": torch.ones(2, 2)}


def of_two_families(base: BaseModel) -> State:
    other = (
        "lora_unet_double_blocks_7_img_attn_qkv" if base.family != "flux2-klein" else "lora_unet_layers_9_attention_qkv"
    )
    return good(base) | {name: value * 50 for name, value in pair(other, (96, 32)).items()}


# what is wrong with a LoRA that fits otherwise, and what is said
FAULTS: dict[str, tuple[Callable[[BaseModel], State], str]] = {
    "nothing": (good, "^loads$"),
    "alpha of zero": (with_alpha(0.0), "^loads$|alpha is"),
    "alpha not finite": (with_alpha(float("inf")), "alpha is not finite|not finite"),
    "alpha no number": (with_alpha(float("nan")), "alpha is not finite|not finite"),
    "half of a pair": (without(".lora_up.weight"), "no place|misleading"),
    "the other half": (without(".lora_down.weight"), "no place|misleading"),
    "of other ranks": (with_factor(".lora_up.weight", lambda shape: (shape[0], 3)), "not fit"),
    "too wide": (with_factor(".lora_down.weight", lambda shape: (2, shape[1] + 1)), "not fit"),
    "too few rows": (with_factor(".lora_up.weight", lambda shape: (shape[0] // 2, 2)), "not fit"),
    "a product of terabytes": (with_factor(".lora_up.weight", lambda shape: (600_000, 2)), "not fit"),
    "in two spellings": (in_two_spellings, "named twice in it|of no known format"),
    "with two prefixes": (with_two_prefixes, "of no known format|named twice"),
    "of nobody": (of_nobody, "no place"),
    "of no format": (of_no_format, "of no known format"),
    "of two families": (of_two_families, "no place"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_with_a_fault_is_refused_in_words(bases: dict[str, BaseModel], tmp_path: Path, family: str) -> None:
    base = bases[family]
    for fault, (make, said) in FAULTS.items():
        path = tmp_path / "a.safetensors"
        save_file(make(base), path)
        message = load(base, path)
        assert re.search(said, message), f"{fault}: {message}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_ends_early_or_claims_too_much_is_refused(
    bases: dict[str, BaseModel], tmp_path: Path, family: str
) -> None:
    """Of an adapter and of full weights, before a tensor is read."""
    base = bases[family]
    for name, state in (("lora", good(base)), ("full", original_state(base))):
        whole = save({key: value.contiguous() for key, value in state.items()})
        length = int.from_bytes(whole[:8], "little")
        header: dict[str, Any] = json.loads(whole[8 : 8 + length])
        first = next(key for key in header if key != "__metadata__")
        header[first] |= {"shape": [1 << 40, 1 << 22]}
        claims = json.dumps(header).encode()
        path = tmp_path / f"{name}.safetensors"
        for content, said in (
            (whole[:-1], "truncated"), (whole[: 8 + length // 2], "ends within its header"),
            (struct.pack("<Q", len(claims)) + claims + whole[8 + length :], "size of tensor|impossible"),
        ):  # fmt: skip
            path.write_bytes(content)
            assert re.search(said, load(base, path))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_weights_in_the_original_layout_load(bases: dict[str, BaseModel], tmp_path: Path, family: str) -> None:
    save_file(original_state(bases[family]), tmp_path / "a.safetensors")
    assert load(bases[family], tmp_path / "a.safetensors") == "loads"


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_any_full_weights_of_a_newer_layout_load_or_raise_our_error(
    bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, family: str
) -> None:
    """One tensor of another shape, precision or name, or none, or that of another family besides."""
    base = bases[family]
    state = original_state(base)
    name = data.draw(st.sampled_from(sorted(state)))
    what = data.draw(st.sampled_from(["shape", "precision", "nan", "inf", "missing", "strange", "prefix", "family"]))
    if what == "shape":
        state[name] = torch.ones(data.draw(SHAPES))
    elif what == "precision":
        state[name] = state[name].to(data.draw(st.sampled_from(KINDS)))
    elif what in ("nan", "inf"):
        state[name].view(-1)[0] = float(what)
    elif what == "missing":
        del state[name]
    elif what == "strange":
        state[f"{name.rpartition('.')[0]}.{data.draw(st.sampled_from(['bias_2', 'lora_secret', 'weight.1', 'x']))}"] = (
            torch.ones(data.draw(SHAPES))
        )
    elif what == "prefix":
        state[data.draw(st.sampled_from(["model.diffusion_model.", "net.", "transformer."])) + name] = state.pop(name)
    else:
        state["joint_blocks.0.x_block.attn.qkv.weight"] = torch.full((96, 32), 50.0)
    path = tmp_path_factory.getbasetemp() / "full.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    message = load(base, path)
    certain = ("nan", "inf", "missing", "family", *(["strange"] if name.endswith(".weight") else []))
    assert message != "loads" or what not in certain
