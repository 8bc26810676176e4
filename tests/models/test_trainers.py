"""What trainers and tools write beyond the formats' libraries: by the definitions, and by LyCORIS and diffusers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import MODULE_LIST
from lycoris.modules.tlora import TLoraModule
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.formats.detect import Format
from audit.models.formats.names import read_names
from audit.models.inspect import inspect
from audit.models.pair import ModelPair
from audit.models.safetensors_header import TensorInfo
from audit.models.tuning import tune
from tests.models import nano

RANK = 4
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
POINT = "mid_block.attentions.0.proj_in"  # a convolution of one pixel
CONVOLUTION = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def sd1(folder: Path) -> BaseModel:
    return nano.make("sd1", folder)


def drawn(*shape: int, size: float = 0.1, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def flat(name: str, prefix: str = "lora_unet_") -> str:
    return prefix + name.replace(".", "_")


def tuned_weight(
    base: BaseModel, state: dict[str, torch.Tensor], path: Path, module: str, **options: Any
) -> torch.Tensor:
    save_file(state, path / "f.safetensors")
    tuned = tune(base, open_checkpoint(path / "f.safetensors"), **options)
    assert tuned.unused == []
    return tuned.networks[base.architecture.denoiser].get_submodule(module).weight


def rotations(numbers: torch.Tensor, side: int) -> torch.Tensor:
    """Cayley's transform of the skew matrices with these upper triangles, by its first five terms."""
    skew = torch.zeros(len(numbers), side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    skew[:, rows, columns] = numbers
    skew = skew - skew.transpose(1, 2)
    eye = torch.eye(side)
    return eye + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew


MARKERS = {"none": None, "bool": torch.tensor(True), "float16": torch.tensor(1.0, dtype=torch.float16)}


@pytest.mark.parametrize("marker", list(MARKERS))
@pytest.mark.parametrize("module", [QUERY, POINT, CONVOLUTION])
@pytest.mark.parametrize("naming", ["flat", "dotted"])
def test_scaled_oft_of_onetrainer(sd1: BaseModel, tmp_path: Path, marker: str, module: str, naming: str) -> None:
    """A linear layer's inputs are turned, x R, a convolution's weights, W R; scaled: by 2 sqrt(block - 1) less."""
    side = 8
    weight = sd1.denoiser.get_submodule(module).weight
    blocks = weight[0].numel() // side
    numbers = drawn(blocks, side * (side - 1) // 2, size=0.2)
    scaled = MARKERS[marker]
    if naming == "dotted" and scaled is None and module != QUERY:
        pytest.skip("a convolution by PEFT's names is PEFT's")
    stem = flat(module) if naming == "flat" else f"unet.{module}"
    state = {f"{stem}.oft_R.weight": numbers} | ({} if scaled is None else {f"{stem}.oft_R.scaled_oft": scaled})
    turned = rotations(numbers / (1 if scaled is None else 2 * math.sqrt(side - 1)), side)
    turned = turned.transpose(1, 2) if module == QUERY else turned
    wanted = torch.einsum("ork,rkc->orc", weight.reshape(len(weight), blocks, side), turned).reshape(weight.shape)
    assert (wanted - weight).norm() > 0.02 * weight.norm()
    torch.testing.assert_close(tuned_weight(sd1, state, tmp_path, module), wanted, atol=1e-5, rtol=1e-5)


def test_a_marker_of_scaled_oft_that_is_false_is_refused(sd1: BaseModel, tmp_path: Path) -> None:
    stem = flat(QUERY)
    state = {f"{stem}.oft_R.weight": drawn(4, 28), f"{stem}.oft_R.scaled_oft": torch.tensor(False)}
    with pytest.raises(CheckpointError, match="scaled_oft is"):
        tuned_weight(sd1, state, tmp_path, QUERY)


KNOWN = {
    "lora": {"lora_down.weight": drawn(RANK, 32), "lora_up.weight": drawn(32, RANK)},
    "full": {"diff": drawn(32, 32)},
    "lokr": {"lokr_w1": drawn(4, 4), "lokr_w2": drawn(8, 8)},
    "oft": {"oft_R.weight": drawn(4, 28)},
}
STRANGE = {
    "reshape_weight": torch.tensor([32, 32]), "oft_block_size_metadata": torch.tensor(8), "initial_norm": drawn(32, 1),
    "lora_scalar": torch.tensor(3.0), "lokr_t1": drawn(2, 2, size=1e-6), "set_weight": drawn(32, 32, size=1e-9),
    "flag": torch.zeros(0), "lora_E": torch.zeros(4),
}  # fmt: skip


@pytest.mark.parametrize("marker", list(STRANGE))
@pytest.mark.parametrize("known", list(KNOWN))
def test_an_unknown_tensor_beside_known_ones_is_refused(
    sd1: BaseModel, tmp_path: Path, known: str, marker: str
) -> None:
    """However small it is: what it says of the others is not known."""
    stem = flat(QUERY)
    state = {f"{stem}.{name}": tensor for name, tensor in KNOWN[known].items()} | {f"{stem}.{marker}": STRANGE[marker]}
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=f"1 of its tensors are of no known format .*{marker}"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert "no known format" in str(inspect(tmp_path / "f.safetensors").problem)


@pytest.mark.parametrize("name", ["use_scalar", f"unet.{POINT}.bias", "lora_unet_x.lora_down.x", "conv_in.weight"])
def test_an_unknown_tensor_anywhere_is_refused(sd1: BaseModel, tmp_path: Path, name: str) -> None:
    state = {f"{flat(QUERY)}.{key}": tensor for key, tensor in KNOWN["lora"].items()}
    save_file(state | {name: torch.tensor([1e-9])}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="no known format"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))


def test_every_tensor_that_lycoris_writes_is_known_or_refused() -> None:
    """A new one of LyCORIS fails here: it has to be put into effect."""
    for kind in MODULE_LIST:
        names = {f"lora_unet_x.{name}": TensorInfo("F32", (2, 2, 2), 0, 0) for name in kind.weight_list}
        found = read_names(names)
        assert set(found.strange) <= {"lora_unet_x.lokr_t1"}, kind  # on LyCORIS' list, and read by none of its code
    assert {kind.__name__ for kind in MODULE_LIST} == {  # all in LYCORIS or below; DyLoRA saves itself as LoCon
        "LoConModule", "LohaModule", "IA3Module", "LokrModule", "FullModule", "NormModule", "DiagOFTModule",
        "ButterflyOFTModule", "GLoRAModule", "DyLoraModule", "TLoraModule",
    }  # fmt: skip


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("module", [QUERY, POINT])
def test_tlora_by_lycoris(sd1: BaseModel, tmp_path: Path, module: str, held: bool) -> None:
    layer = copy.deepcopy(sd1.denoiser.get_submodule(module))
    theirs: Any = TLoraModule("x", layer, 1.0, lora_dim=RANK, alpha=3.0)
    for seed, parameter in enumerate((theirs.q_layer.weight, theirs.p_layer.weight, theirs.lambda_layer)):
        parameter.data.add_(drawn(*parameter.shape, size=0.02, seed=seed))
    state = dict(theirs.custom_state_dict())
    if held:  # its buffers, which a plain state dictionary has
        state |= {name: buffer for name, buffer in theirs.named_buffers() if name.startswith("base_")}
    assert ("base_q" in state) == held
    state = {f"{flat(module)}.{name}": tensor.detach().clone() for name, tensor in state.items()}
    wanted = layer.weight + theirs.get_diff_weight(1.0, shape=layer.weight.shape)[0]
    assert (wanted - layer.weight).norm() > 1e-2 * layer.weight.norm()
    torch.testing.assert_close(tuned_weight(sd1, state, tmp_path, module), wanted.detach(), atol=1e-5, rtol=1e-5)
    tuned = tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert any("T-LoRA" in warning for warning in tuned.warnings)


def test_tlora_from_another_start_is_refused(sd1: BaseModel, tmp_path: Path) -> None:
    layer = copy.deepcopy(sd1.denoiser.get_submodule(QUERY))
    theirs: Any = TLoraModule("x", layer, 1.0, lora_dim=RANK, alpha=3.0, use_data_init=False)
    state = {f"{flat(QUERY)}.{name}": t.detach().clone() for name, t in theirs.custom_state_dict().items()}
    state[f"{flat(QUERY)}.lambda_layer"] *= 3
    with pytest.raises(CheckpointError, match="principal part"):
        tuned_weight(sd1, state, tmp_path, QUERY)


def kohya_oft(blocks: list[torch.Tensor], weight: torch.Tensor, constraint: float, strength: float) -> torch.Tensor:
    """sd-scripts' networks.oft_flux by its definition, row for row."""
    done, first = [], 0
    for one in blocks:
        count, side, _ = one.shape
        rows = weight[first : first + count * side]
        first += count * side
        q = one - one.transpose(1, 2)
        norm = q.flatten().norm()
        q = q * ((min(float(norm), constraint * count * side) + 1e-8) / (norm + 1e-8))
        for number in range(count):
            eye = torch.eye(side)
            turn = strength * ((eye + q[number]) @ (eye - q[number]).inverse() - eye) + eye
            done.append(turn.T @ rows[number * side : (number + 1) * side].flatten(1))
    return torch.cat(done).reshape(weight.shape)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("constraint", [0.004, 10.0])
@pytest.mark.parametrize("module", [QUERY, CONVOLUTION])
def test_oft_of_sd_scripts(sd1: BaseModel, tmp_path: Path, module: str, constraint: float, strength: float) -> None:
    weight = sd1.denoiser.get_submodule(module).weight
    blocks = drawn(4, len(weight) // 4, len(weight) // 4)
    stem = flat(module, "oft_unet_")
    state = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(constraint)}
    wanted = kohya_oft([blocks], weight, constraint, strength)
    torch.testing.assert_close(
        tuned_weight(sd1, state, tmp_path, module, lora_scale=strength), wanted, atol=1e-5, rtol=1e-5
    )
    assert open_checkpoint(tmp_path / "f.safetensors").format is Format.lycoris


def test_oft_of_sd_scripts_on_the_rows_of_a_fused_layer_of_flux(folder: Path, tmp_path: Path) -> None:
    """linear1 of a single block: q, k and v of 32 rows, the MLP of 128, four blocks each."""
    base = nano.make("flux", folder)
    sizes = (8, 8, 8, 32)
    blocks = [drawn(4, side, side, seed=number) for number, side in enumerate(sizes)]
    stem = "oft_unet_single_blocks_0_linear1"
    state = {f"{stem}.oft_blocks.{n}": one for n, one in enumerate(blocks)} | {f"{stem}.alpha": torch.tensor(0.01)}
    save_file(state, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    names = [f"single_transformer_blocks.0.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    before = torch.cat([base.denoiser.get_submodule(name).weight for name in names])
    after = torch.cat([tuned.networks["transformer"].get_submodule(name).weight for name in names])
    torch.testing.assert_close(after, kohya_oft(blocks, before, 0.01, 1.0), atol=1e-5, rtol=1e-5)
    del state[f"{stem}.oft_blocks.1"]
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="not numbered from 0"):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))


