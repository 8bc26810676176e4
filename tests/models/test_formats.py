"""Every adapter format puts into effect what its own library computes; the files are written by that library.

``alpha`` is never the rank, so that no test passes without it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import convert_state_dict_to_kohya
from lycoris import LycorisNetwork, create_lycoris
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    inject_adapter_in_model,
)
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.formats.detect import Format
from audit.models.pair import ModelPair
from audit.models.tuning import tune
from testbed.resaved import read_kohya, write_gguf, write_kohya
from tests.conftest import KOHYA
from tests.models import nano

RANK, ALPHA = 4, 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def sd1(folder: Path) -> BaseModel:
    return nano.make("sd1", folder)


def randomised(module: torch.nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and "dora_scale" not in name and "magnitude" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * size)
        elif parameter.requires_grad:
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))


def assert_same_function(ours: Any, theirs: Any, base: Any, least: float = 1e-2) -> None:
    """The same prediction on noise, which differs from the base's."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    states = torch.randn(2, nano.TOKENS, base.config.cross_attention_dim, generator=generator)
    with torch.inference_mode():
        found, wanted, before = (unet(x, torch.tensor(300), states).sample for unet in (ours, theirs, base))
    assert (wanted - before).abs().max() >= least
    torch.testing.assert_close(found, wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())), rtol=1e-5)


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon-cp": {"algo": "locon", "use_tucker": True},
    "locon-rs": {"algo": "locon", "rs_lora": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "dora-on-input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha-cp": {"algo": "loha", "use_tucker": True},
    "doha": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-both": {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "lokr-cp": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "dokr": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "oft": {"algo": "diag-oft", "rescaled": True},
    "oft-constrained": {"algo": "diag-oft", "constraint": 0.01},
    "boft": {"algo": "boft", "rescaled": True},
    "ia3": {"algo": "ia3"},
    "glora": {"algo": "glora"},
    "full": {"algo": "full"},
    "norm": {"algo": "locon", "train_norm": True},
}


def lycoris_network(unet: Any, options: dict[str, Any]) -> Any:
    """LyCORIS over a UNet, on linear and convolution layers, applied and with random weights."""
    options = {"linear_dim": RANK, "linear_alpha": ALPHA, "conv_dim": RANK, "conv_alpha": ALPHA, **options}
    LycorisNetwork.apply_preset(
        {
            "enable_conv": True,
            "target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
            "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
        }
    )
    network = create_lycoris(unet, 1.0, **options)
    network.apply_to()
    randomised(network)
    return network


@pytest.mark.parametrize("name", list(LYCORIS))
def test_lycoris(sd1: BaseModel, tmp_path: Path, name: str) -> None:
    unet = copy.deepcopy(sd1.denoiser)
    network = lycoris_network(unet, dict(LYCORIS[name]))
    state = {key.replace("lycoris_", "lora_unet_", 1): t.detach().clone() for key, t in network.state_dict().items()}
    if name == "full":  # its own state dictionary is the difference
        state = {}
        for module in network.loras:
            for key, tensor in module.custom_state_dict().items():
                state[f"{module.lora_name.replace('lycoris_', 'lora_unet_', 1)}.{key}"] = tensor.detach().clone()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "f.safetensors")
    kinds = {key.rpartition(".")[2] for key in state}
    assert len({tuple(t.shape) for t in state.values() if t.ndim >= 2}) > 1, kinds
    checkpoint = open_checkpoint(tmp_path / "f.safetensors")
    assert checkpoint.format in (Format.lycoris, Format.lora_kohya)
    tuned = tune(sd1, checkpoint)
    assert tuned.unused == []
    assert_same_function(tuned.networks["unet"], unet, sd1.denoiser)


def test_lycoris_is_installed_in_the_version_that_is_read() -> None:
    assert hasattr(lycoris, "LycorisNetwork")


