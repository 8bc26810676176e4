"""Families by names and shapes: whole models and adapters of many architectures, of diffusers' own classes on meta."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from audit.errors import CheckpointError
from audit.models.base import locate_base
from audit.models.bases import claims_of, wanted
from audit.models.checkpoint import open_checkpoint
from audit.models.families.identify import Family, family_of_name, family_of_shapes
from audit.models.families.registry import FAMILIES
from audit.models.families.unaudited import by_claim, by_tensors
from audit.models.families.unet import original_unet_names
from audit.models.published import (
    ANIMA,
    ERNIE_IMAGE,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    HIDREAM,
    KOLORS,
    SD15,
    SD21,
    SD35_LARGE,
    SDXL,
    WAN_1_3B,
    WAN_5B,
    WAN_14B,
)
from audit.models.safetensors_header import TensorInfo
from audit.models.tuning import tune
from tests.models import nano
from tests.models.test_keys import FLUX2, ORIGINALS, flux2_modules, flux_modules, sd3_modules

REFINER = SDXL | {
    "cross_attention_dim": 1280, "block_out_channels": (384, 768, 1536, 1536), "attention_head_dim": (6, 12, 24, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip
UNCLIP = SD21 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
UPSCALER = SD21 | {"in_channels": 7, "num_class_embeds": 1000}
IF = {
    "cross_attention_dim": 2048, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D",
                         "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D",
                       "ResnetUpsampleBlock2D"),
}  # fmt: skip
UNET = "UNet2DConditionModel"
LTX_WIDE = {"num_layers": 4}
# class, configuration (what is left out is diffusers' default, the published one of most), the right answer
TABLE: dict[str, tuple[str, Mapping[str, Any], Family | None]] = {
    "Stable Diffusion 1.5": (UNET, SD15, Family.sd1),
    "Stable Diffusion 1.5 inpainting": (UNET, SD15 | {"in_channels": 9}, Family.sd1),
    "Stable Diffusion 2.1": (UNET, SD21, Family.sd2),
    "Stable Diffusion 2.1 unCLIP": (UNET, UNCLIP, None),
    "Stable Diffusion x4 upscaler": (UNET, UPSCALER, None),
    "Stable Diffusion XL": (UNET, SDXL, Family.sdxl),
    "Stable Diffusion XL refiner": (UNET, REFINER, None),
    "Kolors": (UNET, KOLORS, Family.kolors),
    "DeepFloyd IF": (UNET, IF, None),
    "Stable Diffusion 3 medium": ("SD3Transformer2DModel", {
        "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
        "joint_attention_dim": 4096}, Family.sd3),
    "Stable Diffusion 3.5 large": ("SD3Transformer2DModel", SD35_LARGE, Family.sd3),
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, Family.flux),
    "FLUX.1 schnell": ("FluxTransformer2DModel", {}, Family.flux),
    "FLUX.2 dev": ("Flux2Transformer2DModel", FLUX2_DEV, Family.flux2),
    "FLUX.2 klein 4B": ("Flux2Transformer2DModel", FLUX2_KLEIN_4B, Family.flux2_klein),
    "FLUX.2 klein 9B": ("Flux2Transformer2DModel", FLUX2_KLEIN_9B, Family.flux2_klein),
    "FLUX 3": ("Flux3Transformer2DModel", {}, None),
    "Chroma": ("ChromaTransformer2DModel", {}, Family.chroma),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}, None),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", {}, None),
    "HunyuanVideo Framepack": ("HunyuanVideoFramepackTransformer3DModel", {}, None),
    "HunyuanImage": ("HunyuanImageTransformer2DModel", {}, None),
    "Hunyuan-DiT": ("HunyuanDiT2DModel", {"num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4,
                                          "patch_size": 2, "sample_size": 128, "num_layers": 4}, None),
    "LTX-Video": ("LTXVideoTransformer3DModel", {}, None),
    "LTX-2": ("LTX2VideoTransformer3DModel", {"num_layers": 4}, None),
    "AuraFlow, Pony V7": ("AuraFlowTransformer2DModel", {}, None),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, Family.qwen_image),
    "Qwen-Image 2.1": ("QwenImage21Transformer2DModel", {}, None),
    "ERNIE-Image": ("ErnieImageTransformer2DModel", ERNIE_IMAGE, Family.ernie_image),
    "JoyImage": ("JoyImageEditTransformer3DModel", {}, None),
    "Wan 2.1 14B": ("WanTransformer3DModel", WAN_14B, Family.wan),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", WAN_1_3B, Family.wan),
    "Wan 2.1 I2V": ("WanTransformer3DModel", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, None),
    "Wan 2.2 TI2V-5B": ("WanTransformer3DModel", WAN_5B, Family.wan_5b),
    "Wan VACE": ("WanVACETransformer3DModel", {}, None),
    "Wan Animate": ("WanAnimateTransformer3DModel", {}, None),
    "AnyFlow": ("AnyFlowTransformer3DModel", {}, None),
    "Helios": ("HeliosTransformer3DModel", {}, None),
    "PixArt": ("PixArtTransformer2DModel", {}, None),
    "Sana": ("SanaTransformer2DModel", {}, None),
    "Lumina 2": ("Lumina2Transformer2DModel", {}, None),
    "Z-Image": ("ZImageTransformer2DModel", {}, Family.z_image),
    "CogVideoX": ("CogVideoXTransformer3DModel", {}, None),
    "CogView 4": ("CogView4Transformer2DModel", {}, None),
    "Mochi": ("MochiTransformer3DModel", {}, None),
    "Allegro": ("AllegroTransformer3DModel", {}, None),
    "Bria 3.2": ("BriaTransformer2DModel", {"num_layers": 8, "num_single_layers": 28}, None),
    "Bria FIBO": ("BriaFiboTransformer2DModel", {"num_layers": 8, "num_single_layers": 38}, None),
    "LongCat-Image": ("LongCatImageTransformer2DModel", {"num_layers": 10, "num_single_layers": 20}, None),
    "Ovis-Image": ("OvisImageTransformer2DModel", {}, None),
    "Kandinsky 3": ("Kandinsky3UNet", {}, None),
    "Kandinsky 5": ("Kandinsky5Transformer3DModel", {}, None),
    "Stable Cascade": ("StableCascadeUNet", {}, None),
    "Stable Video Diffusion": ("UNetSpatioTemporalConditionModel", {}, None),
    "ModelScope, text to video": ("UNet3DConditionModel", {}, None),
    "AnimateDiff": ("UNetMotionModel", {"cross_attention_dim": 768}, None),
    "Stable Audio": ("StableAudioDiTModel", {}, None),
    "AudioLDM 2": ("AudioLDM2UNet2DConditionModel", {}, None),
    "DiT": ("DiTTransformer2DModel", {}, None),
    "Cosmos": ("CosmosTransformer3DModel", {"num_layers": 4}, None),
    "PRX": ("PRXTransformer2DModel", {}, None),
    "Krea 2": ("Krea2Transformer2DModel", {}, Family.krea2),
    "HiDream-I1": ("HiDreamImageTransformer2DModel", HIDREAM, Family.hidream),
    "Anima": ("CosmosTransformer3DModel", ANIMA, Family.anima),
    "Cosmos Predict2 14B": ("CosmosTransformer3DModel", ANIMA | {"num_attention_heads": 40, "num_layers": 36}, None),
    "Cosmos Predict2 2B from video": ("CosmosTransformer3DModel", ANIMA | {"in_channels": 17}, None),
    "Cosmos Predict2.5 2B": ("CosmosTransformer3DModel", ANIMA | {
        "in_channels": 17, "use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}, None),
}  # fmt: skip
OF_WAN = ("Wan 2.1 I2V", "Wan VACE", "Wan Animate", "AnyFlow", "Helios")  # their blocks are Wan's, and layers besides
OF_ANIMA = ("Cosmos Predict2 2B from video", "Cosmos Predict2.5 2B")  # but for their first layers
SUPPORTED = [name for name, (_, _, family) in TABLE.items() if family is not None]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    found = {}
    with torch.device("meta"):
        for name, (kind, config, _) in TABLE.items():
            found[name] = getattr(diffusers, kind)(**config)
    return found


ORIGINAL_MODULES = {
    "Z-Image": ORIGINALS["z-image"],
    "Krea 2": ORIGINALS["krea-2"],
    "Anima": ORIGINALS["anima"],
    "Wan 2.1 14B": ORIGINALS["wan-14b"],
    "Wan 2.1 1.3B": ORIGINALS["wan-1.3b"],
    "Wan 2.2 TI2V-5B": ORIGINALS["wan-5b"],
}


def info(*shape: int) -> TensorInfo:
    return TensorInfo("F16", shape, 0, 0)


def whole(network: nn.Module) -> dict[str, TensorInfo]:
    return {name: info(*tensor.shape) for name, tensor in network.state_dict().items()}


def linear(network: nn.Module) -> dict[str, tuple[int, ...]]:
    kinds = (nn.Linear, nn.Conv2d)
    return {name: tuple(m.weight.shape) for name, m in network.named_modules() if isinstance(m, kinds)}


def lora(modules: Mapping[str, tuple[int, ...]], naming: str) -> dict[str, TensorInfo]:
    found = {}
    for name, (out, *inputs) in modules.items():
        stem, down, up = {
            "peft": (f"transformer.{name}", "lora_A", "lora_B"),
            "comfy": (f"diffusion_model.{name}", "lora_A", "lora_B"),
            "kohya": (f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
            "onetrainer": (f"lora_transformer_{name.replace('.', '_')}", "lora_down", "lora_up"),
        }[naming]  # fmt: skip
        found |= {f"{stem}.{down}.weight": info(8, *inputs), f"{stem}.{up}.weight": info(out, 8)}
    return found


def test_the_table_is_wide_enough() -> None:
    assert len(TABLE) >= 40
    assert {family for _, _, family in TABLE.values()} - {None} == set(Family) - {Family.alt, Family.other}


@pytest.mark.parametrize("name", list(TABLE))
def test_whole_models_are_told_apart(networks: dict[str, nn.Module], name: str) -> None:
    _, _, family = TABLE[name]
    tensors = whole(networks[name])
    assert family_of_shapes(tensors) is family
    prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
    assert family_of_shapes(prefixed) is family


@pytest.mark.parametrize("naming", ["peft", "comfy", "kohya", "onetrainer"])
@pytest.mark.parametrize("only", ["", "attn", "to_q"])
@pytest.mark.parametrize("name", list(TABLE))
def test_adapters_are_of_their_family_or_unknown(
    networks: dict[str, nn.Module], name: str, only: str, naming: str
) -> None:
    """On all layers, on attention, on one layer a block. Some of Kolors' and of image to video are SDXL's and Wan's."""
    _, _, family = TABLE[name]
    modules = {key: shape for key, shape in linear(networks[name]).items() if only in key}
    found = family_of_shapes(lora(modules, naming))
    if name == "Kolors" and only:
        assert found in (None, Family.sdxl)
    elif name in OF_WAN and (only or name == "Helios"):
        assert found in (None, Family.wan)
    elif name in OF_ANIMA and only:
        assert found in (None, Family.anima)
    elif name in ("Stable Diffusion 2.1 unCLIP", "Stable Diffusion x4 upscaler") and found is not None:
        assert found is Family.sd2  # the same layers
    elif family is Family.chroma:
        assert found in (None, Family.flux, Family.chroma)
    elif not only and family is not None:
        assert found is family
    else:
        assert found in (None, family)


