"""The correspondence of names is complete: by diffusers' converters, and for real-size models on the meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_cosmos_transformer_checkpoint_to_diffusers,
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_hidream_transformer_to_diffusers,
    convert_krea2_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from torch import nn
from transformers import CLIPTextModelWithProjection

from audit.models.families.keys import Target, flat_targets, module_targets, originals_of
from audit.models.families.unet import original_unet_names
from audit.models.formats.names import Algorithm, read_names
from audit.models.formats.parts import gathered
from audit.models.published import PUBLISHED, PublishedNetwork, build
from audit.models.safetensors_header import TensorInfo
from tests.models import nano
from tests.models.test_single_files import krea2_state, originals

Shapes = dict[str, tuple[int, ...]]


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


REAL: dict[str, PublishedNetwork] = {
    "sd15": PUBLISHED["sd15"].networks["unet"],
    "sd21": PUBLISHED["sd2"].networks["unet"],
    "sdxl": PUBLISHED["sdxl"].networks["unet"],
    "flux": PUBLISHED["flux-dev"].networks["transformer"],
    "klein-4b": PUBLISHED["flux2-klein-4b"].networks["transformer"],
    "klein-9b": PUBLISHED["flux2-klein-9b"].networks["transformer"],
    "flux2-dev": PUBLISHED["flux2-dev"].networks["transformer"],
    "z-image": PUBLISHED["z-image"].networks["transformer"],
    "qwen-image": PUBLISHED["qwen-image"].networks["transformer"],
    "wan-1.3b": PUBLISHED["wan2.1-1.3b"].networks["transformer"],
    "wan-14b": PUBLISHED["wan2.1-14b"].networks["transformer"],
    "wan-5b": PUBLISHED["wan2.2-5b"].networks["transformer"],
    "umt5-xxl": PUBLISHED["wan2.1-14b"].networks["text_encoder"],
    "ernie-image": PUBLISHED["ernie-image"].networks["transformer"],
    "krea-2": PUBLISHED["krea-2"].networks["transformer"],
    "hidream-i1": PUBLISHED["hidream-i1"].networks["transformer"],
    "kolors": PUBLISHED["kolors"].networks["unet"],
    "anima": PUBLISHED["anima"].networks["transformer"],
    "anima-conditioner": PUBLISHED["anima"].networks["text_conditioner"],
    "qwen3-0.6b": PUBLISHED["anima"].networks["text_encoder"],
    "sd35": PUBLISHED["sd3.5-large"].networks["transformer"],
    "clip-l": PUBLISHED["sd15"].networks["text_encoder"],
    "open-clip-h": PUBLISHED["sd2"].networks["text_encoder"],
    "open-clip-g": PUBLISHED["sdxl"].networks["text_encoder_2"],
    "t5-xxl": PUBLISHED["flux-dev"].networks["text_encoder_2"],
}


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {name: build(network) for name, network in REAL.items()}


@pytest.mark.parametrize("name", list(REAL))
def test_the_configurations_are_those_of_the_real_models(networks: dict[str, nn.Module], name: str) -> None:
    assert parameters_of(networks[name]) / 1e6 == pytest.approx(REAL[name].millions, rel=2e-4)


def adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """What sd-scripts and LyCORIS can train: linear layers and convolutions."""
    return {name: module for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def kohya_keys(prefix: str, modules: dict[str, tuple[int, ...]], rank: int = 8) -> dict[str, TensorInfo]:
    found = {}
    for name, shape in modules.items():
        stem = f"{prefix}_{name.replace('.', '_')}"
        for key, size in (
            ("lora_down.weight", (rank, *shape[1:])),
            ("lora_up.weight", (shape[0], rank)),
            ("alpha", ()),
        ):
            found[f"{stem}.{key}"] = TensorInfo("F16", size, 0, 0)
    return found


def dotted_keys(prefix: str, modules: Shapes, rank: int = 8) -> dict[str, TensorInfo]:
    """As PEFT, diffusers, ai-toolkit and ComfyUI name them."""
    found = {}
    for name, shape in modules.items():
        found[f"{prefix}.{name}.lora_A.weight"] = TensorInfo("BF16", (rank, *shape[1:]), 0, 0)
        found[f"{prefix}.{name}.lora_B.weight"] = TensorInfo("BF16", (shape[0], rank), 0, 0)
    return found


def assert_complete(keys: dict[str, TensorInfo], network: nn.Module) -> None:
    """Every key is understood, every module is in the network with the shape that the file has, none is hit twice."""
    names = read_names(keys)
    assert names.unknown == []
    assert {group.algorithm for group in names.groups} == {Algorithm.lora}
    dotted = module_targets(network)
    flat = flat_targets(dotted)
    hit: list[str] = []
    for group in names.groups:
        target = (flat if group.flat else dotted)[group.module]
        rows = sum(network.get_submodule(module).weight.shape[0] for module in target.modules)
        first = network.get_submodule(target.modules[0]).weight
        assert keys[group.tensors["up"]].shape[0] == rows, group.module
        assert keys[group.tensors["down"]].shape[1:] == tuple(first.shape[1:]), group.module
        hit += target.modules
    assert len(hit) == len(set(hit))
    assert set(hit) == set(adaptable(network))


@pytest.mark.parametrize("name", ["sd15", "sd21", "clip-l", "open-clip-h", "open-clip-g", "t5-xxl"])
def test_every_key_of_a_full_kohya_lora_is_mapped(networks: dict[str, nn.Module], name: str) -> None:
    """sd-scripts names the modules of SD 1 and 2 and of text encoders as diffusers and transformers do."""
    network = networks[name]
    prefix = "lora_unet" if name.startswith("sd") else "lora_te3" if name.startswith("t5") else "lora_te1"
    nested = "" if name.startswith(("sd", "t5")) else "text_model."
    modules = {
        (key if key.startswith(("text_model", "text_projection")) else nested + key): tuple(module.weight.shape)
        for key, module in adaptable(network).items()
    }
    assert len(modules) > 70
    assert_complete(kohya_keys(prefix, modules), network)


@pytest.mark.parametrize("name", ["sdxl", "kolors"])
def test_every_key_of_a_full_kohya_sdxl_lora_is_mapped(networks: dict[str, nn.Module], name: str) -> None:
    """sd-scripts trains SDXL under the original names; what Kolors has besides is called as in diffusers."""
    network = networks[name]
    original = original_unet_names(network)
    own = {key: tuple(module.weight.shape) for key, module in adaptable(network).items()}
    modules = {original.get(key, key): shape for key, shape in own.items()}
    assert set(own) - set(original) == ({"encoder_hid_proj"} if name == "kolors" else set())
    assert len(modules) == len(adaptable(network)) > 700
    known = {  # keys of published files
        "input_blocks_4_1_transformer_blocks_0_attn2_to_k", "middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "output_blocks_5_1_proj_out", "output_blocks_2_2_conv", "input_blocks_3_0_op", "label_emb_0_0", "out_2",
        "input_blocks_8_0_emb_layers_1", "output_blocks_0_0_skip_connection", "time_embed_2", "input_blocks_0_0",
    }  # fmt: skip
    assert known <= {key.replace(".", "_") for key in modules}
    assert_complete(kohya_keys("lora_unet", modules), network)
    assert_complete(dotted_keys("diffusion_model", modules), network)
    assert_complete(dotted_keys("unet", own), network)
    assert_complete(kohya_keys("lora_unet", own), network)


def flux_modules(doubles: int = 19, singles: int = 38, width: int = 3072) -> dict[str, tuple[int, ...]]:
    """All linear layers of Flux as Black Forest Labs' code has them (its module names and sizes)."""
    found: dict[str, tuple[int, ...]] = {
        "img_in": (width, 64), "txt_in": (width, 4096), "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width), "vector_in.in_layer": (width, 768), "vector_in.out_layer": (width, width),
        "guidance_in.in_layer": (width, 256), "guidance_in.out_layer": (width, width),
        "final_layer.linear": (64, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for block in range(doubles):
        for stream in ("img", "txt"):
            found |= {
                f"double_blocks.{block}.{stream}_mod.lin": (6 * width, width),
                f"double_blocks.{block}.{stream}_attn.qkv": (3 * width, width),
                f"double_blocks.{block}.{stream}_attn.proj": (width, width),
                f"double_blocks.{block}.{stream}_mlp.0": (4 * width, width),
                f"double_blocks.{block}.{stream}_mlp.2": (width, 4 * width),
            }
    for block in range(singles):
        found |= {
            f"single_blocks.{block}.linear1": (7 * width, width),
            f"single_blocks.{block}.linear2": (width, 5 * width),
            f"single_blocks.{block}.modulation.lin": (3 * width, width),
        }
    return found


def test_every_key_of_a_full_kohya_flux_lora_is_mapped(networks: dict[str, nn.Module]) -> None:
    assert_complete(kohya_keys("lora_unet", flux_modules()), networks["flux"])


def flux2_modules(doubles: int, singles: int, width: int, text: int = 0, guided: bool = False) -> Shapes:
    """FLUX.2 as Black Forest Labs' code names its linear layers; without ``text``, those of the blocks alone."""
    found: Shapes = {}
    if text:
        found |= {
            "img_in": (width, 128), "txt_in": (width, text), "time_in.in_layer": (width, 256),
            "time_in.out_layer": (width, width), "single_stream_modulation.lin": (3 * width, width),
            "double_stream_modulation_img.lin": (6 * width, width),
            "double_stream_modulation_txt.lin": (6 * width, width), "final_layer.linear": (128, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
        }  # fmt: skip
    if guided:
        found |= {"guidance_in.in_layer": (width, 256), "guidance_in.out_layer": (width, width)}
    for block in range(doubles):
        for stream in ("img", "txt"):
            found |= {
                f"double_blocks.{block}.{stream}_attn.qkv": (3 * width, width),
                f"double_blocks.{block}.{stream}_attn.proj": (width, width),
                f"double_blocks.{block}.{stream}_mlp.0": (6 * width, width),
                f"double_blocks.{block}.{stream}_mlp.2": (width, 3 * width),
            }
    for block in range(singles):
        found |= {
            f"single_blocks.{block}.linear1": (9 * width, width),
            f"single_blocks.{block}.linear2": (width, 4 * width),
        }
    return found


FLUX2 = {
    "klein-4b": flux2_modules(5, 20, 3072, 7680),
    "klein-9b": flux2_modules(8, 24, 4096, 12288),
    "flux2-dev": flux2_modules(8, 48, 6144, 15360, guided=True),
}


@pytest.mark.parametrize("name", list(FLUX2))
def test_every_key_of_a_full_kohya_flux2_lora_is_mapped(networks: dict[str, nn.Module], name: str) -> None:
    assert_complete(kohya_keys("lora_unet", FLUX2[name]), networks[name])
    assert_complete(dotted_keys("diffusion_model", FLUX2[name]), networks[name])
    own = {key: tuple(module.weight.shape) for key, module in adaptable(networks[name]).items()}
    assert_complete(dotted_keys("transformer", own), networks[name])


def z_image_modules(layers: int = 30, refiners: int = 2, width: int = 3840) -> Shapes:
    """Z-Image as Tongyi's code names its linear layers."""
    found: Shapes = {
        "x_embedder": (width, 64), "final_layer.linear": (64, width), "final_layer.adaLN_modulation.1": (width, 256),
        "t_embedder.mlp.0": (1024, 256), "t_embedder.mlp.2": (256, 1024), "cap_embedder.1": (width, 2560),
    }  # fmt: skip
    for kind, count in (("layers", layers), ("noise_refiner", refiners), ("context_refiner", refiners)):
        for layer in range(count):
            block = f"{kind}.{layer}"
            found |= {
                f"{block}.attention.qkv": (3 * width, width), f"{block}.attention.out": (width, width),
                f"{block}.feed_forward.w1": (width * 8 // 3, width),
                f"{block}.feed_forward.w2": (width, width * 8 // 3),
                f"{block}.feed_forward.w3": (width * 8 // 3, width),
            }  # fmt: skip
            if kind != "context_refiner":
                found[f"{block}.adaLN_modulation.0"] = (4 * width, 256)
    return found


def wan_modules(layers: int, width: int, hidden: int, channels: int = 16) -> Shapes:
    """Wan 2.1 text to video as Alibaba's code names its linear layers."""
    found: Shapes = {
        "time_embedding.0": (width, 256), "time_embedding.2": (width, width), "text_embedding.0": (width, 4096),
        "text_embedding.2": (width, width), "time_projection.1": (6 * width, width), "head.head": (4 * channels, width),
    }  # fmt: skip
    for layer in range(layers):
        for attention in ("self_attn", "cross_attn"):
            found |= {f"blocks.{layer}.{attention}.{letter}": (width, width) for letter in "qkvo"}
        found |= {f"blocks.{layer}.ffn.0": (hidden, width), f"blocks.{layer}.ffn.2": (width, hidden)}
    return found


@pytest.mark.parametrize(
    "name", ["z-image", "qwen-image", "ernie-image", "krea-2", "anima", "wan-1.3b", "wan-14b", "wan-5b", "hidream-i1"]
)
def test_every_key_of_a_full_lora_of_2026_is_mapped(networks: dict[str, nn.Module], name: str) -> None:
    """By the first code's names and by diffusers', which ai-toolkit, ComfyUI, diffusers and kohya write."""
    network = networks[name]
    own = {key: tuple(module.weight.shape) for key, module in adaptable(network).items()}
    for modules in (own, ORIGINALS.get(name, own)):
        for keys in (dotted_keys("diffusion_model", modules), dotted_keys("transformer", modules)):
            assert_complete(keys, network)
        assert_complete(kohya_keys("lora_unet", modules), network)


def krea2_modules(layers: int = 28, width: int = 6144, text: int = 2560) -> Shapes:
    """Krea 2 as Krea's code names its linear layers."""
    found: Shapes = {
        "first": (width, 64), "last.linear": (64, width), "tmlp.0": (width, 256), "tmlp.2": (width, width),
        "tproj.1": (6 * width, width), "txtmlp.1": (width, text), "txtmlp.3": (width, width),
        "txtfusion.projector": (1, 12),
    }  # fmt: skip
    blocks = [(f"blocks.{layer}", width, width // 4, 16384) for layer in range(layers)]
    blocks += [(f"txtfusion.{kind}_blocks.{n}", text, text, 6912) for kind in ("layerwise", "refiner") for n in (0, 1)]
    for block, inner, grouped, hidden in blocks:
        found |= {f"{block}.attn.{name}": (inner, inner) for name in ("wq", "wo", "gate")}
        found |= {f"{block}.attn.{name}": (grouped, inner) for name in ("wk", "wv")}
        found |= {f"{block}.mlp.{name}": (hidden, inner) for name in ("gate", "up")}
        found[f"{block}.mlp.down"] = (inner, hidden)
    return found


def anima_modules(layers: int = 28, width: int = 2048, text: int = 1024) -> Shapes:
    """Anima as NVIDIA's code of Cosmos-Predict2 names its linear layers."""
    found: Shapes = {
        "x_embedder.proj.1": (width, 68), "t_embedder.1.linear_1": (width, width), "final_layer.linear": (64, width),
        "t_embedder.1.linear_2": (3 * width, width), "final_layer.adaln_modulation.1": (256, width),
        "final_layer.adaln_modulation.2": (2 * width, 256),
    }  # fmt: skip
    for block in (f"blocks.{layer}" for layer in range(layers)):
        for part in ("self_attn", "cross_attn", "mlp"):
            found |= {f"{block}.adaln_modulation_{part}.1": (256, width)}
            found |= {f"{block}.adaln_modulation_{part}.2": (3 * width, 256)}
        for part, inner in (("self_attn", width), ("cross_attn", text)):
            found |= {f"{block}.{part}.{name}_proj": (width, width) for name in ("q", "output")}
            found |= {f"{block}.{part}.{name}_proj": (width, inner) for name in ("k", "v")}
        found |= {f"{block}.mlp.layer1": (4 * width, width), f"{block}.mlp.layer2": (width, 4 * width)}
    return found


def test_every_key_of_a_lora_on_animas_conditioner_and_text_encoder_is_mapped(networks: dict[str, nn.Module]) -> None:
    """By the names of sd-scripts (train_llm_adapter, lora_te), ComfyUI and diffusers."""
    for name, part, flat, dotted in (
        ("anima-conditioner", "conditioner", ("lora_unet_llm_adapter",),
         ("diffusion_model.llm_adapter", "text_conditioner", "transformer.llm_adapter", "llm_adapter")),
        ("qwen3-0.6b", "te1", ("lora_te", "lora_te_model"),
         ("text_encoder", "text_encoders.qwen3_06b.transformer.model")),
    ):  # fmt: skip
        own = {key: tuple(module.weight.shape) for key, module in adaptable(networks[name]).items()}
        assert len(own) > 60
        for keys in (*(kohya_keys(one, own) for one in flat), *(dotted_keys(one, own) for one in dotted)):
            assert_complete(keys, networks[name])
            assert {group.part for group in read_names(keys).groups} == {part}


ORIGINALS: dict[str, Shapes] = {
    "anima": anima_modules(),
    "z-image": z_image_modules(),
    "krea-2": krea2_modules(),
    "wan-1.3b": wan_modules(30, 1536, 8960),
    "wan-14b": wan_modules(40, 5120, 13824),
    "wan-5b": wan_modules(30, 3072, 14336, 48),
}


def sd3_modules(blocks: int = 38, width: int = 2432) -> dict[str, tuple[int, ...]]:
    """All layers of Stable Diffusion 3.5 large as Stability's code has them."""
    found: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, 16, 2, 2), "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 2048), "y_embedder.mlp.2": (width, width), "context_embedder": (width, 4096),
        "final_layer.linear": (64, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for block in range(blocks):
        for stream in ("x_block", "context_block"):
            last = block == blocks - 1 and stream == "context_block"
            stem = f"joint_blocks.{block}.{stream}"
            found |= {
                f"{stem}.attn.qkv": (3 * width, width),
                f"{stem}.adaLN_modulation.1": ((2 if last else 6) * width, width),
            }
            if not last:
                found |= {
                    f"{stem}.attn.proj": (width, width),
                    f"{stem}.mlp.fc1": (4 * width, width),
                    f"{stem}.mlp.fc2": (width, 4 * width),
                }
    return found


def test_every_key_of_a_full_kohya_sd3_lora_is_mapped(networks: dict[str, nn.Module]) -> None:
    assert_complete(kohya_keys("lora_unet", sd3_modules()), networks["sd35"])


def original_state(network: nn.Module, targets: dict[str, Target]) -> dict[str, torch.Tensor]:
    state = {}
    for name, target in targets.items():
        for parameter in ("weight", "bias"):
            value = gathered(network, target, parameter)
            if value is not None:
                scale = name.endswith(("query_norm", "key_norm")) or re.search(r"distilled_guidance_layer\.norms", name)
                state[f"{name}.{'scale' if scale else parameter}"] = value
    return state


def assert_same_state(found: dict[str, torch.Tensor], network: nn.Module, but: tuple[str, ...] = ()) -> None:
    wanted = {name: t for name, t in network.state_dict().items() if not name.endswith(but or ("\0",))}
    assert set(wanted) <= set(found)
    for name, tensor in wanted.items():
        assert torch.equal(found[name].reshape(tensor.shape), tensor), name


def test_unet_names_are_those_of_diffusers_converter() -> None:
    for make in (nano.sd1, nano.sdxl):
        network = make().unet
        names = original_unet_names(network)
        state = {
            f"model.diffusion_model.{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
            for name, tensor in network.state_dict().items()
        }
        assert_same_state(convert_ldm_unet_checkpoint(state, dict(network.config)), network)


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "flux2", "z-image", "krea2", "wan", "hidream", "anima"])
def test_transformer_names_are_those_of_diffusers_converter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converters know the real width only, so the networks have it; with few blocks."""
    if name == "sd3":
        network: Any = nano.sd3().transformer
        targets = dict(originals_of(network))
        state = original_state(network, targets) | {"pos_embed": network.state_dict()["pos_embed.pos_embed"]}
        found = convert_sd3_transformer_checkpoint_to_diffusers(state)
    elif name == "z-image":
        network = nano.z_image().transformer
        state = original_state(network, originals(network)) | {
            key: value for key, value in network.state_dict().items() if "pad_token" in key
        }
        found = convert_z_image_transformer_checkpoint_to_diffusers(state)
    elif name == "krea2":
        network = nano.krea2().transformer
        found = convert_krea2_transformer_checkpoint_to_diffusers(krea2_state(network))
    elif name == "hidream":
        network = nano.hidream().transformer
        named = original_state(network, originals(network))
        found = convert_hidream_transformer_to_diffusers(
            {f"model.diffusion_model.{key}": t for key, t in named.items()}
        )
    elif name == "wan":
        network = nano.wan().transformer
        named = original_state(network, originals(network)) | {
            re.sub("scale_shift_table$", "modulation" if "." in key else "head.modulation", key): value
            for key, value in network.state_dict().items()
            if "scale_shift_table" in key
        }
        found = convert_wan_transformer_to_diffusers(named)
    elif name == "anima":
        network = nano.anima().transformer
        named = {f"net.{key}": value for key, value in original_state(network, originals(network)).items()}
        found = convert_cosmos_transformer_checkpoint_to_diffusers(named)
    elif name == "flux2":
        network = nano.flux2().transformer
        found = convert_flux2_transformer_checkpoint_to_diffusers(original_state(network, dict(originals_of(network))))
    else:
        torch.manual_seed(0)
        sizes = {"num_layers": 1, "num_single_layers": 1, "in_channels": 4, "joint_attention_dim": 8}
        if name == "flux":
            network = FluxTransformer2DModel(**sizes, pooled_projection_dim=8, guidance_embeds=True)
            convert = convert_flux_transformer_checkpoint_to_diffusers
        else:
            from diffusers import ChromaTransformer2DModel

            network = ChromaTransformer2DModel(
                **sizes, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=2
            )
            convert = convert_chroma_transformer_checkpoint_to_diffusers
        targets = {key: target for key, target in originals_of(network) if "processor" not in key}
        found = convert(original_state(network, targets))
    assert_same_state(found, network)


def test_open_clip_names_are_those_of_diffusers_converter() -> None:
    encoder = nano.clip(CLIPTextModelWithProjection, 32, 2, "gelu")
    targets = dict(originals_of(encoder))
    state = {}
    for name, tensor in original_state(encoder, targets).items():
        state[f"open.{name.replace('.in_proj.', '.in_proj_')}"] = tensor
    found = convert_open_clip_checkpoint(encoder, dict(state) | {"open.text_projection": torch.zeros(32, 32)}, "open.")
    own = encoder.state_dict()
    layers = [name for name in own if ".layers." in name or "final_layer_norm" in name]
    assert len(layers) > 40
    for name in layers:
        key = name if name in found else f"text_model.{name.removeprefix('text_model.')}"
        assert torch.equal(found[key], own[name]), name


def test_sizes_of_the_table_in_the_documentation(networks: dict[str, nn.Module]) -> None:
    """docs/models.md says how large each denoiser is; from the same configurations."""
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    for name in (
        set(networks)
        - {"clip-l", "open-clip-h", "open-clip-g", "t5-xxl", "umt5-xxl"}
        - {"anima-conditioner", "qwen3-0.6b"}
    ):
        assert f"{parameters_of(networks[name]) / 1e9 * 2:.2f} GB" in text, name