PEFT: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda modules: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, init_lora_weights=False),
    "rslora": lambda modules: LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=modules),
    "dora": lambda modules: LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=modules),
    "loha": lambda modules: LoHaConfig(r=RANK, alpha=RANK, target_modules=modules),
    "lokr": lambda modules: LoKrConfig(r=RANK, alpha=RANK, target_modules=modules),
    "oft": lambda modules: OFTConfig(r=0, oft_block_size=4, target_modules=modules),
    "boft": lambda modules: BOFTConfig(boft_block_size=4, target_modules=modules),
    "ia3": lambda modules: IA3Config(target_modules=modules, feedforward_modules=["ff.net.2"]),
}
LINEAR, CONVOLUTIONS = ["to_q", "to_v", "ff.net.2"], ["conv1", "proj_in", "conv_shortcut"]


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", ""])
@pytest.mark.parametrize("name", list(PEFT))
def test_peft(sd1: BaseModel, tmp_path: Path, name: str, prefix: str) -> None:
    modules = LINEAR + ([] if name in ("oft", "boft", "ia3") else CONVOLUTIONS)
    unet = copy.deepcopy(sd1.denoiser)
    config = PEFT[name](modules)
    inject_adapter_in_model(config, unet)
    randomised(unet, 0.1)
    state = {f"{prefix}{key}": tensor.clone() for key, tensor in get_peft_model_state_dict(unet).items()}
    if prefix == "unet.":  # diffusers puts the configuration into the header, PEFT beside the file
        claims = {
            f"unet.{key}": value for key, value in config.to_dict().items() if key in ("r", "lora_alpha", "use_rslora")
        }
        save_file(state, tmp_path / "adapter_model.safetensors", {"lora_adapter_metadata": json.dumps(claims)})
    else:
        config.save_pretrained(tmp_path)
        save_file(state, tmp_path / "adapter_model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "adapter_model.safetensors")
    assert checkpoint.format is Format.lora_peft
    tuned = tune(sd1, checkpoint)
    assert tuned.unused == []
    assert_same_function(tuned.networks["unet"], unet, sd1.denoiser)


def test_the_alpha_beside_a_file_is_part_of_its_identity(sd1: BaseModel, tmp_path: Path) -> None:
    unet = copy.deepcopy(sd1.denoiser)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR)
    inject_adapter_in_model(config, unet)
    randomised(unet, 0.1)
    state = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    without = open_checkpoint(tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    with_config = open_checkpoint(tmp_path / "adapter_model.safetensors")
    assert without.tensors_sha256 == with_config.tensors_sha256
    assert any("alpha is taken to be the rank" in warning for warning in tune(sd1, without).warnings)
    assert tune(sd1, with_config).warnings == []
    assert without.identity != with_config.identity
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        open_checkpoint(tmp_path / "adapter_model.safetensors")


def test_several_adapters_in_one_file(sd1: BaseModel, tmp_path: Path) -> None:
    unet = copy.deepcopy(sd1.denoiser)
    for name in ("first", "second"):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR, init_lora_weights=False)
        unet.add_adapter(config, adapter_name=name)
    state = {key: tensor.clone() for key, tensor in unet.state_dict().items() if "lora_" in key}
    save_file(state, tmp_path / "f.safetensors")
    checkpoint = open_checkpoint(tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"several adapters \(first, second\): choose one with --adapter"):
        tune(sd1, checkpoint)
    with pytest.raises(CheckpointError, match="no adapter 'third'"):
        tune(sd1, checkpoint, adapter="third")
    for name in ("first", "second"):
        unet.set_adapter(name)
        tuned = tune(sd1, checkpoint, adapter=name)
        assert tuned.unused == []
        assert_same_function(tuned.networks["unet"], unet, sd1.denoiser)


STRENGTHS = [
    (name, strength)
    for name in ("locon", "dora", "lokr", "oft", "boft", "ia3", "full", "norm", "glora")
    for strength in (0.0, 0.4, -1.0)
    if (name, strength) != ("boft", -1.0)  # butterflies of 2 I - R grow until rounding decides
]


@pytest.mark.parametrize(("name", "strength"), STRENGTHS)
def test_strength_is_lycoris_multiplier(sd1: BaseModel, tmp_path: Path, name: str, strength: float) -> None:
    unet = copy.deepcopy(sd1.denoiser)
    network = lycoris_network(unet, dict(LYCORIS[name]))
    state = {}
    for module in network.loras:
        for key, tensor in module.custom_state_dict().items() if name == "full" else module.state_dict().items():
            state[f"{module.lora_name.replace('lycoris_', 'lora_unet_', 1)}.{key}"] = tensor.detach().clone()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "f.safetensors")
    network.set_multiplier(strength)
    tuned = tune(sd1, open_checkpoint(tmp_path / "f.safetensors"), strength).networks["unet"]
    assert_same_function(tuned, unet, sd1.denoiser, least=1e-2 if strength else 0)


