"""Bases with two experts: which of them a noise level asks, which a file is for, and that neither is passed over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from audit.choices import Expert
from audit.config import Settings, Solver
from audit.errors import CheckpointError, ConfigError, NoEffectError
from audit.evidence.effort import TIMESTEPS
from audit.evidence.levels import edge, expert_at, timesteps_of
from audit.evidence.membership import level_of
from audit.models.base import BaseModel, load_base, load_vae, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.experts import assigned, experts_of, told, told_by_name
from audit.models.inspect import inspect
from audit.models.pair import ModelPair
from audit.models.tuning import tune
from audit.sampling.guidance import ClassifierFree, Direct, ModelGuidance
from audit.sampling.sampler import Sampler, make_schedule
from tests.models import nano

HIGH, LOW, BOTH = Expert.high_noise, Expert.low_noise, Expert.both
PARTS = {HIGH: "transformer", LOW: "transformer_2"}
CAPTIONS = ["a photo of sks dog", "painting of the red cat"]
STEPS = 4
LAYER = "blocks.{}.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return nano.make("wan22", folder)


def write_lora(path: Path, seed: int, prefix: str = "diffusion_model.", size: float = 0.6, **metadata: str) -> Path:
    """A LoRA of rank 4 on both blocks' queries, values and first feed-forward layers, by Alibaba's names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, rows in (("self_attn.q", 24), ("self_attn.v", 24), ("cross_attn.o", 24), ("ffn.0", 32)):
        for block in range(2):
            name = f"{prefix}blocks.{block}.{layer}"
            state[f"{name}.lora_A.weight"] = torch.randn(4, 24, generator=generator) * size
            state[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * size
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata)
    return path


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[Expert, Path]:
    return {
        HIGH: write_lora(folder / "files" / "cat_high_noise.safetensors", 1),
        LOW: write_lora(folder / "files" / "cat_low_noise.safetensors", 2),
    }


def pair_of(base: BaseModel, path: Path, expert: Expert | None = None, low_noise: Path | None = None) -> ModelPair:
    return ModelPair(base, replace(open_checkpoint(path, low_noise), expert=expert), resolution=32)


@pytest.mark.parametrize(
    ("boundary", "guidance", "w"),
    [(0.875, Direct(), 1.0), (0.875, ClassifierFree(), 3.0), (0.7, ClassifierFree(), 2.0), (0.5, Direct(), 1.0)],
)
def test_both_experts_sample_as_in_diffusers_pipeline(
    folder: Path, files: dict[Expert, Path], boundary: float, guidance: Direct | ClassifierFree, w: float
) -> None:
    """At boundaries behind one, two and three of the four steps; with either weight of its guidance the same."""
    at = folder / f"boundary-{boundary}"
    if not at.exists():
        nano.wan22(boundary).save_pretrained(at)
    pair = pair_of(load_base(locate_base(str(at))), files[HIGH], low_noise=files[LOW])
    sampler = Sampler(pair, guidance, CAPTIONS, Solver.ddim, STEPS, seed=3, w=w)
    ours = sampler.latents([0, 1])
    pipeline = pair.tuned
    pipeline.scheduler = make_schedule(pair, Solver.ddim, STEPS).scheduler
    asked = [bool(t >= boundary * 1000) for t in pipeline.scheduler.timesteps]
    assert sum(asked) == {0.875: 1, 0.7: 2, 0.5: 3}[boundary]
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.cat([sampler.noise(0), sampler.noise(1)])[:, :, None]

    def theirs(**guided: float) -> torch.Tensor:
        return pipeline(
            list(CAPTIONS), num_inference_steps=STEPS, output_type="latent", height=32, width=32, num_frames=1,
            latents=noise, max_sequence_length=nano.TOKENS, **guided,
        ).frames[:, :, 0]  # fmt: skip

    torch.testing.assert_close(ours, theirs(guidance_scale=w), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, theirs(guidance_scale=w, guidance_scale_2=w), atol=1e-4, rtol=1e-4)
    if w != 1:
        assert not torch.allclose(ours, theirs(guidance_scale=w, guidance_scale_2=w + 2), atol=1e-3)