UNAUDITED = {
    **dict.fromkeys(
        ("HunyuanVideo", "HunyuanVideo 1.5", "HunyuanVideo Framepack", "HunyuanImage"), "HunyuanVideo or HunyuanImage"
    ),
    "Hunyuan-DiT": "Hunyuan-DiT", "LTX-2": "LTX",
    "AuraFlow, Pony V7": "AuraFlow, and Pony V7,", "FLUX 3": "FLUX.3", "Qwen-Image 2.1": "Qwen-Image 2",
    "JoyImage": "JoyImage", "Sana": "Sana", "Lumina 2": "Lumina", "Mochi": "Mochi", "PixArt": "PixArt",
    "Kandinsky 5": "Kandinsky",
}  # fmt: skip


def test_models_that_are_not_audited_have_their_names(networks: dict[str, nn.Module]) -> None:
    """By their first blocks, whole and as an adapter of all layers; no name is given to those of another."""
    for name, network in networks.items():
        first = {key: value for key, value in whole(network).items() if not re.search(r"\.(?:[4-9]|\d\d)\.", key)}
        layers = {key.removesuffix(".weight"): one.shape for key, one in first.items() if len(one.shape) == 2}
        for tensors in (first, lora(layers, "comfy")):
            found = by_tensors(tensors)
            assert found is None or TABLE[name][2] is None, name
            if found is not None:
                assert found.title == UNAUDITED.get(name), name
        assert (by_tensors(first) is None) == (name not in UNAUDITED), name


