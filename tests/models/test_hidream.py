"""HiDream-I1: what is missing or another model is refused in words; patches, schedules, encoders, and an audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift
from safetensors.torch import save_file

from audit.config import Compile
from audit.errors import CheckpointError, ConfigError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.families.hidream import patches_of
from audit.models.families.registry import FAMILIES
from audit.models.pair import ModelPair
from tests.models import nano
from tests.models.files import audited, configured, lora

FAMILY = FAMILIES["hidream"]
PARTS = ("text_encoder_4", "tokenizer_4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hidream")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return nano.make("hidream", folder)


def without(folder: Path, target: Path, listed: bool, parts: tuple[str, ...] = PARTS) -> Path:
    """A copy of a base model that lacks ``parts``, which its index names or not."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*parts))
    if not listed:
        index = json.loads((target / "model_index.json").read_text())
        (target / "model_index.json").write_text(json.dumps(index | {part: [None, None] for part in parts}))
    return target


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.usefixtures("base")
def test_a_base_without_llama_is_refused_with_what_mends_it(folder: Path, tmp_path: Path, listed: bool) -> None:
    """As the published repositories are, whose index names it."""
    with pytest.raises(CheckpointError) as caught:
        locate_base(str(without(folder / "hidream", tmp_path / "m", listed)))
    said = str(caught.value)
    assert "has no text_encoder_4 and no tokenizer_4" in said
    assert "LlamaForCausalLM" in said
    assert "save_pretrained()" in said
    with pytest.raises(CheckpointError, match="has no tokenizer_4: HiDream-I1 is published without Llama"):
        locate_base(str(without(folder / "hidream", tmp_path / "n", listed, ("tokenizer_4",))))


@pytest.mark.parametrize("entry", [5, {}, [], "LlamaForCausalLM", None])
@pytest.mark.usefixtures("base")
def test_an_index_that_says_something_else_of_llama_is_refused(folder: Path, tmp_path: Path, entry: Any) -> None:
    copied = without(folder / "hidream", tmp_path / "m", listed=True, parts=())
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"text_encoder_4": entry}))
    with pytest.raises(CheckpointError, match="HiDream"):
        load_base(locate_base(str(copied)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"llama_layers": []}, "its transformer reads 0 layers, up to number -1"),
        ({"num_routed_experts": 200_000}, "num_routed_experts is 200000, at most 1000 is read"),
        ({"llama_layers": [[0], [1], [2], [2]]}, "is not configured as a HiDreamImagePipeline"),
    ],
)
@pytest.mark.usefixtures("base")
def test_a_configuration_of_no_real_model_is_refused_in_words(
    folder: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    copied = without(folder / "hidream", tmp_path / "m", listed=True, parts=())
    file = copied / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CheckpointError, match=said):
        load_base(locate_base(str(copied)))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("HiDream-E1-Full", {}, "is HiDream-E1, which edits pictures: give HiDream-I1"),
        ("mine", {"max_resolution": (96, 192)}, "is HiDream-E1, which edits pictures: give HiDream-I1"),
        ("mine", {"in_channels": 8}, "takes 8 channels in patches of 2, its latents have 4"),
        ("mine", {"llama_layers": [0, 1, 2, 4]}, "reads 4 layers, up to number 4, .* Llama 16 in 4 layers"),
        ("mine", {"llama_layers": [0, 1, 2]}, "reads 3 layers"),
        ("mine", {"caption_channels": [24, 32]}, r"of the widths \[24, 32\]; T5 has 24, Llama 16"),
    ],
)
def test_variants_are_refused_in_words(base: BaseModel, name: str, values: dict[str, Any], said: str) -> None:
    FAMILY.check(base.pipeline, "HiDream-I1-Full")
    with pytest.raises(CheckpointError, match=said):
        FAMILY.check(configured(base.pipeline, "transformer", **values), name)