def test_old_attention_processors(sd1: BaseModel, tmp_path: Path) -> None:
    """diffusers of 2023: unet.down_blocks...attn1.processor.to_q_lora.down.weight; checked by today's diffusers."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, module in sd1.denoiser.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            parent, last = name.rsplit(".attn", 1)
            attention, _, layer = last.partition(".")
            stem = f"unet.{parent}.attn{attention}.processor.{layer.removesuffix('.0')}_lora"
            out, inputs = module.weight.shape
            state[f"{stem}.down.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.2
            state[f"{stem}.up.weight"] = torch.randn(out, RANK, generator=generator) * 0.2
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    checkpoint = open_checkpoint(tmp_path / "pytorch_lora_weights.safetensors")
    assert checkpoint.format is Format.lora_processor
    tuned = tune(sd1, checkpoint)
    assert tuned.unused == []
    pipeline = nano.sd1()
    pipeline.unet.load_state_dict(sd1.denoiser.state_dict())
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    assert_same_function(tuned.networks["unet"], pipeline.unet, sd1.denoiser)


def test_an_unprefixed_file_is_applied_where_diffusers_does_nothing(sd1: BaseModel, tmp_path: Path) -> None:
    unet = copy.deepcopy(sd1.denoiser)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR, init_lora_weights=False))
    state = get_peft_model_state_dict(unet)
    save_file(
        {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for k, t in state.items()},
        tmp_path / "f.safetensors",
    )
    tuned = tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    assert_same_function(tuned.networks["unet"], unet, sd1.denoiser)


def text_adapter(encoder: Any, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    encoder.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False, target_modules=["q_proj", "out_proj", "fc1"])
    )
    return get_peft_model_state_dict(encoder)


def encoded(encoder: Any) -> torch.Tensor:
    with torch.inference_mode():
        return encoder(torch.arange(nano.TOKENS)[None], output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_both_text_encoders_of_sdxl(folder: Path, tmp_path: Path, naming: str) -> None:
    base = nano.make("sdxl", folder)
    encoders = [copy.deepcopy(base.part(name)) for name in ("text_encoder", "text_encoder_2")]
    states = [text_adapter(encoder, number) for number, encoder in enumerate(encoders)]
    if naming == "diffusers":
        file = {
            f"text_encoder{'_2' * n}.{key}": tensor for n, state in enumerate(states) for key, tensor in state.items()
        }
    else:
        file = {}
        for number, state in enumerate(states):
            part = f"text_encoder{'_2' * number}"
            nested = ("text_model.", "")  # the converter adds it to the second encoder's names
            kohya = convert_state_dict_to_kohya(
                {f"{part}.{nested[number]}{key}": tensor for key, tensor in state.items()}
            )
            assert all(key.startswith(f"lora_te{number + 1}_text_model_") for key in kohya)
            file |= kohya
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    for name, theirs in zip(("text_encoder", "text_encoder_2"), encoders, strict=True):
        torch.testing.assert_close(encoded(tuned.networks[name]), encoded(theirs), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(encoded(theirs), encoded(base.part(name)), atol=1e-3)


FLUX_KOHYA = {
    "lora_unet_double_blocks_0_img_attn_qkv": (96, 32), "lora_unet_double_blocks_1_txt_attn_qkv": (96, 32),
    "lora_unet_double_blocks_0_img_attn_proj": (32, 32), "lora_unet_double_blocks_0_txt_mlp_0": (128, 32),
    "lora_unet_double_blocks_1_img_mod_lin": (192, 32),
    "lora_unet_single_blocks_1_linear2": (32, 160), "lora_unet_single_blocks_1_modulation_lin": (96, 32),
}  # fmt: skip


def flux_file(stems: dict[str, tuple[int, int]], down: str, up: str, alpha: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    state = {}
    for stem, (out, inputs) in stems.items():
        state[f"{stem}.{down}.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.3
        state[f"{stem}.{up}.weight"] = torch.randn(out, RANK, generator=generator) * 0.3
        if alpha:
            state[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return state


FLUX_FILES: dict[str, tuple[dict[str, torch.Tensor], Format]] = {
    "kohya": (flux_file(FLUX_KOHYA, "lora_down", "lora_up", alpha=True), Format.lora_kohya),
    "ai-toolkit": (
        flux_file(
            {
                "transformer.transformer_blocks.0.attn.to_q": (32, 32),
                "transformer.transformer_blocks.1.attn.add_k_proj": (32, 32),
                "transformer.transformer_blocks.1.ff.net.0.proj": (128, 32),
                "transformer.single_transformer_blocks.0.proj_mlp": (128, 32),
                "transformer.single_transformer_blocks.1.proj_out": (32, 160),
            },
            "lora_A", "lora_B", alpha=False,
        ),
        Format.lora_peft,
    ),
    "xlabs": (
        flux_file(
            {
                "double_blocks.0.processor.qkv_lora1": (96, 32), "double_blocks.1.processor.qkv_lora2": (96, 32),
                "double_blocks.0.processor.proj_lora1": (32, 32), "double_blocks.0.processor.proj_lora2": (32, 32),
                "single_blocks.0.processor.qkv_lora": (96, 32), "single_blocks.1.processor.proj_lora": (32, 160),
            },
            "down", "up", alpha=False,
        ),
        Format.lora_xlabs,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FLUX_FILES))
def test_flux_files_are_what_diffusers_makes_of_them(folder: Path, tmp_path: Path, name: str) -> None:
    base = nano.make("flux", folder)
    state, kind = FLUX_FILES[name]
    save_file(state, tmp_path / "f.safetensors")
    checkpoint = open_checkpoint(tmp_path / "f.safetensors")
    assert checkpoint.format is kind
    tuned = tune(base, checkpoint)
    assert tuned.unused == []
    pipeline = FluxPipeline.from_pretrained(folder / "flux", dtype=torch.float32)
    pipeline.load_lora_weights({key: tensor.clone() for key, tensor in state.items()})
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours, theirs = tuned.networks["transformer"].state_dict(), pipeline.transformer.state_dict()
    before = base.denoiser.state_dict()
    changed = 0
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=1e-5, msg=key)
        changed += not torch.equal(tensor, before[key])
    assert changed >= len(state) // 3


def test_a_lokr_of_flux_is_applied_where_diffusers_does_nothing(folder: Path, tmp_path: Path) -> None:
    """Rows of a fused qkv: kron(w1, w2) over all three, then split."""
    base = nano.make("flux", folder)
    generator = torch.Generator().manual_seed(5)
    w1, w2 = torch.randn(4, 4, generator=generator), torch.randn(24, 8, generator=generator) * 0.1
    stem = "lycoris_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "f.safetensors"
    )
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    delta = torch.kron(w1, w2).split(32)
    for name, rows in zip(("to_q", "to_k", "to_v"), delta, strict=True):
        key = f"transformer_blocks.0.attn.{name}.weight"
        change = tuned.networks["transformer"].state_dict()[key] - base.denoiser.state_dict()[key]
        torch.testing.assert_close(change, rows, atol=1e-5, rtol=1e-5)


def test_rows_of_a_fused_layer_of_flux(folder: Path, tmp_path: Path) -> None:
    """linear1 of a single block: q, k, v and the MLP; diffusers' converter knows the real size of it only."""
    base = nano.make("flux", folder)
    state = flux_file({"lora_unet_single_blocks_0_linear1": (224, 32)}, "lora_down", "lora_up", alpha=True)
    save_file(state, tmp_path / "f.safetensors")
    tuned = tune(base, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    down, up = (state[f"lora_unet_single_blocks_0_linear1.lora_{side}.weight"] for side in ("down", "up"))
    rows = (up @ down * ALPHA / RANK).split((32, 32, 32, 128))
    for name, delta in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), rows, strict=True):
        key = f"single_transformer_blocks.0.{name}.weight"
        change = tuned.networks["transformer"].state_dict()[key] - base.denoiser.state_dict()[key]
        torch.testing.assert_close(change, delta, atol=1e-5, rtol=1e-5)


