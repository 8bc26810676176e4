"""Files from strangers: whatever a header says that passes the checks, a file loads or raises one of our errors.

Memory is bounded: no factors are multiplied before their product is known to have the size of a weight of the base.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from audit.errors import AuditError, CheckpointError
from audit.models.base import BaseModel, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.formats.gguf_header import parse_gguf
from audit.models.formats.headers import read_any_header
from audit.models.formats.names import _ALGORITHMS, Algorithm, read_names
from audit.models.formats.scaling import identifying, read_scaling
from audit.models.inspect import as_json, inspect
from audit.models.safetensors_header import TensorInfo
from audit.models.sketches.sketch import sketch_of
from audit.models.tuning import tune
from tests.conftest import BASE
from tests.models import nano

CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 1 << 30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return nano.make("sd1", tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    """Families with other layouts."""
    return {
        name: nano.make(name, tmp_path_factory.mktemp("bases"))
        for name in ("flux", "klein", "z-image", "qwen", "ernie", "krea2", "wan", "anima")
    }


@pytest.fixture
def bounded() -> Iterator[None]:
    """Not a gigabyte more of address space than now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def load(base: BaseModel, path: Path) -> str:
    """ "loads", or the message of our error; any other exception is a failure, in a sketch too."""
    assert json.dumps(as_json(inspect(path)))
    try:
        checkpoint = open_checkpoint(path)
        with suppress(ValueError):  # what crawls expect
            sketch_of(checkpoint.files.values())
        tune(base, checkpoint)
    except AuditError as error:
        message = str(error)
    else:
        return "loads"
    assert str(path) in message
    return message