def test_a_level_asks_the_expert_that_it_belongs_to(base: BaseModel, files: dict[Expert, Path]) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for expert, other in ((HIGH, LOW), (LOW, HIGH)):
        pair = pair_of(base, files[expert], expert)
        assert pair.experts == (expert,)
        condition = pair.encode(CAPTIONS, tuned=False)
        for timestep, asked in ((1000, HIGH), (875, HIGH), (874.9, LOW), (10, LOW)):
            t = torch.tensor(timestep)
            before, after = pair.predict_base(x, t, condition), pair.predict_tuned(x, t, condition)
            network = getattr(base.pipeline, PARTS[asked])
            alone = network(x[:, :, None], t.expand(2), condition.states, return_dict=False)[0][:, :, 0]
            torch.testing.assert_close(before, alone)
            assert torch.equal(before, after) == (asked is other)
        [alone] = [one for one in pair.warnings if "is the base's own" in one]
        assert alone.startswith(f"the {expert} expert of wan22 is changed, and the {other} one")


def test_the_change_of_the_prediction_is_measured_in_what_is_changed(
    base: BaseModel, files: dict[Expert, Path]
) -> None:
    one = {expert: pair_of(base, path, expert).effect.prediction for expert, path in files.items()}
    both = pair_of(base, files[HIGH], low_noise=files[LOW])
    assert both.experts == (HIGH, LOW)
    assert both.effect.prediction == max(one.values())
    assert min(one.values()) > 0.01
    assert not any("base's own" in said for said in both.warnings)
    weights = [pair_of(base, path, expert).effect.weights for expert, path in files.items()]
    assert both.effect.weights == pytest.approx(sum(w**2 for w in weights) ** 0.5, rel=1e-4)


def test_model_guidance_leaves_the_other_experts_steps_alone(base: BaseModel, files: dict[Expert, Path]) -> None:
    pair = pair_of(base, files[LOW], LOW)
    runs = [Sampler(pair, ModelGuidance(), CAPTIONS, Solver.ddim, STEPS, w=w).latents([0]) for w in (1.0, 3.0)]
    assert not torch.allclose(*runs, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:  # the low-noise expert is never asked where all levels are the other's
        patch.setattr(type(pair.architecture), "boundary", lambda *_: 0.0)
        runs = [Sampler(pair, ModelGuidance(), [""], Solver.ddim, STEPS, w=w).latents([0]) for w in (1.0, 3.0)]
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("cat_high_noise.safetensors", HIGH), ("cat_000002500_low_noise.safetensors", LOW), ("CatHighNoise_v2", HIGH),
        ("wan22-14B-HN.safetensors", HIGH), ("style_LN_v3.safetensors", LOW), ("cat-high.safetensors", HIGH),
        ("Cat_LOW_000001000.safetensors", LOW), ("cat_low_v2", LOW), ("low_noise_model.safetensors", LOW),
        ("low-poly-style.safetensors", None), ("high_quality_cat.safetensors", None), ("flow_noise.safetensors", None),
        ("cat.safetensors", None), ("high_noise_and_low_noise", None), ("slow.safetensors", None), ("", None),
        ("highlights.safetensors", None), ("x" * 10_000 + "_high_noise.safetensors", HIGH),
    ],
)  # fmt: skip
def test_names_tell_the_expert(name: str, expert: Expert | None) -> None:
    assert told_by_name(name) is expert


def test_metadata_tells_where_the_name_does_not_and_contradictions_tell_nothing() -> None:
    assert told("cat.safetensors", {"ss_output_name": "cat_high_noise"}) == (HIGH, "ss_output_name")
    assert told("cat_high_noise", {"modelspec.title": "cat low noise"}) == (None, "")
    assert told("cat", {"ss_sd_model_name": "wan2.2_t2v_low_noise_14B_fp16.safetensors"}) == (None, "")


def test_two_files_and_a_folder_of_them_are_one_checkpoint(
    files: dict[Expert, Path], folder: Path, tmp_path: Path
) -> None:
    given = open_checkpoint(files[HIGH], files[LOW])
    found = open_checkpoint(folder / "files")
    assert (given.identity, given.sha256) == (found.identity, found.sha256)
    assert (given.name, found.name) == ("cat_high_noise.safetensors and cat_low_noise.safetensors", "files")
    assert experts_of(given) == experts_of(found) == (HIGH, LOW)
    assert given.identity not in {open_checkpoint(path).identity for path in files.values()}
    other = open_checkpoint(files[HIGH], write_lora(tmp_path / "other.safetensors", 3))
    assert other.identity != given.identity
    with pytest.raises(CheckpointError, match="given as the high-noise file, and its name says low-noise"):
        open_checkpoint(files[LOW], files[HIGH])
    with pytest.raises(CheckpointError, match="hold the same"):
        open_checkpoint(files[HIGH], write_lora(tmp_path / "same.safetensors", 1))
    for number in (1, 2):
        write_lora(tmp_path / "steps" / f"cat_{number}_high_noise.safetensors", number)
    write_lora(tmp_path / "steps" / "cat_1_low_noise.safetensors", 4)
    with pytest.raises(CheckpointError, match="has 2 high-noise and 1 low-noise files"):
        open_checkpoint(tmp_path / "steps")