def test_loras_that_comfyui_extracts_change_biases_too(sd1: BaseModel, tmp_path: Path) -> None:
    """diffusion_model.*.lora_up, lora_down and diff_b of one module; diff and diff_b of norms; a bias alone."""
    from audit.models.families.unet import original_unet_names

    names = original_unet_names(sd1.denoiser)
    norm, alone = "mid_block.resnets.0.norm1", "mid_block.resnets.0.conv2"
    stems = {module: f"diffusion_model.{names[module]}" for module in (POINT, norm, alone)}
    state = {
        f"{stems[POINT]}.lora_up.weight": drawn(32, RANK, 1, 1),
        f"{stems[POINT]}.lora_down.weight": drawn(RANK, 32, 1, 1),
        f"{stems[POINT]}.diff_b": drawn(32), f"{stems[norm]}.diff": drawn(32), f"{stems[norm]}.diff_b": drawn(32),
        f"{stems[alone]}.diff_b": drawn(32),
    }  # fmt: skip
    save_file(state, tmp_path / "f.safetensors")
    for strength in (1.0, 0.5):
        tuned = tune(sd1, open_checkpoint(tmp_path / "f.safetensors"), strength)
        assert tuned.unused == []
        after, before = tuned.networks["unet"].get_submodule, sd1.denoiser.get_submodule
        product = (drawn(32, RANK) @ drawn(RANK, 32)).reshape(32, 32, 1, 1)
        for found, wanted in (
            (after(POINT).weight - before(POINT).weight, product),
            (after(POINT).bias - before(POINT).bias, drawn(32)),
            (after(norm).weight - before(norm).weight, drawn(32)),
            (after(norm).bias - before(norm).bias, drawn(32)),
            (after(alone).weight - before(alone).weight, torch.zeros(1)),
            (after(alone).bias - before(alone).bias, drawn(32)),
        ):
            torch.testing.assert_close(found, (wanted * strength).expand_as(found), atol=1e-6, rtol=1e-5)
    found = inspect(tmp_path / "f.safetensors", sd1)
    assert found.problem is None