EDITS = "HiDream-E1, which edits pictures,"


@pytest.mark.parametrize(
    ("claim", "title"),
    [
        ("HiDream", None), ("HiDream-O1", "HiDream-O1"), ("HiDream-ai/HiDream-E1-1", EDITS), ("hidream_e1_full", EDITS),
        ("HiDream-I1-Dev", None), ("Anima", None), ("circlestone-labs/Anima", None),
        ("LTXV 2.3", "LTX"), ("Hunyuan Video", "HunyuanVideo or HunyuanImage"), ("Kolors", None),
        ("Kwai-Kolors/Kolors-Inpainting", "Kolors that takes pictures"),
        ("Cosmos-Predict2-2B-Text2Image", "Cosmos"),
        ("hunyuan_video", "HunyuanVideo or HunyuanImage"),
        ("Hunyuan 1", "Hunyuan-DiT"), ("Pony V7", "AuraFlow, and Pony V7,"), ("Qwen 2", "Qwen-Image 2"),
        ("Qwen-Image-Edit-2511", "Qwen-Image that edits or layers pictures"), ("MageFlow", "MageFlow"),
        ("Ideogram 4.0", "Ideogram"), ("animagine-xl-3.1", None), ("animaPencilXL_v500", None), ("SDXL 1.0", None),
        ("Krea 2", None), ("Ernie", None), ("my_model", None), ("", None),
    ],
)  # fmt: skip
def test_claims_of_models_that_are_not_audited(claim: str, title: str | None) -> None:
    found = by_claim(claim)
    assert (found.title if found else None) == title