MODULES = (
    "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_conv_in", "lora_unet_nowhere", "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te3_x",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", "base_model.model.conv_norm_out", "",
    "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_final_layer_adaLN_modulation_1", "bundle_emb.x",
    "diffusion_model.single_blocks.0.linear1", "transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "diffusion_model.layers.0.attention.qkv", "lora_unet_layers_1_attention_to_out_0",
    "diffusion_model.noise_refiner.0.adaLN_modulation.0", "transformer.transformer_blocks.0.img_mlp.net.0.proj",
    "diffusion_model.transformer_blocks.1.attn.add_q_proj", "diffusion_model.blocks.0.self_attn.q",
    "lora_unet_blocks_1_ffn_0", "transformer.blocks.0.attn2.to_out.0", "diffusion_model.patch_embedding",
    "diffusion_model.blocks.0.attn.wq", "lora_unet_txtfusion_projector", "transformer.transformer_blocks.1.ff.gate",
    "diffusion_model.layers.0.self_attention.to_q", "lora_unet_layers_1_mlp_gate_proj", "text_conditioner.out_proj",
    "lora_unet_blocks_0_adaln_modulation_mlp_1", "diffusion_model.llm_adapter.blocks.0.mlp.0", "net.x_embedder.proj.1",
    "lora_unet_llm_adapter_blocks_1_cross_attn_k_proj", "lora_te_layers_0_self_attn_q_proj", "llm_adapter.",
)  # fmt: skip
SUFFIXES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "lora_A.weight", "lora_B.weight",
    "lora_A.x.weight", "lora_B.y.weight", "lora_B.bias", "lora_magnitude_vector", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "lokr_t2", "oft_blocks", "rescale", "diff", "diff_b", "w_norm", "b_norm", "on_input", "weight", "a1.weight",
    "a2.weight", "b1.weight", "b2.weight", "bm.weight", "oft_R.weight", "boft_R", "boft_s", "ia3_l",
    "processor.to_q_lora.down.weight", "processor.qkv_lora1.up.weight", "clip_l", "string_to_param.*", "emb_params",
)  # fmt: skip
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float64)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 96])
SHAPES = st.lists(SIZES, max_size=5).filter(lambda shape: math.prod(shape) <= 1 << 18)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A file of one to three modules, with tensors that belong together and any others, of any shape."""
    tensors = {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3)):
        whole = draw(st.sampled_from(SETS))
        for suffix in [*whole, *draw(st.lists(st.sampled_from(SUFFIXES), max_size=2))]:
            shape = draw(SHAPES)
            kind = draw(st.sampled_from(KINDS))
            value = draw(st.sampled_from([0.0, 0.5, -1.0, float("nan"), float("inf"), 1e30]))
            name = f"{module}.{suffix}" if module else suffix
            tensors[name] = (
                torch.full(shape, value, dtype=torch.float32).nan_to_num(0 if kind is torch.int8 else 7).to(kind)
            )
    return tensors


SETS = (
    ("lora_down.weight", "lora_up.weight"), ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"),
    ("lora_down.weight", "lora_up.weight", "lora_mid.weight"), ("lora_A.weight", "lora_B.weight"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2"), ("oft_blocks", "rescale", "alpha"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ("oft_blocks",),
    ("diff",), ("diff", "diff_b"), ("w_norm", "b_norm"), ("on_input", "weight"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), ("oft_R.weight",), ("boft_R", "boft_s"), ("ia3_l",),
    ("q_layer.weight", "p_layer.weight", "lambda_layer"), ("oft_blocks.0", "oft_blocks.1", "alpha"), ("diff_b",),
    ("q_layer.weight", "p_layer.weight", "lambda_layer", "base_q", "base_p", "base_lambda"),
    ("oft_R.weight", "oft_R.scaled_oft"), ("lora_down.weight", "lora_up.weight", "diff_b"),
)  # fmt: skip


@pytest.mark.parametrize("module", ["mid_block_attentions_0_proj_in", "of_nobody"])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_adapter_without_a_rank_is_refused(
    base: BaseModel, tmp_path: Path, module: str, alpha: float | None
) -> None:
    """Whether the base has its module or not: alpha / rank is no number."""
    weight = base.denoiser.get_submodule("mid_block.attentions.0.proj_in").weight
    stem, tensors = f"lora_unet_{module}", dict[str, torch.Tensor]()
    tensors[f"{stem}.lora_down.weight"] = torch.ones(0, *weight.shape[1:])
    tensors[f"{stem}.lora_up.weight"] = torch.ones(weight.shape[0], 0, *[1] * (weight.ndim - 2))
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "none.safetensors")
    assert "it has no rank" in load(base, tmp_path / "none.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=adapters(),
    family=st.sampled_from(["sd1", "flux", "klein", "z-image", "qwen", "ernie", "krea2", "wan", "anima"]),
)
def test_any_adapter_loads_or_raises_our_error(
    base: BaseModel,
    others: dict[str, BaseModel],
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, torch.Tensor],
    family: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file(tensors, path)
    load(others.get(family, base), path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["conv_in.weight", "mid_block.attentions.0.proj_in.weight", "time_embedding.linear_1.bias"]),
    shape=SHAPES,
    kind=st.sampled_from(KINDS),
    take=st.booleans(),
)
def test_any_full_weights_load_or_raise_our_error(
    base: BaseModel,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    shape: list[int],
    kind: torch.dtype,
    take: bool,
) -> None:
    state = {key: tensor.contiguous() for key, tensor in base.denoiser.state_dict().items()}
    state[name] = torch.ones(shape).to(kind)
    if take:
        del state["conv_norm_out.weight"]
    path = tmp_path_factory.getbasetemp() / "full.safetensors"
    save_file(state, path)
    load(base, path)


BOMBS: dict[str, dict[str, tuple[int, ...]]] = {
    # some hundred kilobytes each, whose products have terabytes
    "lora": {"lora_down.weight": (1, 60_000), "lora_up.weight": (60_000, 1)},
    "loha": {
        "hada_w1_a": (40_000, 1), "hada_w1_b": (1, 40_000), "hada_w2_a": (40_000, 1), "hada_w2_b": (1, 40_000),
    },
    "lokr": {"lokr_w1": (200, 200), "lokr_w2": (200, 200)},
    "lokr-low-rank": {"lokr_w1_a": (40_000, 1), "lokr_w1_b": (1, 40_000), "lokr_w2": (2, 2)},
    "t-lora": {"q_layer.weight": (1, 60_000), "p_layer.weight": (60_000, 1), "lambda_layer": (1, 1)},
    "oft-rows": {"oft_blocks.0": (1, 3000, 3000), "alpha": ()},
    "tucker": {
        "lora_down.weight": (200, 30_000, 1, 1), "lora_up.weight": (30_000, 200, 1, 1),
        "lora_mid.weight": (200, 200, 1, 1),
    },
    "glora": {"a1.weight": (60_000, 1), "a2.weight": (1, 60_000), "b1.weight": (32, 1), "b2.weight": (1, 32)},
    "oft": {"oft_blocks": (1, 3000, 3000)},
    "boft": {"oft_blocks": (60_000, 16, 2, 2)},
    "peft-oft": {"oft_R.weight": (1, 8_000_000)},
    "peft-boft": {"boft_R": (100_000, 8, 4, 4), "boft_s": (32, 1)},
    "ia3": {"ia3_l": (1, 9_000_000)},
    "dora": {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "dora_scale": (3_000_000, 1)},
}  # fmt: skip


@pytest.mark.parametrize("name", list(BOMBS))
def test_products_that_would_fill_memory_are_refused_unmultiplied(
    base: BaseModel, tmp_path: Path, name: str, bounded: None
) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.{key}": torch.ones(shape) for key, shape in BOMBS[name].items()}, tmp_path / "f.safetensors")
    assert "not fit" in load(base, tmp_path / "f.safetensors")


def test_unplaced_factors_are_weighed_unmultiplied(base: BaseModel, tmp_path: Path, bounded: None) -> None:
    many = {"lora_down.weight": (60_000, 1), "lora_up.weight": (1, 60_000)}
    for shapes in (BOMBS["lora"], many):
        save_file({f"lora_unet_nowhere.{k}": torch.ones(s) for k, s in shapes.items()}, tmp_path / "f.safetensors")
        assert "no place" in load(base, tmp_path / "f.safetensors")


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_the_corpus_of_malformed_files(base: BaseModel, path: Path, bounded: None) -> None:
    """tests/models/corpus: every file is refused, in words that name it and the mend."""
    message = load(base, path)
    assert message != "loads"
    expected = json.loads((CORPUS.parent / "corpus.json").read_text())
    assert expected[path.name] in message


def test_the_corpus_is_complete() -> None:
    assert {path.name for path in CORPUS.glob("*")} == set(json.loads((CORPUS.parent / "corpus.json").read_text()))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=60), st.lists(st.integers(0, 9), max_size=5).map(tuple), max_size=8))
def test_any_names_are_sorted_without_loss(shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor is in a group, an embedding, lost, a marker, unknown, or another adapter's."""
    names = read_names({name: TensorInfo("F32", shape, 0, 0) for name, shape in shapes.items()})
    placed = [tensor for group in names.groups for tensor in group.tensors.values()]
    placed += [one.tensor for one in names.embeddings] + names.unknown + names.lost + names.markers
    assert set(names.strange) <= set(names.unknown)
    assert len(placed) == len(set(placed))
    if len(names.adapters) < 2:
        assert set(placed) == set(shapes)