def test_the_half_that_changes_nothing_is_said(base: BaseModel, files: dict[Expert, Path], tmp_path: Path) -> None:
    nothing = write_lora(tmp_path / "nothing.safetensors", 5, size=0.0)
    with pytest.raises(NoEffectError, match="its low-noise half changes nothing"):
        pair_of(base, files[HIGH], low_noise=nothing)


def test_each_file_goes_into_its_own_expert(base: BaseModel, files: dict[Expert, Path], tmp_path: Path) -> None:
    """As two files, alone, as one for both, and as one file whose names mark the experts."""
    name = LAYER.format(1)

    def moved(found: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {
            part: network.get_submodule(name).weight - base.part(part).get_submodule(name).weight
            for part, network in found.items()
        }

    both = moved(tune(base, open_checkpoint(files[HIGH], files[LOW])).networks)
    assert set(both) == set(PARTS.values())
    for expert, path in files.items():
        [(part, change)] = moved(tune(base, replace(open_checkpoint(path), expert=expert)).networks).items()
        assert part == PARTS[expert]
        torch.testing.assert_close(change, both[part])
        shared = moved(tune(base, replace(open_checkpoint(path), expert=BOTH)).networks)
        for found in shared.values():
            torch.testing.assert_close(found, both[part])
    from safetensors.torch import load_file

    states = [load_file(path) for path in files.values()]
    for first, second in (("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
                          ("transformer.", "transformer_2."), ("", "transformer_2.")):  # fmt: skip
        joined = {
            name.replace("diffusion_model.", prefix): value
            for state, prefix in zip(states, (first, second), strict=True)
            for name, value in state.items()
        }
        save_file(joined, tmp_path / "joined.safetensors")
        checkpoint = open_checkpoint(tmp_path / "joined.safetensors")
        assert experts_of(checkpoint) == (HIGH, LOW)
        for part, change in moved(tune(base, checkpoint).networks).items():
            torch.testing.assert_close(change, both[part])
        with pytest.raises(CheckpointError, match="names an expert itself"):
            tune(base, replace(checkpoint, expert=HIGH))


def test_full_weights_of_one_expert_or_both(base: BaseModel, tmp_path: Path) -> None:
    """As diffusers' folder, and as files by Alibaba's names."""
    states = {}
    for number, (expert, part) in enumerate(PARTS.items()):
        generator = torch.Generator().manual_seed(number)
        state = {name: value + 0.05 * torch.randn(value.shape, generator=generator)
                 for name, value in base.part(part).state_dict().items()}  # fmt: skip
        states[expert] = state
        (tmp_path / "folder" / part).mkdir(parents=True)
        save_file(state, tmp_path / "folder" / part / "diffusion_pytorch_model.safetensors")
        save_file(state, tmp_path / f"full_{expert.replace('-', '_')}.safetensors")
    checkpoint = open_checkpoint(tmp_path / "folder")
    assert experts_of(checkpoint) == (HIGH, LOW)
    pair_paths = [tmp_path / f"full_{expert.replace('-', '_')}.safetensors" for expert in PARTS]
    for found in (tune(base, checkpoint), tune(base, open_checkpoint(*pair_paths))):
        for expert, part in PARTS.items():
            network = found.networks[part]
            torch.testing.assert_close(
                dict(network.named_parameters())["proj_out.weight"], states[expert]["proj_out.weight"]
            )
    alone = tune(base, replace(open_checkpoint(pair_paths[1]), expert=LOW))
    assert set(alone.networks) == {"transformer_2"}
    (tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "folder" / "transformer").rmdir()
    assert experts_of(open_checkpoint(tmp_path / "folder")) == (LOW,)


def test_which_expert_a_file_is_for_is_settled_or_refused(
    base: BaseModel, files: dict[Expert, Path], tmp_path: Path
) -> None:
    unnamed = open_checkpoint(write_lora(tmp_path / "cat.safetensors", 1))
    named = open_checkpoint(files[HIGH])
    with pytest.raises(CheckpointError, match="told neither by its name nor by its metadata"):
        assigned(unnamed, 0.875, None)
    with pytest.raises(CheckpointError, match="two experts it is for is not said"):
        tune(base, unnamed)
    expert, [said] = assigned(named, 0.875, None)
    assert (expert, "its name says" in said) == (HIGH, True)
    assert assigned(unnamed, 0.875, None, name="cat_LN.safetensors")[0] is LOW
    assert assigned(unnamed, 0.875, LOW) == (LOW, [])
    assert assigned(named, 0.875, BOTH) == (BOTH, [])
    assert "as asked, and its name says high-noise" in assigned(named, 0.875, LOW)[1][0]
    assert assigned(named, None, None) == (None, [])
    with pytest.raises(ConfigError, match="bases of two experts"):
        assigned(named, None, HIGH)
    pair = open_checkpoint(files[HIGH], files[LOW])
    with pytest.raises(ConfigError, match="says itself what is for which expert"):
        assigned(pair, 0.875, HIGH)
    with pytest.raises(CheckpointError, match="and the base has one network"):
        assigned(pair, None, None)


def test_a_base_of_one_network_takes_no_pair(folder: Path, files: dict[Expert, Path]) -> None:
    one = nano.make("wan", folder)
    with pytest.raises(CheckpointError, match="for a base with two experts"):
        tune(one, open_checkpoint(files[HIGH], files[LOW]))
    with pytest.raises(CheckpointError, match="for a base with two experts"):
        tune(one, replace(open_checkpoint(files[HIGH]), expert=HIGH))


@pytest.mark.parametrize("boundary", [0.05, 0.3, 0.5, 0.61, 0.7, 0.875, 0.9, 0.93])
def test_membership_asks_where_an_expert_acts(boundary: float) -> None:
    """Each expert at three levels of its own, with the usual ones where they are its own."""
    scheduler = nano.unipc(3.0)
    for expert in (HIGH, LOW):
        levels = timesteps_of(boundary, [expert])
        assert len(levels) == 3
        assert list(levels) == sorted(levels)
        for t in levels:
            acts = level_of(t, "flow_prediction", scheduler).timestep >= boundary * 1000
            assert expert_at(t, boundary) is expert
            assert acts == (expert is HIGH)
    every = timesteps_of(boundary)
    assert every == timesteps_of(boundary, [BOTH]) == timesteps_of(boundary, [HIGH, LOW])
    assert {expert_at(t, boundary) for t in every} == {HIGH, LOW}
    assert timesteps_of(None) == TIMESTEPS
    assert timesteps_of(0.875, [LOW]) == TIMESTEPS
    assert all(t > edge(0.875) > 500 for t in timesteps_of(0.875, [HIGH]))


def test_experts_that_do_not_fit_are_refused_in_words() -> None:
    pipeline = nano.wan22()
    check = load_family().check
    for values, said in (({"boundary_ratio": None}, "of its two experts one is missing"),
                         ({"boundary_ratio": 0.99}, "next to no noise levels")):  # fmt: skip
        pipeline.register_to_config(**values)
        with pytest.raises(CheckpointError, match=said):
            check(pipeline, "its base")
    pipeline = nano.wan22()
    pipeline.transformer_2.register_to_config(in_channels=36)
    with pytest.raises(CheckpointError, match="takes 36 channels"):
        check(pipeline, "its base")


def load_family() -> Any:
    from audit.models.families.registry import of_pipeline

    return of_pipeline("WanPipeline")


def test_a_base_says_where_its_experts_part_before_it_is_loaded(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    located = locate_base(str(folder / "wan22"))
    assert located.boundary == base.architecture.boundary(base.pipeline) == 0.875
    assert locate_base(str(nano.make("wan", folder) and folder / "wan")).boundary is None
    assert load_vae(located).part("transformer_2") is None
    import shutil

    broken = shutil.copytree(folder / "wan22", tmp_path / "broken")
    index = json.loads((broken / "model_index.json").read_text())
    for ratio in ("high", True, float("nan"), 1.5, 0):
        (broken / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": ratio}))
        with pytest.raises(CheckpointError, match=r"its model_index\.json has two experts and no boundary|is damaged"):
            locate_base(str(broken))


def test_inspect_says_what_each_half_holds(base: BaseModel, files: dict[Expert, Path], folder: Path) -> None:
    one, both = inspect(files[HIGH]), inspect(folder / "files", base)
    assert both.problem is None
    assert both.tensors == 2 * one.tensors
    assert both.ranks == {4: 16}
    assert both.parts == {"high-noise denoiser": 8, "low-noise denoiser": 8}
    assert {block.part for block in both.blocks} == {"transformer", "transformer_2"}
    assert {block.part for block in inspect(folder / "files").blocks} == {"high-noise denoiser", "low-noise denoiser"}
    alone = inspect(files[HIGH], base)
    assert alone.problem is None
    assert any("taken for a high-noise file" in said for said in alone.warnings)


def test_settings_keep_the_expert_only_where_it_is_one() -> None:
    assert "expert" not in Settings().as_dict()
    assert Settings(expert=LOW).as_dict()["expert"] == "low-noise"