def test_learned_embeds_of_diffusers(sd1: BaseModel, tmp_path: Path) -> None:
    """Its example script writes {token: vectors}; diffusers reads them as here."""
    for vectors in (drawn(32), drawn(3, 32)):
        save_file({"<my-dog>": vectors}, tmp_path / "learned_embeds.safetensors")
        checkpoint = open_checkpoint(tmp_path / "learned_embeds.safetensors")
        assert checkpoint.format is Format.embedding
        pair = ModelPair(sd1, checkpoint)
        assert pair.tokens == ["<my-dog>"]
        pipeline = nano.sd1()
        pipeline.text_encoder.load_state_dict(sd1.part("text_encoder").state_dict())
        pipeline.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors", local_files_only=True)
        wanted = pipeline.encode_prompt(["a <my-dog>"], "cpu", 1, False)[0]
        torch.testing.assert_close(pair.encode(["a <my-dog>"], tuned=True).states, wanted, atol=1e-5, rtol=1e-5)
    assert inspect(tmp_path / "learned_embeds.safetensors").tokens == {"<my-dog>": {"any": 3}}


def test_an_embedding_whose_encoder_is_not_told_by_its_width_is_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"<x>": drawn(32)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="does not fit width 32, 32 alone"):
        tune(nano.make("sdxl", folder), open_checkpoint(tmp_path / "f.safetensors"))