CLAIMED = st.sampled_from(["unet.r", "unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "x"])
VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner) | st.dictionaries(CLAIMED, inner),
    max_leaves=9,
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | VALUES.map(json.dumps))
@example('{"unet.lora_alpha": Infinity}')
@example('{"unet.lora_alpha": NaN}')
@example('{"unet.lora_alpha": 1, "unet.eps": NaN, "unet.num_cayley_neumann_terms": Infinity}')
@example('{"unet.lora_alpha": 1, "unet.eps": "nan"}')
@example('{"unet.lora_alpha": 1' + "0" * 400 + "}")
@example('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"x": 1e999}}')
def test_any_claim_of_an_alpha_is_read_or_ignored(text: str) -> None:
    metadata = {"lora_adapter_metadata": text}
    for part, scaling in read_scaling(metadata).items():
        assert part == "denoiser"
        assert all(math.isfinite(alpha) for alpha in (scaling.alpha, *scaling.patterns.values()))
    assert json.loads(json.dumps(identifying(metadata), allow_nan=False)) is not None


def test_every_algorithm_is_among_the_fuzzed_files() -> None:
    found = {
        group.algorithm
        for whole in SETS
        for group in read_names({f"lora_unet_x.{s}": TensorInfo("F32", (1, 1, 1), 0, 0) for s in whole}).groups
    }
    assert found | {Algorithm.boft} == {algorithm for algorithm, _, _ in _ALGORITHMS} | {Algorithm.boft}