@pytest.mark.parametrize(
    "kind", ["HiDreamImageEditingPipeline", "KolorsImg2ImgPipeline", "LTXPipeline", "KandinskyV22Pipeline"]
)
def test_a_base_that_is_not_audited_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(CheckpointError, match=r"(HiDream-E1.*|Kolors.*|LTX|Kandinsky) is not audited yet"):
        locate_base(str(tmp_path))


def test_an_adapter_that_is_not_audited_is_refused_by_its_name(tmp_path: Path) -> None:
    def refusal(module: str, metadata: dict[str, str]) -> str:
        factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
        save_file(factors, tmp_path / "a.safetensors", metadata)
        with pytest.raises(CheckpointError) as caught:
            tune(base, open_checkpoint(tmp_path / "a.safetensors"))
        return str(caught.value)

    base = nano.make("sd1", tmp_path)
    lumina = "diffusion_model.noise_refiner.0.attn.to_q"
    assert "Lumina is not audited yet, and its tensors are named as those" in refusal(lumina, {})
    said = refusal("diffusion_model.blocks.0.x.to_q", {"modelspec.architecture": "ltx-video/lora"})
    assert "LTX is not audited yet, and its modelspec.architecture claims it" in said
    save_file({"noise_refiner.0.attn.to_q.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="Lumina is not audited yet, and its tensors are named"):
        open_checkpoint(tmp_path / "w.safetensors")


def test_a_claim_that_is_not_audited_stands_in_what_a_file_wants() -> None:
    """As of Civitai's base model."""
    found = wanted(claims_of({}, [("HiDream-O1", "baseModel")]), None, None)
    assert (found.by, found.sure) == ("nothing", "none")
    assert "baseModel says 'HiDream-O1': HiDream-O1 is not audited yet" in found.why


def test_an_adapter_of_kolors_is_what_its_names_claim() -> None:
    """Without the first layers it has the shapes of one of SDXL."""
    for claim in ([("Kolors", "baseModel")], [("Kolors-diffusers", "ss_sd_model_name"), ("SDXL 1.0", "baseModel")]):
        found = wanted(claims_of({}, claim), Family.sdxl, None)
        assert (found.base, found.family, found.by, found.sure) == ("kolors", Family.kolors, "name", "medium")
    assert "baseModel says Stable Diffusion XL 1.0" in found.why
    found = wanted([], Family.sdxl, Family.kolors)
    assert (found.base, found.family, found.sure) == (None, Family.kolors, "low")
    assert wanted([], Family.sdxl, None).family is Family.sdxl
    assert wanted(claims_of({}, [("Kolors", "baseModel")]), Family.flux, None).family is Family.flux


@pytest.mark.parametrize("naming", ["peft", "kohya"])
def test_krea_2_is_told_by_its_few_keys_and_values(networks: dict[str, nn.Module], naming: str) -> None:
    """Without its gates; not by its queries alone."""
    modules = {key: shape for key, shape in linear(networks["Krea 2"]).items() if key.startswith("transformer_blocks")}
    four = {key: shape for key, shape in modules.items() if re.search("to_(q|k|v|out)", key)}
    assert family_of_shapes(lora(four, naming)) is Family.krea2
    queries = {key: shape for key, shape in four.items() if key.endswith("to_q")}
    assert family_of_shapes(lora(queries, naming)) is None


@pytest.mark.parametrize("name", SUPPORTED)
def test_original_layouts_are_told_apart(networks: dict[str, nn.Module], name: str) -> None:
    kind, _, family = TABLE[name]
    network = networks[name]
    if kind == UNET:
        names = original_unet_names(network)
        modules = {names.get(key, key): shape for key, shape in linear(network).items()}
    elif kind == "FluxTransformer2DModel":
        modules = flux_modules()
    elif kind == "SD3Transformer2DModel":
        modules = sd3_modules()
    elif name in ORIGINAL_MODULES:
        modules = ORIGINAL_MODULES[name]
    else:
        return
    assert len(modules) > 100 or kind in {one.denoiser_class for one in FAMILIES.values()}
    assert family_of_shapes({f"model.diffusion_model.{key}.weight": info(*s) for key, s in modules.items()}) is family
    for naming in ("comfy", "kohya"):
        assert family_of_shapes(lora(modules, naming)) is family


@pytest.mark.parametrize("kind", ["lokr_w1", "oft_blocks"])
def test_what_shows_no_widths_is_told_by_its_last_block(kind: str) -> None:
    for last, family in ((18, Family.flux), (19, None), (7, None)):
        names = [f"oft_unet_double_blocks_{number}_img_attn_qkv.{kind}" for number in range(last + 1)]
        assert family_of_shapes(dict.fromkeys(names, info(4, 4))) is family


def hunyuan_modules() -> dict[str, tuple[int, ...]]:
    """HunyuanVideo as Tencent's code names its layers."""
    found: dict[str, tuple[int, ...]] = {}
    for block in range(20):
        for stream in ("img", "txt"):
            found |= {
                f"double_blocks.{block}.{stream}_mod.linear": (18432, 3072),
                f"double_blocks.{block}.{stream}_attn_qkv": (9216, 3072),
                f"double_blocks.{block}.{stream}_attn_proj": (3072, 3072),
                f"double_blocks.{block}.{stream}_mlp.fc1": (12288, 3072),
                f"double_blocks.{block}.{stream}_mlp.fc2": (3072, 12288),
            }
    for block in range(40):
        found |= {
            f"single_blocks.{block}.linear1": (21504, 3072), f"single_blocks.{block}.linear2": (3072, 15360),
            f"single_blocks.{block}.modulation.linear": (9216, 3072),
        }  # fmt: skip
    return found


def only(modules: dict[str, tuple[int, ...]], part: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in modules.items() if part in name}


OTHERS: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "HunyuanVideo": hunyuan_modules,
    "HunyuanVideo, attention": lambda: {k: s for k, s in hunyuan_modules().items() if "attn" in k},
    "HunyuanVideo, single blocks": lambda: {k: s for k, s in hunyuan_modules().items() if "single" in k},
}


@pytest.mark.parametrize("naming", ["comfy", "kohya", "whole"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_original_layouts_of_others_with_flux_names_are_unknown(name: str, naming: str) -> None:
    modules = OTHERS[name]()
    tensors = {f"{key}.weight": info(*s) for key, s in modules.items()} if naming == "whole" else lora(modules, naming)
    assert family_of_shapes(tensors) is None


FLUX2_FILES: dict[str, tuple[dict[str, tuple[int, ...]], Family | None]] = {
    "dev": (FLUX2["flux2-dev"], Family.flux2),
    "dev, attention": (only(flux2_modules(8, 0, 6144), "attn"), Family.flux2),
    "klein 9B": (FLUX2["klein-9b"], Family.flux2_klein),
    "klein 9B, attention": (only(flux2_modules(8, 0, 4096), "attn"), Family.flux2_klein),
    "klein 4B": (FLUX2["klein-4b"], Family.flux2_klein),
    "klein 4B, blocks": (flux2_modules(5, 20, 3072), Family.flux2_klein),
    "klein 4B, double blocks": (flux2_modules(5, 0, 3072), Family.flux2_klein),
    "klein 4B, single blocks": (flux2_modules(0, 20, 3072), Family.flux2_klein),
    "klein 4B, attention": (only(flux2_modules(5, 0, 3072), "attn"), None),  # FLUX.1's first blocks have these shapes
}


@pytest.mark.parametrize("naming", ["comfy", "kohya", "whole"])
@pytest.mark.parametrize("name", list(FLUX2_FILES))
def test_original_layouts_of_flux2_are_told_apart(name: str, naming: str) -> None:
    modules, family = FLUX2_FILES[name]
    tensors = {f"{key}.weight": info(*s) for key, s in modules.items()} if naming == "whole" else lora(modules, naming)
    assert family_of_shapes(tensors) is family


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("FLUX.2", "flux2"), ("Flux.2 D", "flux2"), ("Flux.2 Klein 9B", "flux2-klein"), ("flux2", "flux2"),
        ("Flux.2 Klein 4B-base", "flux2-klein"), ("black-forest-labs/FLUX.2-klein-4B", "flux2-klein"),
        ("flux-2-dev/lora", "flux2"), ("black-forest-labs/FLUX.2-dev", "flux2"), ("FLUX.3", "other"),
        ("flux-1.2", "flux"), ("flux-1-dev/lora", "flux"),
        ("Flux.1 Krea", "flux"), ("flux1", "flux"), ("Flux.1 S", "flux"), ("Pony V7", "other"), ("ponyv7", "other"),
        ("purplesmartai/pony-v7-base", "other"), ("Pony Diffusion V7", "other"), ("Pony Diffusion V6 XL", "sdxl"),
        ("Pony", "sdxl"), ("NoobAI", "sdxl"), ("Hunyuan Video", "other"), ("hunyuan-video", "other"),
        ("HunyuanVideo", "other"), ("LTXV", "other"), ("ltx-video", "other"), ("AuraFlow", "other"),
        ("Hunyuan 1", "other"), ("Kolors", "kolors"), ("Kwai-Kolors/Kolors-diffusers", "kolors"),
        ("Kolors-IP-Adapter-Plus", "other"), ("Kolors-Virtual-Try-On", "other"), ("HiDream", "hidream"),
        ("HiDream-ai/HiDream-I1-Full", "hidream"), ("hidream_i1_dev_bf16", "hidream"), ("HiDream-O1", "other"),
        ("HiDream-ai/HiDream-E1-Full", "other"), ("hidream_e1_1_bf16", "other"),
        ("SVD XT", "other"), ("PixArt a", "other"), ("Qwen", "qwen-image"),
        ("ZImageTurbo", "z-image"), ("Z-Image Base", "z-image"), ("Tongyi-MAI/Z-Image-Turbo", "z-image"),
        ("Qwen/Qwen-Image", "qwen-image"), ("qwen_image", "qwen-image"), ("Qwen-Image-2512", "qwen-image"),
        ("Qwen-Image-Edit-2511", "other"), ("Qwen-Image-Layered", "other"), ("Qwen 2", "other"),
        ("Qwen-Image-2.1", "other"), ("Z-Image-Omni-Base", "other"), ("Z-Image-Edit", "other"),
        ("Ernie", "ernie-image"), ("baidu/ERNIE-Image-Turbo", "ernie-image"), ("ernie_image", "ernie-image"),
        ("Krea 2", "krea-2"), ("krea/Krea-2-Turbo", "krea-2"), ("krea2_raw", "krea-2"), ("Krea-2-Edit", "other"),
        ("ERNIE-Image-Edit", "other"), ("ernie-3.0-base-zh", "other"),
        ("Chroma", "chroma"), ("Chroma1-HD", "chroma"), ("ChromaXL", "other"),
        ("Chroma1-Radiance", "other"), ("stable-diffusion-xl-v1-base/lora", "sdxl"),
        ("stable-diffusion-xl-v1-refiner", "other"), ("stable-video-diffusion", "other"), ("SDXL Lightning", "sdxl"),
        ("SDXL Turbo", "sdxl"), ("sd3.5_large", "sd3"), ("SD 3", "sd3"), ("sd_v2_768_v", "sd2"), ("SD 1.5 LCM", "sd1"),
        ("stable-diffusion-v1/lora", "sd1"), ("AltDiffusion", "altdiffusion"), ("Playground v2", "other"),
        ("Wan Video 1.3B t2v", "wan"), ("Wan Video 14B t2v", "wan"), ("Wan Video 14B i2v 480p", "other"),
        ("Wan Video 14B i2v 720p", "other"), ("Wan Video 2.2 TI2V-5B", "wan-5b"), ("Wan Video 2.2 I2V-A14B", "other"),
        ("Wan Video 2.2 T2V-A14B", "wan"), ("wan2.2_t2v_high_noise_14B_fp16", "wan"),
        ("wan22_14b", "wan"), ("wan22_14b_i2v", "other"), ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan-5b"),
        ("wan22_5b", "wan-5b"), ("Wan2.2-VACE-Fun-A14B", "other"), ("Wan2.2-Fun-5B-Control", "other"),
        ("wan2.2", "other"), ("Wan Video 2.5 T2V", "other"), ("Wan Video 2.5 I2V", "other"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan"), ("wan2.1_t2v_14B_fp16", "wan"), ("wan21", "wan"),
        ("Wan-AI/Wan2.1-I2V-14B-480P", "other"), ("Wan-AI/Wan2.1-VACE-14B", "other"), ("Wan2.1-Fun-Control", "other"),
        ("Wan2.1-FLF2V-14B", "other"), ("wan21_i2v", "other"), ("Wan-AI/Wan2.2-S2V-14B", "other"), ("obi-wan", "other"),
        ("Wan2.2-Animate-14B", "other"), ("swan-2.1", "other"), ("wan2.1/lora", "wan"),
        ("Anima", "anima"), ("anima", "anima"), ("circlestone-labs/Anima", "anima"), ("anima-preview/lora", "anima"),
        ("circlestone-labs/Anima-Base-v1.0-Diffusers", "anima"), ("anima_baseV10", "anima"), ("AnimateDiff", "other"),
        ("anima-preview3-base", "anima"), ("animagine-xl-3.1", "other"), ("animaPencilXL_v500", "other"),
        ("anima_pencil", "other"), ("nvidia/Cosmos-Predict2-2B-Text2Image", "other"),
        ("Lumina", "other"), ("Mochi", "other"), ("Cosmos", "other"),
    ],
)  # fmt: skip
def test_names_of_many_families(name: str, family: str) -> None:
    assert family_of_name(name) == family