def test_tokens_of_onetrainer_and_what_of_them_is_lost(sd1: BaseModel, folder: Path, tmp_path: Path) -> None:
    lora = {
        f"{flat(POINT)}.lora_down.weight": drawn(RANK, 32, 1, 1),
        f"{flat(POINT)}.lora_up.weight": drawn(32, RANK, 1, 1),
    }
    bundle = {f"bundle_emb.sks.{key}": drawn(2, 32) for key in ("clip_l", "clip_l_out", "t5", "t5_out")}
    save_file(lora | bundle, tmp_path / "f.safetensors")
    tuned = tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert set(tuned.embeddings["sks"]) == {"text_encoder"}
    lost = [f"bundle_emb.sks.{key}" for key in ("clip_l_out", "t5", "t5_out")]
    assert sorted(tuned.unused) == sorted(lost)
    assert any("3 tensors of its tokens are lost" in warning and "clip_l_out" in warning for warning in tuned.warnings)
    save_file({name: bundle[name] for name in lost}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="no place"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))


def test_the_tokens_of_two_encoders_on_a_base_with_one_are_refused(sd1: BaseModel, tmp_path: Path) -> None:
    save_file({"clip_l": drawn(2, 32), "clip_g": drawn(2, 32)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="no place"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))


def test_tokens_of_flux_are_for_both_encoders(folder: Path, tmp_path: Path) -> None:
    base = nano.make("flux", folder)
    save_file({f"bundle_emb.zzz.{key}": drawn(2, 32) for key in ("clip_l", "t5")}, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert (set(tuned.embeddings["zzz"]), tuned.unused) == ({"text_encoder", "text_encoder_2"}, [])
    pair = ModelPair(base, open_checkpoint(tmp_path / "f.safetensors"), resolution=64)
    after, before = (pair.encode(["a zzz"], tuned=side) for side in (True, False))
    assert not torch.allclose(after.states, before.states, atol=1e-3)
    assert not torch.allclose(after.pooled, before.pooled, atol=1e-3)


PREFIXES = ("lora_unet_", "lycoris_", "lycoris_unet_", "lora_transformer_", "unet.", "base_model.model.", "lora_unet.",
            "unet.base_model.model.", "diffusion_model.", "")  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_the_denoiser(sd1: BaseModel, tmp_path: Path, prefix: str) -> None:
    stem = flat(QUERY, prefix) if prefix.endswith("_") else f"{prefix}{QUERY}"
    state = {f"{stem}.{key}": tensor for key, tensor in KNOWN["lora"].items()}
    found = tuned_weight(sd1, state, tmp_path, QUERY) - sd1.denoiser.get_submodule(QUERY).weight
    torch.testing.assert_close(found, KNOWN["lora"]["lora_up.weight"] @ KNOWN["lora"]["lora_down.weight"])


def test_a_folder_that_diffusers_saved_is_its_adapter(sd1: BaseModel, tmp_path: Path) -> None:
    state = {f"unet.{QUERY}.{key}": tensor for key, tensor in KNOWN["lora"].items()}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.name == tmp_path.name
    assert checkpoint.identity == open_checkpoint(tmp_path / "pytorch_lora_weights.safetensors").identity
    assert tune(sd1, checkpoint).unused == []


def test_a_module_that_is_named_in_two_spellings_is_refused(sd1: BaseModel, tmp_path: Path) -> None:
    state = {f"{stem}.{key}": t.clone() for stem in (flat(QUERY), f"unet.{QUERY}") for key, t in KNOWN["lora"].items()}
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="named twice"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))