def test_pivotal_tuning_brings_its_tokens(sd1: BaseModel, tmp_path: Path) -> None:
    """kohya's bundle_emb: diffusers' textual inversion with the same vectors encodes captions alike."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(6))
    lora = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(RANK, 32, 1, 1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.randn(32, RANK, 1, 1),
    }
    save_file({"bundle_emb.sksdog.string_to_param.*": vectors, **lora}, tmp_path / "f.safetensors")
    pair = ModelPair(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert pair.tokens == ["sksdog"]
    pipeline = nano.sd1()
    pipeline.text_encoder.load_state_dict(sd1.part("text_encoder").state_dict())
    pipeline.load_textual_inversion({"sksdog": vectors}, token="sksdog")
    wanted = pipeline.encode_prompt(["a sksdog"], "cpu", 1, False)[0]
    torch.testing.assert_close(pair.encode(["a sksdog"], tuned=True).states, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pair.encode(["a sksdog"], tuned=False).states, wanted, atol=1e-3)
    assert len(sd1.pipeline.tokenizer) == len(nano.clip_tokenizer())  # the base's own is left alone
    assert sd1.part("text_encoder").get_input_embeddings().weight.shape[0] == len(nano.clip_tokenizer())


def test_embeddings_of_both_sdxl_encoders(folder: Path, tmp_path: Path) -> None:
    base = nano.make("sdxl", folder)
    vectors = {"clip_l": torch.randn(3, 32), "clip_g": torch.randn(3, 32)}
    save_file(vectors, tmp_path / "mytoken.safetensors")
    checkpoint = open_checkpoint(tmp_path / "mytoken.safetensors")
    assert checkpoint.format is Format.embedding
    pair = ModelPair(base, checkpoint)
    assert pair.tokens == ["mytoken"]
    tuned, before = (pair.encode(["a mytoken"], tuned=side) for side in (True, False))
    assert not torch.allclose(tuned.states[..., :32], before.states[..., :32], atol=1e-3)
    assert not torch.allclose(tuned.states[..., 32:], before.states[..., 32:], atol=1e-3)


def test_an_embedding_of_another_width_is_refused(sd1: BaseModel, tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="does not fit width 32"):
        tune(sd1, open_checkpoint(tmp_path / "t.safetensors"))


def test_weights_of_float8_with_scales(sd1: BaseModel, tmp_path: Path) -> None:
    """ComfyUI's scaled float8; what only rounding changed counts as the base's own."""
    state, wanted = {}, {}
    for name, tensor in sd1.denoiser.state_dict().items():
        value = tensor + 0.1 if "attn2.to_k" in name else tensor
        if name.endswith(".weight") and value.ndim >= 2:
            scale = value.abs().max() / 400
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix(".weight") + ".scale_weight"] = scale.reshape(())
            wanted[name] = state[name].float() * scale
        else:
            state[name] = value
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors")
    tuned = tune(sd1, open_checkpoint(tmp_path / "f.safetensors"))
    assert tuned.unused == []
    found = tuned.networks["unet"].state_dict()
    for name, before in sd1.denoiser.state_dict().items():
        if "attn2.to_k" in name:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(found[name], before), name


def test_a_gguf_adapter_is_put_into_effect_as_its_safetensors_is(base: BaseModel, tmp_path: Path) -> None:
    factors = read_kohya(KOHYA)
    one = tune(base, open_checkpoint(write_kohya(factors, tmp_path / "a.safetensors")))
    other = tune(base, open_checkpoint(write_gguf(factors, tmp_path / "a.gguf", "F16")))
    assert other.unused == []
    wanted, found = (tuned.networks["unet"].state_dict() for tuned in (one, other))
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in wanted.items()) < 1e-4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_gguf_by_its_own_library(folder: Path, tmp_path: Path, kind: str) -> None:
    """A Flux transformer in the original names, as GGUF files hold it; written and read by the gguf package."""
    import gguf

    base = nano.make("flux", folder)
    state = flux_original(base)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "flux")
    quantisation = gguf.GGMLQuantizationType[kind]
    wanted = {}
    for name, tensor in state.items():
        value = tensor + 0.2 if "img_attn.proj.weight" in name else tensor
        fits = value.ndim == 2 and value.shape[1] % 32 == 0
        use = quantisation if fits else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(value.contiguous().numpy(), use)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(packed, use).copy())
        writer.add_tensor(name, packed, raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "f.gguf")
    assert checkpoint.format is Format.ldm
    tuned = tune(base, checkpoint)
    assert tuned.unused == []
    assert {change.module.rpartition(".attn.")[2] for change in tuned.changes} == {"to_out.0"}
    for layer in range(2):
        found = tuned.networks["transformer"].state_dict()[f"transformer_blocks.{layer}.attn.to_out.0.weight"]
        torch.testing.assert_close(found, wanted[f"double_blocks.{layer}.img_attn.proj.weight"], atol=1e-6, rtol=0)


def flux_original(base: BaseModel) -> dict[str, torch.Tensor]:
    """The transformer under Black Forest Labs' names, by the correspondence under test."""
    from audit.models.families.keys import originals_of
    from audit.models.formats.parts import gathered

    state = {}
    for name, target in originals_of(base.denoiser):
        if "processor" in name:
            continue
        for parameter in ("weight", "bias"):
            value = gathered(base.denoiser, target, parameter)
            if value is not None:
                state[f"{name}.{'scale' if name.endswith('_norm') else parameter}"] = value
    return state


def test_the_shipped_files_have_every_tensor_used() -> None:
    from audit.models.base import load_base, locate_base
    from tests.conftest import BASE, KOHYA
    from tests.conftest import PEFT as SHIPPED

    base = load_base(locate_base(str(BASE)))
    for path in (KOHYA, SHIPPED):
        tuned = tune(base, open_checkpoint(path))
        assert tuned.unused == []
        assert len(tuned.changes) == sum("lora_down" in name or "lora_A" in name for name in load_file(path))
