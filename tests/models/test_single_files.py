"""Full weights in the original layouts, and adapters by original names, for every family that has such a layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimaModularPipeline
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.families.keys import Target, originals_of
from audit.models.families.unet import original_unet_names
from audit.models.formats.detect import Format
from audit.models.formats.parts import gathered
from audit.models.tuning import tune
from tests.models import nano

FAMILIES = (
    "sd1",
    "sd2",
    "sdxl",
    "sd3",
    "flux",
    "chroma",
    "klein",
    "z-image",
    "ernie",
    "wan",
    "hidream",
    "kolors",
    "anima",
)
RANK, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def originals(network: Any) -> dict[str, Target]:
    if type(network).__name__ == "UNet2DConditionModel":
        names = original_unet_names(network)
        return {
            names.get(ours, ours): Target((ours,))
            for ours, module in network.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }
    found = {name: target for name, target in originals_of(network) if "processor" not in name}
    renamed = {module for target in found.values() for module in target.modules}
    for name, module in network.named_modules():  # the others have the same name in both
        if name not in renamed and any(True for _ in module.parameters(recurse=False)):
            found[name] = Target((name,))
    return found


def krea2_state(network: Any) -> dict[str, torch.Tensor]:
    """A transformer's weights as Krea's files have them: norms by their scale, the tables of modulation as layers."""
    state = {}
    for name, target in originals(network).items():
        for parameter, value in network.get_submodule(target.modules[0]).named_parameters(recurse=False):
            key = f"{name}.{'scale' if 'norm' in name or name == 'txtmlp.0' else parameter}"
            key = key.replace("last.scale_shift_table", "last.modulation.lin")
            state[key.replace(".scale_shift_table", ".mod.lin")] = (
                value.flatten() if key.startswith("blocks.") and parameter == "scale_shift_table" else value
            )
    return state


def parameters_of(network: Any, target: Target) -> list[str]:
    return [name for name, _ in network.get_submodule(target.modules[0]).named_parameters(recurse=False)]


def noisy(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return value + 0.05 * torch.randn(value.shape, generator=generator)


def original_file(base: BaseModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The denoiser with noise on every weight, under its original names."""
    state = {}
    for name, target in originals(base.denoiser).items():
        for parameter in parameters_of(base.denoiser, target):
            value = gathered(base.denoiser, target, parameter)
            if value is not None:
                is_scale = name.endswith(("query_norm", "key_norm")) or "distilled_guidance_layer.norms" in name
                key = f"{name}.{'scale' if is_scale else parameter}".removeprefix(".")
                state[f"model.diffusion_model.{key}"] = noisy(value, generator)
    return state


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in FAMILIES[:6] for kind in (torch.float32, torch.float16, torch.bfloat16)),
        *((family, torch.bfloat16) for family in FAMILIES[6:]),
    ],
)
def test_a_denoiser_in_one_file(folder: Path, tmp_path: Path, family: str, kind: torch.dtype) -> None:
    base = nano.make(family, folder)
    state = {name: t.to(kind).contiguous() for name, t in original_file(base, torch.Generator().manual_seed(1)).items()}
    save_file(state | {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "f.safetensors")
    checkpoint = open_checkpoint(tmp_path / "f.safetensors")
    assert checkpoint.format is Format.ldm
    tuned = tune(base, checkpoint)
    assert tuned.unused == []
    network = tuned.networks[base.architecture.denoiser]
    for name, target in originals(base.denoiser).items():
        for parameter in parameters_of(base.denoiser, target):
            found = gathered(network, target, parameter)
            if found is not None:
                key = f"model.diffusion_model.{f'{name}.{parameter}'.removeprefix('.')}"
                wanted = state.get(key, state.get(key.replace(".weight", ".scale")))
                assert wanted is not None
                assert torch.equal(found, wanted.float()), key
    own = dict(base.denoiser.named_parameters())
    changed = {name for name, parameter in network.named_parameters() if parameter is not own[name]}
    assert changed == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_what_shifts_and_scales_has_another_name_in_wan(folder: Path, tmp_path: Path, prefix: str) -> None:
    base = nano.make("wan", folder)
    state = {}
    for name, value in original_file(base, torch.Generator().manual_seed(1)).items():
        bare = name.removeprefix("model.diffusion_model.").replace("scale_shift_table", "modulation")
        state[prefix + ("head.modulation" if bare == "modulation" else bare)] = value
    assert sum("modulation" in name for name in state) == 3
    save_file(state, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    found = tuned.networks["transformer"]
    assert torch.equal(found.blocks[1].scale_shift_table, state[f"{prefix}blocks.1.modulation"])
    assert torch.equal(found.scale_shift_table, state[f"{prefix}head.modulation"])


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_anima_in_one_file_with_its_conditioner(folder: Path, tmp_path: Path, prefix: str) -> None:
    """As it is published, as ComfyUI saves it, and bare; with tables of positions, which are constants."""
    base = nano.make("anima", folder)
    generator = torch.Generator().manual_seed(1)
    conditioner = {key: noisy(value, generator) for key, value in base.part("text_conditioner").state_dict().items()}
    state = {
        prefix + name.removeprefix("model.diffusion_model."): value
        for name, value in original_file(base, generator).items()
    }
    state |= {f"{prefix}llm_adapter.{key}": value for key, value in conditioner.items()}
    state |= {f"{prefix}pos_embedder.dim_spatial_range": torch.ones(2), f"{prefix}pos_embedder.seq": torch.ones(9)}
    save_file(state, tmp_path / "f.safetensors")
    checkpoint = open_checkpoint(tmp_path / "f.safetensors")
    assert checkpoint.format is Format.ldm
    tuned = tune(base, checkpoint)
    assert tuned.unused == []
    found = tuned.networks["text_conditioner"].state_dict()
    assert found.keys() == conditioner.keys()
    assert all(torch.equal(found[key], value) for key, value in conditioner.items())
    query = tuned.networks["transformer"].transformer_blocks[1].attn2.to_q.weight
    assert torch.equal(query, state[f"{prefix}blocks.1.cross_attn.q_proj.weight"])
    del state[f"{prefix}llm_adapter.out_proj.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors of its text_conditioner are missing, such as 'out_proj"):
        tune(base, open_checkpoint(tmp_path / "less.safetensors"))


@pytest.mark.parametrize("naming", ["kohya", "comfy", "diffusers"])
def test_a_lora_on_animas_conditioner(folder: Path, tmp_path: Path, naming: str) -> None:
    """diffusers' own conversion puts the same factors at the same places."""
    base = nano.make("anima", folder)
    generator = torch.Generator().manual_seed(3)
    state, deltas = {}, {}
    for name in ("blocks.1.cross_attn.k_proj", "blocks.0.mlp.0", "out_proj"):
        weight = base.part("text_conditioner").get_submodule(name).weight
        down, up = (torch.randn(*shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
        deltas[name] = up @ down
        stem = {
            "kohya": f"lora_unet_llm_adapter_{name.replace('.', '_')}",
            "comfy": f"diffusion_model.llm_adapter.{name}",
            "diffusers": f"text_conditioner.{name}",
        }[naming]
        kinds = ("lora_down", "lora_up") if naming == "kohya" else ("lora_A", "lora_B")
        state |= {f"{stem}.{kinds[0]}.weight": down, f"{stem}.{kinds[1]}.weight": up}
    metadata = {}
    if naming == "diffusers":
        metadata = {"lora_adapter_metadata": json.dumps({"text_conditioner.r": 2, "text_conditioner.lora_alpha": 6})}
    save_file(state, tmp_path / "f.safetensors", metadata)
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    assert set(tuned.networks) == {"text_conditioner"}
    for name, delta in deltas.items():
        change = tuned.networks["text_conditioner"].get_submodule(name).weight
        change = change - base.part("text_conditioner").get_submodule(name).weight
        torch.testing.assert_close(change, delta * (3 if naming == "diffusers" else 1), atol=1e-5, rtol=1e-4)
    if naming == "comfy":
        converted = AnimaModularPipeline.lora_state_dict(state)
        assert {f"text_conditioner.{name}.lora_A.weight" for name in deltas} <= set(converted)


def test_krea_2_in_one_file(folder: Path, tmp_path: Path) -> None:
    """Its tables of modulation are layers there, of the blocks with their rows one behind the other."""
    base = nano.make("krea2", folder)
    generator = torch.Generator().manual_seed(1)
    state = {name: noisy(value, generator) for name, value in krea2_state(base.denoiser).items()}
    assert {"blocks.1.mod.lin", "last.modulation.lin", "blocks.0.attn.qknorm.qnorm.scale"} <= set(state)
    save_file(state, tmp_path / "f.safetensors")  # as it is published
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    found = krea2_state(tuned.networks["transformer"])
    assert all(torch.equal(found[name], value) for name, value in state.items())
    save_file(
        {name: value for name, value in state.items() if name != "blocks.1.mod.lin"}, tmp_path / "less.safetensors"
    )
    with pytest.raises(CheckpointError, match="1 tensors of its transformer are missing"):
        tune(base, open_checkpoint(tmp_path / "less.safetensors"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_text_encoders_in_one_file(folder: Path, tmp_path: Path, family: str) -> None:
    """CLIP by its transformers names, OpenCLIP by its own, with the last layer that SD 2 leaves out."""
    base = nano.make(family, folder)
    generator = torch.Generator().manual_seed(2)
    state = original_file(base, generator)
    layouts = {
        "sd1": [("text_encoder", "cond_stage_model.transformer.text_model.", False)],
        "sd2": [("text_encoder", "cond_stage_model.model.", True)],
        "sdxl": [
            ("text_encoder", "conditioner.embedders.0.transformer.text_model.", False),
            ("text_encoder_2", "conditioner.embedders.1.model.", True),
        ],
    }[family]
    wanted: dict[str, dict[str, torch.Tensor]] = {}
    for component, prefix, is_open in layouts:
        encoder = base.part(component)
        values = {name: noisy(tensor, generator) for name, tensor in encoder.state_dict().items()
                  if "position_ids" not in name}  # fmt: skip
        wanted[component] = values
        bare = {name.removeprefix("text_model."): tensor for name, tensor in values.items()}
        state |= open_clip(bare, prefix) if is_open else {f"{prefix}{name}": tensor for name, tensor in bare.items()}
        if is_open:
            state[f"{prefix}transformer.resblocks.3.ln_1.weight"] = torch.zeros(32)
            state[f"{prefix}logit_scale"] = torch.zeros(())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    for component, values in wanted.items():
        found = tuned.networks[component].state_dict()
        for name, value in values.items():
            assert torch.equal(found[name], value), name


def open_clip(bare: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """transformers' names and tensors in OpenCLIP's layout."""
    found = {}
    for name, tensor in bare.items():
        kind = name.rpartition(".")[2]
        if name.startswith("encoder.layers."):
            number, rest = name.split(".", 3)[2:]
            stem = f"{prefix}transformer.resblocks.{number}"
            if "q_proj" in name:
                rows = [bare[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                found[f"{stem}.attn.in_proj_{kind}"] = torch.cat(rows)
            elif "self_attn.out_proj" in rest:
                found[f"{stem}.attn.out_proj.{kind}"] = tensor
            elif "layer_norm" in rest:
                found[f"{stem}.ln_{rest[len('layer_norm')]}.{kind}"] = tensor
            elif "mlp" in rest:
                found[f"{stem}.mlp.{'c_fc' if 'fc1' in rest else 'c_proj'}.{kind}"] = tensor
        elif name == "embeddings.token_embedding.weight":
            found[f"{prefix}token_embedding.weight"] = tensor
        elif name == "embeddings.position_embedding.weight":
            found[f"{prefix}positional_embedding"] = tensor
        elif name.startswith("final_layer_norm"):
            found[f"{prefix}ln_final.{kind}"] = tensor
        elif name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T
    return found


@pytest.mark.parametrize("naming", ["kohya", "comfy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_on_every_layer_by_its_original_name(folder: Path, tmp_path: Path, family: str, naming: str) -> None:
    """up @ down * alpha / rank on the rows that the original module has: split, and halves exchanged, where need be."""
    base = nano.make(family, folder)
    generator = torch.Generator().manual_seed(3)
    state, deltas = {}, {}
    for name, target in originals(base.denoiser).items():
        weight = gathered(base.denoiser, target) if name else None
        if weight is None or weight.ndim < 2:
            continue
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator) * 0.1
        scale = ALPHA / RANK if naming == "kohya" else 1.0
        deltas[name] = ((up.flatten(1) @ down.flatten(1)) * scale).reshape(weight.shape)
        if naming == "kohya":
            stem = f"lora_unet_{name.replace('.', '_')}"
            state |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(ALPHA),
            }
        else:
            state |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    save_file(state, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    network = tuned.networks[base.architecture.denoiser]
    targets = originals(base.denoiser)
    for name, delta in deltas.items():
        change = gathered(network, targets[name]) - gathered(base.denoiser, targets[name])
        torch.testing.assert_close(change, delta, atol=1e-5, rtol=1e-4, msg=name)
    touched = {module for name in deltas for module in targets[name].modules}
    tuned_parameters = dict(network.named_parameters())
    for name, parameter in base.denoiser.named_parameters():
        if name.rpartition(".")[0] not in touched:
            assert tuned_parameters[name] is parameter


def test_weights_in_several_files(folder: Path, tmp_path: Path) -> None:
    """A folder as save_pretrained() splits it; a missing part is named."""
    base = nano.make("sdxl", folder)
    network = nano.sdxl().unet
    network.load_state_dict({name: tensor + 0.05 for name, tensor in base.denoiser.state_dict().items()})
    network.save_pretrained(tmp_path / "m" / "unet", max_shard_size="100KB")
    parts = sorted((tmp_path / "m" / "unet").glob("*.safetensors"))
    assert len(parts) > 2
    tuned = tune(base, open_checkpoint(tmp_path / "m"))
    for name, value in network.state_dict().items():
        assert torch.equal(tuned.networks["unet"].state_dict()[name], value), name
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"has {len(parts) - 1} of the {len(parts)} files"):
        open_checkpoint(tmp_path / "m")


def test_a_network_with_some_of_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    base = nano.make("flux", folder)
    state = {n: t.contiguous() for n, t in original_file(base, torch.Generator()).items() if "single_blocks.1" not in n}
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors of its transformer are missing, such as 'single_transformer"):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))


def test_the_wrong_family_is_said(folder: Path, tmp_path: Path) -> None:
    base = nano.make("sd1", folder)
    save_file({n: t.contiguous() for n, t in original_file(nano.make("flux", folder), torch.Generator()).items()},
              tmp_path / "f.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"none of its tensors has.*family flux, the base is of family sd1"):
        tune(base, open_checkpoint(tmp_path / "f.safetensors"))