@pytest.mark.parametrize(
    "more",
    [
        {"oft_R.weight": drawn(4, 28, size=1e-9), "dora_scale": drawn(32, 1, size=1e-9)},
        {"diff": drawn(32, 32, size=1e-9), "rescale": drawn(32, 1, size=1e-9)},
        {
            "lora_down.weight": drawn(1, 32, size=1e-9),
            "lora_up.weight": drawn(32, 1, size=1e-9),
            "hada_t1": drawn(1, 1),
        },
    ],
)
def test_a_set_with_more_than_its_own_is_refused(sd1: BaseModel, tmp_path: Path, more: dict[str, torch.Tensor]) -> None:
    """However small beside another module's: known tensors in a combination that no format has."""
    state = {f"{flat(QUERY)}.{key}": tensor for key, tensor in KNOWN["lora"].items()}
    save_file(state | {f"{flat(POINT)}.{key}": t for key, t in more.items()}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="no known format"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))


def test_factors_of_integers_are_refused_and_an_alpha_may_be_one(sd1: BaseModel, tmp_path: Path) -> None:
    state = {f"{flat(QUERY)}.{key}": tensor for key, tensor in KNOWN["lora"].items()}
    alpha = {f"{flat(QUERY)}.alpha": torch.tensor(2)}
    found = tuned_weight(sd1, state | alpha, tmp_path, QUERY) - sd1.denoiser.get_submodule(QUERY).weight
    wanted = KNOWN["lora"]["lora_up.weight"] @ KNOWN["lora"]["lora_down.weight"] / 2
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    save_file({key: (t * 100).to(torch.int8) for key, t in state.items()}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="stored as I8, which is not read"):
        tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert "stored as I8" in str(inspect(tmp_path / "f.safetensors").problem)