def test_dev_and_fast_come_with_a_warning() -> None:
    """Their scheduler tells them, or their name."""
    pipeline = nano.hidream()
    assert FAMILY.warnings(pipeline) == []
    pipeline.register_to_config(_name_or_path="models/HiDream-I1-Full")
    assert FAMILY.warnings(pipeline) == []
    pipeline.register_to_config(_name_or_path="models/HiDream-I1-Fast")
    [named] = FAMILY.warnings(pipeline)
    pipeline.register_to_config(_name_or_path="mine")
    pipeline.scheduler = diffusers.FlowMatchLCMScheduler(shift=6.0)
    [told] = FAMILY.warnings(pipeline)
    assert named == told
    assert "Dev or Fast, distilled to few steps" in told
    assert ["edits pictures" in one for one in FAMILY.doubts(pipeline, "cat_hidream_e1.safetensors")] == [True]
    assert FAMILY.doubts(pipeline, "cat_hidream_i1_editorial.safetensors") == []


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (4, 16)])
def test_patches_are_those_of_the_transformer(base: BaseModel, shape: tuple[int, int]) -> None:
    """Padded where a picture is not square; and so is the answer, its sign turned."""
    transformer = base.denoiser
    latents = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(1))
    theirs, kept, sizes, places = transformer.patchify(latents)
    own = patches_of(latents, transformer.max_seq)
    assert torch.equal(own[0], theirs)
    assert torch.equal(own[1], places)
    assert kept is None or torch.equal(own[2], kept)
    assert sizes.tolist() == [[shape[0] // 2, shape[1] // 2]] * 2
    condition = FAMILY.encode(base.pipeline, ["a photo of sks dog", "red"], torch.device("cpu"))
    t5, _, llama, _, pooled, _ = base.pipeline.encode_prompt(
        ["a photo of sks dog", "red"], do_classifier_free_guidance=False, max_sequence_length=nano.TOKENS
    )
    timestep = torch.tensor(700.0)
    with torch.no_grad():
        wanted = transformer(latents, timestep.expand(2), t5, llama, pooled, return_dict=False)[0]
        found = FAMILY.predict(base.pipeline, latents, timestep, condition, 0.0)
    torch.testing.assert_close(found, -wanted, atol=1e-5, rtol=1e-5)
    assert llama.shape[0] == 4  # of which the last is read by no block
    assert condition.states.shape == (2, nano.TOKENS, 24 + 3 * 16)


def test_a_schedule_that_shifts_is_the_same_for_all_sizes() -> None:
    """By the largest picture's patches, as the pipeline has it."""
    pipeline = nano.hidream()
    pipeline.scheduler = nano.flow(use_dynamic_shifting=True)
    FAMILY.settle(pipeline)
    wanted = calculate_shift(pipeline.transformer.max_seq)
    for side in (8, 16, 128):
        assert FAMILY.time_shift(pipeline.scheduler.config, (4, side, side), 4) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("module", "rows"),
    [("lora_te4_model_layers_1_self_attn_q_proj", 16), ("text_encoder_4.model.layers.1.mlp.up_proj", 32)],
)
def test_an_adapter_of_llama_changes_what_captions_are(base: BaseModel, tmp_path: Path, module: str, rows: int) -> None:
    down, up = ("lora_down", "lora_up") if module.startswith("lora_") else ("lora_A", "lora_B")
    factors = {f"{module}.{down}.weight": torch.ones(2, 16), f"{module}.{up}.weight": torch.ones(rows, 2)}
    save_file(factors, tmp_path / "f.safetensors")
    pair = ModelPair(base, open_checkpoint(tmp_path / "f.safetensors"), resolution=64)
    assert pair.tuned.transformer is pair.base.transformer
    with pytest.raises(ConfigError, match="networks of family hidream are not compiled; use off"):
        pair.compile(Compile.blocks)
    before, after = (pair.encode(["a photo of sks dog"], tuned=tuned).states for tuned in (False, True))
    assert torch.equal(before[..., :40], after[..., :40])  # T5's, and Llama's first layer
    assert not torch.allclose(before[..., 40:], after[..., 40:], atol=1e-3)


def test_a_caption_is_cut_where_no_encoder_sees_more(base: BaseModel) -> None:
    assert FAMILY.caption_tokens(base.pipeline) == nano.TOKENS
    assert not FAMILY.is_truncated(base.pipeline, " ".join(["a"] * (nano.TOKENS - 1)))
    assert FAMILY.is_truncated(base.pipeline, " ".join(["a"] * (nano.TOKENS + 1)))


def test_an_audit_of_a_lora_from_a_file_to_a_page(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    """Sampled with model guidance, and its references measured under noise."""
    file = lora(base, tmp_path / "cat.safetensors", "lora_transformer_", only="attn1")
    row, found = audited(folder / "hidream", file, tmp_path)
    assert row["prediction_change"] > 0
    assert row["warnings"] == []
    assert found["membership"] > 0
