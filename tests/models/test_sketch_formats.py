"""Sketches of every format: the same change has the same sketch however a file writes it, and no two changes have."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models.checkpoint import open_checkpoint
from audit.models.families.keys import flat_targets, originals_of
from audit.models.families.spelling import place_of
from audit.models.formats.algorithms import changed
from audit.models.formats.names import Algorithm, read_names
from audit.models.published import PUBLISHED, build
from audit.models.sketches.entries import _BY_ALGORITHM
from audit.models.sketches.sketch import NEAR, Sketch, sketch_of
from tests.models.test_sketch import cosine, of

State = dict[str, torch.Tensor]
STEM = "lora_unet_down_blocks_0_resnets_0_conv1"
OUT, IN, SIDE = 8, 12, 3


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def saved(state: State, path: Path, metadata: dict[str, str] | None = None) -> Sketch:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata)
    return of(path)


def algorithms(seed: int = 0) -> dict[str, State]:
    """Tensors of one convolution [8, 12, 3, 3], by what they are; alpha is never the rank."""

    def n(*shape: int) -> torch.Tensor:
        return noise(*shape, seed=seed)

    alpha = {"alpha": torch.tensor(3.0)}
    hada = {f"hada_w{i}_{x}": n(*(OUT, 2) if x == "a" else (2, IN * SIDE**2)) + i for i in (1, 2) for x in "ab"}
    tucker = {f"hada_w{i}_{x}": n(2, OUT if x == "a" else IN) + i for i in (1, 2) for x in "ab"}
    return {
        "locon": {"lora_up.weight": n(OUT, 4, 1, 1), "lora_down.weight": n(4, IN, SIDE, SIDE), **alpha},
        "locon-cp": {"lora_up.weight": n(OUT, 4, 1, 1), "lora_mid.weight": n(4, 4, SIDE, SIDE),
                     "lora_down.weight": n(4, IN, 1, 1), **alpha},
        "loha": {**hada, **alpha},
        "loha-of-much-rank": {"hada_w1_a": n(OUT, 6), "hada_w1_b": n(6, IN * SIDE**2), "hada_w2_a": n(OUT, 7),
                              "hada_w2_b": n(7, IN * SIDE**2), **alpha},
        "loha-cp": {**tucker, "hada_t1": n(2, 2, SIDE, SIDE), "hada_t2": n(2, 2, SIDE, SIDE) + 1, **alpha},
        "lokr": {"lokr_w1": n(2, 3), "lokr_w2_a": n(4, 2), "lokr_w2_b": n(2, 4 * SIDE**2), **alpha},
        "lokr-cp": {"lokr_w1": n(2, 3), "lokr_w2_a": n(2, 4), "lokr_w2_b": n(2, 4), "lokr_t2": n(2, 2, SIDE, SIDE),
                    **alpha},
        "lokr-both": {"lokr_w1_a": n(2, 1), "lokr_w1_b": n(1, 3), "lokr_w2_a": n(4, 2),
                      "lokr_w2_b": n(2, 4 * SIDE**2), **alpha},
        "lokr-full": {"lokr_w1": n(2, 3), "lokr_w2": n(4, 4, SIDE, SIDE)},
        "tlora": {"q_layer.weight": n(4, IN * SIDE**2), "p_layer.weight": n(OUT, 4), "lambda_layer": n(1, 4),
                  "base_q": n(4, IN * SIDE**2) / 2, "base_p": n(OUT, 4) / 3, "base_lambda": n(1, 4), **alpha},
    }  # fmt: skip


@pytest.mark.parametrize("name", list(algorithms()))
def test_the_sketch_is_that_of_the_change_in_effect(tmp_path: Path, name: str) -> None:
    state = {f"{STEM}.{key}": tensor for key, tensor in algorithms()[name].items()}
    found = saved(state, tmp_path / "a.safetensors")
    [(_, header)] = open_checkpoint(tmp_path / "a.safetensors").files.values()
    [group] = read_names(header.tensors).groups
    tensors = {role: state[key] for role, key in group.tensors.items()}
    whole, _ = changed(group.algorithm, tensors, torch.zeros(OUT, IN, SIDE, SIDE), None)
    wanted = saved({f"{STEM}.diff": whole}, tmp_path / "b.safetensors")
    assert cosine(found, wanted) > 0.99999
    assert found.norm == pytest.approx(wanted.norm, rel=1e-4)
    assert found.left_out == 0
    other = {f"{STEM}.{key}": tensor for key, tensor in algorithms(seed=1)[name].items()}
    assert abs(cosine(found, saved(other, tmp_path / "c.safetensors"))) < NEAR


def test_every_algorithm_has_a_sketch_or_a_reason() -> None:
    assert set(_BY_ALGORITHM) == set(Algorithm)


def rotations(seed: int = 0) -> dict[str, State]:
    """What changes a layer by its own weights, [8, 12]."""

    def n(*shape: int) -> torch.Tensor:
        return noise(*shape, seed=seed) / 10

    return {
        "oft": {"oft_blocks": n(2, 4, 4), "rescale": 1 + n(8, 1), "alpha": torch.tensor(0.1)},
        "boft": {"oft_blocks": n(3, 2, 4, 4), "alpha": torch.tensor(0.1)},
        "ia3": {"weight": n(8, 1), "on_input": torch.tensor(False)},
        "ia3-on-inputs": {"weight": n(1, 12), "on_input": torch.tensor(True)},
        "glora": {"a1.weight": n(12, 2), "a2.weight": n(2, 12), "b1.weight": n(8, 2), "b2.weight": n(2, 12)},
        "peft-oft": {"oft_R.weight": n(3, 6)},
        "peft-boft": {"boft_R": n(2, 3, 4, 4), "boft_s": 1 + n(8, 1)},
        "peft-ia3": {"ia3_l": 1 + n(8, 1)},
        "norm": {"w_norm": n(8), "b_norm": n(8)},
        "bias": {"diff_b": n(8)},
    }


@pytest.mark.parametrize("name", list(rotations()))
def test_what_acts_on_the_weights_is_near_to_its_like_alone(tmp_path: Path, name: str) -> None:
    stems = [f"lora_unet_mid_block_attentions_{number}_proj_in" for number in range(6)]
    if name.startswith("peft"):
        stems = [f"unet.{stem.removeprefix('lora_unet_')}" for stem in stems]

    def state(seed: int, dtype: torch.dtype) -> State:
        return {
            f"{stem}.{key}": tensor if tensor.dtype is torch.bool else tensor.to(dtype)
            for number, stem in enumerate(stems)
            for key, tensor in rotations(seed + number)[name].items()
        }

    found = saved(state(0, torch.float32), tmp_path / "a.safetensors")
    assert (found.modules, found.left_out) == (6, 0)
    assert cosine(found, saved(state(0, torch.float16), tmp_path / "b.safetensors")) > 0.9999
    assert abs(cosine(found, saved(state(50, torch.float32), tmp_path / "c.safetensors"))) < 0.5


def test_two_ways_to_write_one_rotation_or_scale(tmp_path: Path) -> None:
    stem, path = "down_blocks_0_attentions_0_proj_in", tmp_path / "f.safetensors"
    blocks, scale = noise(4, 3, 3), noise(12, 1) / 10
    lycoris = saved({f"lora_unet_{stem}.oft_blocks": blocks, f"lora_unet_{stem}.alpha": torch.tensor(0.0)}, path)
    kohya = saved({f"oft_unet_{stem}.oft_blocks": blocks, f"oft_unet_{stem}.alpha": torch.tensor(0.1)}, path)
    fused = {f"oft_unet_{stem}.oft_blocks.0": blocks[:1], f"oft_unet_{stem}.oft_blocks.1": blocks[1:]}
    assert cosine(lycoris, kohya) > 0.99999
    assert cosine(kohya, saved({**fused, f"oft_unet_{stem}.alpha": torch.tensor(0.1)}, path)) > 0.99999
    ia3 = saved({f"lora_unet_{stem}.weight": scale, f"lora_unet_{stem}.on_input": torch.tensor(False)}, path)
    assert cosine(ia3, saved({f"unet.{stem}.ia3_l": 1 + scale}, path)) > 0.9999


def test_what_mostly_is_the_base_has_no_sketch(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"

    def none(state: State, metadata: dict[str, str] | None = None) -> bool:
        save_file(state, path, metadata)
        return sketch_of(open_checkpoint(path).files.values()) is None

    tlora = {f"{STEM}.{key}": tensor for key, tensor in algorithms()["tlora"].items() if not key.startswith("base_")}
    assert none(tlora)
    lora = {"unet.conv_in.lora_A.weight": noise(2, 4), "unet.conv_in.lora_B.weight": noise(4, 2)}
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.peft_type": "LORA"}
    assert not none(lora, {"lora_adapter_metadata": json.dumps(config)})
    for start in ("pissa", "corda"):
        told = json.dumps({**config, "unet.init_lora_weights": start})
        assert none(lora, {"lora_adapter_metadata": told})


def test_tensors_of_any_shape_cost_an_error_at_most(tmp_path: Path) -> None:
    generator, path, refused = np.random.default_rng(0), tmp_path / "f.safetensors", 0
    kinds = [*algorithms().values(), *rotations().values()]
    for number in range(120):
        state = {}
        for name in kinds[number % len(kinds)]:
            shape = tuple(int(side) for side in generator.choice([0, 1, 2, 3, 5], generator.integers(0, 5)))
            state[f"lora_unet_single_blocks_{number % 3}_linear1.{name}"] = torch.ones(shape)
        save_file(state, path)
        try:
            sketch_of(open_checkpoint(path).files.values())
        except (ValueError, CheckpointError):
            refused += 1
    assert 10 < refused < 120


def test_a_small_file_cannot_ask_for_much(tmp_path: Path) -> None:
    side = 1 << 15
    bombs: list[State] = [
        {"lokr_w1": torch.ones(1, side), "lokr_w2": torch.ones(side, 1)},
        {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(side, 1), "lokr_w2_b": torch.ones(1, side)},
        {f"hada_w{i}_{x}": torch.ones(side, 1) if x == "a" else torch.ones(1, side) for i in (1, 2) for x in "ab"},
        {"lora_up.weight": torch.ones(2, 1), "lora_mid.weight": torch.ones(1, 1, 1, 1 << 20),
         "lora_down.weight": torch.ones(1, 1 << 10)},
    ]  # fmt: skip
    for number, bomb in enumerate(bombs):
        many = {f"lora_unet_x{i}.{name}": tensor.clone() for i in range(10) for name, tensor in bomb.items()}
        save_file(many if number == 0 else {k: v for k, v in many.items() if ".lora" in k or "x0." in k},
                  tmp_path / "f.safetensors")  # fmt: skip
        started = time.process_time()
        with contextlib.suppress(ValueError):
            sketch_of(open_checkpoint(tmp_path / "f.safetensors").files.values())
        assert time.process_time() - started < 20


def linear(seed: int = 0, rank: int = 4) -> State:
    return {
        f"{stem}.{key}": tensor
        for number, stem in enumerate(("down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.proj_out"))
        for key, tensor in (
            ("lora_A.weight", noise(rank, 32, seed=seed + 2 * number)),
            ("lora_B.weight", noise(64, rank, seed=seed + 2 * number + 1)),
        )
    }


@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "e4m3-scaled", "e4m3-rows", "int8-scaled"])
def test_eight_bits_by_what_they_say(tmp_path: Path, kind: str) -> None:
    found = saved(linear(), tmp_path / "a.safetensors")
    state: State = {}
    for name, tensor in linear().items():
        dtype = {"e5m2": torch.float8_e5m2, "int8": torch.int8}.get(kind.partition("-")[0], torch.float8_e4m3fn)
        if "-" not in kind:
            state[name] = tensor.to(dtype)
            continue
        most = 127 if dtype is torch.int8 else 448.0
        scale = tensor.abs().amax(1, keepdim=True) / most if kind.endswith("rows") else tensor.abs().max() / most
        small = tensor / scale
        state[name] = (small.round() if dtype is torch.int8 else small).to(dtype)
        state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    again = saved(state, tmp_path / "b.safetensors")
    assert cosine(found, again) > (0.98 if kind == "e5m2" else 0.995)
    if "-" in kind:
        assert again.norm == pytest.approx(found.norm, rel=0.05)


def test_eight_bits_that_are_packed_or_say_nothing_have_none(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({name: (tensor * 10).to(torch.int8) for name, tensor in linear().items()}, path)
    assert sketch_of(open_checkpoint(path).files.values()) is None
    marker = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in linear().items()}
    save_file({**small, "down_blocks.0.attentions.0.proj_in.comfy_quant": marker}, path)
    with pytest.raises(ValueError, match="nvfp4"):
        sketch_of(open_checkpoint(path).files.values())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    state = linear(rank=32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "lora")
    for name, tensor in state.items():
        use = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(tensor.numpy(), use)
        writer.add_tensor(name, packed, raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert cosine(of(tmp_path / "a.gguf"), saved(state, tmp_path / "b.safetensors")) > (
        0.97 if kind == "Q4_0" else 0.999
    )


def test_float8_is_read_as_torch_reads_it() -> None:
    from audit.models.sketches.reader import _number

    bits = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        found, wanted = _number(name, bits.numpy()), bits.view(dtype).float().numpy()
        assert found is not None
        assert np.array_equal(found, wanted, equal_nan=True)


def test_fused_layers_of_flux_are_their_parts(tmp_path: Path) -> None:
    width, rank = 16, 4
    shift = {"up": noise(6 * width, rank), "down": noise(rank, width, seed=3)}  # its name tells that it is Flux
    ours = {f"single_transformer_blocks.0.attn.to_{x}": width for x in "qkv"}
    ours["single_transformer_blocks.0.proj_mlp"] = 4 * width
    split, up, down = {}, [], []
    for number, (stem, rows) in enumerate(ours.items()):
        up.append(noise(rows, rank, seed=number))
        down.append(noise(rank, width, seed=number + 9))
        split |= {f"transformer.{stem}.lora_B.weight": up[-1], f"transformer.{stem}.lora_A.weight": down[-1]}
    fused = {"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.block_diag(*up),
             "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.cat(down)}  # fmt: skip
    split |= {"transformer.transformer_blocks.0.norm1.linear.lora_B.weight": shift["up"],
              "transformer.transformer_blocks.0.norm1.linear.lora_A.weight": shift["down"]}  # fmt: skip
    fused |= {f"lora_unet_double_blocks_0_img_mod_lin.lora_{key}.weight": tensor for key, tensor in shift.items()}
    found = saved(split, tmp_path / "a.safetensors")
    assert cosine(found, saved(fused, tmp_path / "b.safetensors")) > 0.99999
    swapped = {"transformer.norm_out.linear.lora_B.weight": up[0], "transformer.norm_out.linear.lora_A.weight": down[0]}
    theirs = {"lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": up[0].roll(width // 2, 0),
              "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": down[0]}  # fmt: skip
    one, other = (
        saved({**split, **swapped}, tmp_path / "c.safetensors"),
        saved({**fused, **theirs}, tmp_path / "d.safetensors"),
    )
    assert cosine(one, other) > 0.99999
    assert cosine(one, found) < 0.999


REAL = ("sd15", "sdxl", "flux-dev", "chroma", "flux2-klein-4b", "z-image", "krea-2", "wan2.1-1.3b", "sd3.5-medium")


@pytest.mark.parametrize("name", REAL)
def test_a_module_has_one_spelling_in_all_layouts(name: str) -> None:
    model = PUBLISHED[name]
    family = {"sd15": "sd1", "sdxl": "sdxl", "flux-dev": "flux", "sd3.5-medium": "sd3", "wan2.1-1.3b": "wan",
              "flux2-klein-4b": "flux2-klein"}.get(name, name)  # fmt: skip
    network = build(model.networks["unet" if "unet" in model.networks else "transformer"])
    originals = {
        theirs: target
        for theirs, target in originals_of(network)
        if any(True for _ in network.get_submodule(target.modules[0]).parameters(recurse=False))
    }
    assert len(originals) > 100
    spelled: dict[tuple[str, ...], str] = {}
    for theirs, target in [*originals.items(), *flat_targets(originals).items()]:
        ours = [place_of("denoiser", one, family).modules[0] for one in target.modules]
        found = place_of("denoiser", theirs, family)
        assert list(found.modules) == ours, theirs
        assert spelled.setdefault(found.modules, target.modules[0]) == target.modules[0]
        if "context_block" not in theirs:  # of the last block only, which a file does not show
            assert found.swapped == target.swapped, theirs