def write_corpus() -> None:
    """What made tests/models/corpus: `python -c "from tests.models.test_hostile import write_corpus as w; w()"`."""
    from safetensors.torch import save

    def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    stem = "lora_unet_mid_block_attentions_0_proj_in"

    def lora(down: tuple[int, ...], up: tuple[int, ...], module: str = stem, **alpha: torch.Tensor) -> bytes:
        tensors = {"lora_down.weight": torch.ones(down), "lora_up.weight": torch.ones(up), **alpha}
        return save({f"{module}.{name}": tensor for name, tensor in tensors.items()})

    fits = (2, 32, 1, 1), (32, 2, 1, 1)
    down = {"dtype": "F32", "shape": [2, 32, 1, 1], "data_offsets": [0, 256]}
    over, beyond = {**down, "data_offsets": [128, 384]}, {**down, "data_offsets": [0, 1 << 50]}
    texts = "model.layers.0.self_attn.q_proj.weight"

    def of_family(module: str, rows: int, columns: int, family: str) -> tuple[bytes, str]:
        return lora((1, columns), (rows, 1), module), f"of family {family}"

    spelled = "unet.mid_block.attentions.0.proj_in"
    both = {f"{stem}.lora_down.weight": torch.ones(fits[0]), f"{stem}.lora_up.weight": torch.ones(fits[1])}
    claimed = {"dtype": "F32", "shape": [1 << 40, 1 << 22], "data_offsets": [0, 256]}
    files: dict[str, tuple[bytes, str]] = {
        "empty.safetensors": (b"", "empty or truncated"),
        "pickle.safetensors": (b"\x80\x04\x95" + b"\x00" * 40, "Python pickle"),
        "zip.safetensors": (b"PK\x03\x04" + b"\x00" * 40, "zip archive"),
        "login-page.safetensors": (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        "lfs-pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        "huge-header.safetensors": (raw(b"{}", length=1 << 40), "made to exhaust memory"),
        "header-beyond-the-end.safetensors": (raw(b"{}", length=500), "ends within its header"),
        "not-json.safetensors": (raw(b"\xff\xfe not json"), "damaged safetensors header"),
        "deep-json.safetensors": (raw(b'{"a":' * 20_000), "damaged safetensors header"),
        "twice-the-same-name.safetensors": (raw(b'{"a":1,"a":1}'), "twice"),
        "overlapping.safetensors": (
            raw({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": over}, b"\0" * 384), "overlaps"
        ),
        "out-of-range.safetensors": (raw({f"{stem}.lora_down.weight": beyond}), "impossible"),
        "negative-shape.safetensors": (raw({"a": {**down, "shape": [-2, -32, 1, 1]}}, b"\0" * 256), "impossible"),
        "truncated.safetensors": (raw({f"{stem}.lora_down.weight": down}, b"\0" * 100), "truncated"),
        "bytes-left-over.safetensors": (raw({f"{stem}.lora_down.weight": down}, b"\0" * 300), "no tensor declares"),
        "metadata-of-numbers.safetensors": (
            raw({"__metadata__": {"a": 1}, "a": down}, b"\0" * 256), "object of strings"
        ),
        "half-a-lora.safetensors": (raw({f"{stem}.lora_down.weight": down}, b"\0" * 256), "no place"),
        "path-in-a-name.safetensors": (lora((2, 2), (2, 2), module="../../etc/passwd"), "no place"),
        "other-family.safetensors": (lora((2, 640, 1, 1), (640, 2, 1, 1)), "does not fit"),
        "factors-of-other-ranks.safetensors": (lora((2, 32, 1, 1), (32, 3, 1, 1)), "does not fit"),
        "alpha-of-many-numbers.safetensors": (lora(*fits, alpha=torch.ones(7)), "not that of one number"),
        "alpha-not-finite.safetensors": (lora(*fits, alpha=torch.tensor(float("inf"))), "alpha is not finite"),
        "scalar-factors.safetensors": (lora((), ()), "does not fit"),
        "empty-factors.safetensors": (lora((0, 32), (0, 0)), "does not fit"),
        "kronecker-of-scalars.safetensors": (
            save({f"{stem}.lokr_w1": torch.tensor(1.0), f"{stem}.lokr_w2": torch.tensor(1.0)}), "does not fit"
        ),
        "flux2-on-another-base.safetensors": (
            lora((2, 3072), (27648, 2), module="lora_unet_single_blocks_0_linear1"), "of family flux2-klein"
        ),
        "qwen-on-another-base.safetensors": (
            lora((2, 3072), (12288, 2), module="lora_unet_transformer_blocks_0_img_mlp_net_0_proj"),
            "of family qwen-image",
        ),
        "wan-on-another-base.safetensors": (
            lora((2, 5120), (5120, 2), module="lora_unet_blocks_0_self_attn_q"), "of family wan"
        ),
        "flux2-dev-on-another-base.safetensors": of_family(
            "lora_unet_double_blocks_7_txt_attn_proj", 6144, 6144, "flux2"
        ),
        "z-image-on-another-base.safetensors": of_family(
            "diffusion_model.layers.29.attention.out", 3840, 3840, "z-image"
        ),
        "ernie-on-another-base.safetensors": of_family(
            "diffusion_model.layers.0.self_attention.to_q", 4096, 4096, "ernie-image"
        ),
        "krea-2-on-another-base.safetensors": of_family("lora_unet_blocks_0_attn_wq", 6144, 6144, "krea-2"),
        "anima-on-another-base.safetensors": of_family("lora_unet_blocks_0_cross_attn_k_proj", 2048, 1024, "anima"),
        "animas-conditioner-on-another-base.safetensors": of_family(
            "diffusion_model.llm_adapter.blocks.0.mlp.0", 4096, 1024, "anima"
        ),
        "half-a-pair-of-animas-conditioner.safetensors": (
            save({"text_conditioner.blocks.0.mlp.2.lora_B.weight": torch.ones(1024, 2)}), "of family anima"
        ),
        "alpha-no-number.safetensors": (lora(*fits, alpha=torch.tensor(float("nan"))), "alpha is not finite"),
        "shape-of-petabytes.safetensors": (raw({f"{stem}.lora_down.weight": claimed}, b"\0" * 256), "size of tensor"),
        "one-module-in-two-spellings.safetensors": (
            save(both | {f"{spelled}.lora_{'AB'[n]}.weight": torch.ones(shape) for n, shape in enumerate(fits)}),
            "named twice",
        ),
        "one-module-with-two-prefixes.safetensors": (
            save({f"{prefix}.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"
                  for prefix in ("diffusion_model", "model.diffusion_model")}), "of no known format",
        ),
        "parameter-of-a-parameter.safetensors": (
            save({f"model.diffusion_model.out.2.{name}": torch.ones(4) for name in ("bias", "weight.absmax")}),
            "of no known format",
        ),
        "unknown-algorithm.safetensors": (save({f"{stem}.hra_u": torch.ones(4, 4)}), "neither an adapter"),
        "text-model.safetensors": (save({texts: torch.ones(4, 4)}), "neither an adapter"),
        "gguf-counts.gguf": (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1 << 60), "is not read"),
        "gguf-truncated.gguf": (b"GGUF\x03\x00", "ends within"),
        "gguf-garbage.gguf": (struct.pack("<4sIQQ", b"GGUF", 3, 4, 4) + b"\xff" * 200, "damaged GGUF"),
    }  # fmt: skip
    CORPUS.mkdir(exist_ok=True)
    for name, (content, _) in files.items():
        (CORPUS / name).write_bytes(content)
    wanted = {name: words for name, (_, words) in sorted(files.items())}
    (CORPUS.parent / "corpus.json").write_text(json.dumps(wanted, indent=2) + "\n")


def gguf(*values: bytes, fields: int = 1, tensors: int = 1) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields) + b"".join(values)


def gguf_text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def nothing_of(kind: int, count: int) -> bytes:
    return gguf_text(b"a") + struct.pack("<IIQ", 9, kind, count)


@pytest.mark.parametrize(
    "content",
    [
        gguf(nothing_of(4, 1 << 40)), gguf(nothing_of(8, 1 << 40)), gguf(nothing_of(9, 1 << 40)),
        gguf(nothing_of(0, 199_999)), gguf(nothing_of(8, 199_999)), gguf(gguf_text(b"a", 1 << 62)),
        gguf(gguf_text(b"a") + struct.pack("<IQ", 8, 1 << 50)), gguf(gguf_text(b"a") + struct.pack("<I", 99)),
        gguf(gguf_text(b"t") + struct.pack("<I", 1 << 31), fields=0), gguf(fields=10_000), gguf(fields=0, tensors=9999),
        gguf(gguf_text(b"t") + struct.pack("<IQQQQIQ", 4, *[1 << 62] * 4, 0, 0), fields=0),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_gguf_file_of_a_hundred_bytes_takes_neither_memory_nor_time(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert len(content) < 200
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(CheckpointError, match=r"a\.gguf"):
            read_any_header(path)
        with path.open("rb") as file, pytest.raises(CheckpointError, match=r"a\.gguf"):
            parse_gguf(str(path), file)  # what the child does
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 1


def test_a_gguf_file_with_fields_of_every_kind_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_uint32("u", 1)
    writer.add_string("s", "text")
    writer.add_bool("b", True)
    writer.add_float64("f", 0.5)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "bc"])
    writer.add_tensor("x.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_any_header(tmp_path / "a.gguf").tensors["x.weight"].shape == (4, 32)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("unet/config.json", "layers_per_block", 10_000_000, "layers_per_block is 1e"),
        ("unet/config.json", "block_out_channels", [32, 10**9], "block_out_channels is 1e"),
        ("unet/config.json", "down_block_types", ["DownBlock2D"] * 2000, "has 2000 entries"),
        ("vae/config.json", "layers_per_block", 10_000_000, "layers_per_block is 1e"),
        ("text_encoder/config.json", "num_hidden_layers", 10**7, "num_hidden_layers is 1e"),
        ("text_encoder/config.json", "vocab_size", 10**12, "vocab_size is 1e"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9, "num_train_timesteps is 1e"),
        ("scheduler/scheduler_config.json", "anything", [[{"a": 10**12}]], "a is 1e"),
    ],
)
def test_a_base_whose_configuration_would_fill_memory_is_refused_in_words(
    tmp_path: Path, part: str, name: str, value: object, said: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = json.loads((base / part).read_text())
    (base / part).write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match=f"config.json is refused: .*{said}"):
        locate_base(str(base))
