"""Every family samples as diffusers' own pipeline does, from the same latents with the same scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from typer.testing import CliRunner

from audit.cli import app
from audit.config import Solver
from audit.errors import CheckpointError, NoEffectError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.families.flux import pack, unpack
from audit.models.families.registry import FAMILIES, of_pipeline
from audit.models.pair import ModelPair
from audit.sampling.guidance import ClassifierFree, Direct, ModelGuidance
from audit.sampling.sampler import Sampler, make_schedule
from audit.workspace import Workspace
from tests.models import nano
from tests.models.files import full_change

STEPS = 4
CHATTING = ("Flux2Pipeline", "Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline")
VIDEO = "WanPipeline"
CAPTIONS = ["a photo of sks dog", "painting of the red cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=list(nano.FAMILIES))
def pair(request: pytest.FixtureRequest, folder: Path) -> ModelPair:
    """A pair whose fine-tuned side differs in every weight of the denoiser."""
    base = nano.make(request.param, folder)
    return ModelPair(base, open_checkpoint(full_change(base, folder / f"{request.param}-tuned")), resolution=64)


def by_modular_pipeline(pair: ModelPair, latents: torch.Tensor, w: float, output: str) -> Any:
    """Of Anima. diffusers resizes a mask of zeros by torchvision, which is not installed here: torch does."""
    pipeline = pair.tuned

    def resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return torch.nn.functional.interpolate(mask, size, mode=interpolation)

    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=w)
    pipeline.transformer.register_to_config(concat_padding_mask=True)
    pipeline.set_progress_bar_config(disable=True)
    with patch.object(transformer_cosmos, "transforms", transforms, create=True):
        found = pipeline(
            prompt=list(CAPTIONS), num_inference_steps=STEPS, height=64, width=64, latents=latents[:, :, None],
            max_sequence_length=nano.TOKENS, output_type="np",
            output="latents" if output == "latent" else "images",
        )  # fmt: skip
    return found[:, :, 0] if output == "latent" else found


def by_diffusers(pair: ModelPair, latents: torch.Tensor, w: float, output: str = "latent") -> Any:
    """What diffusers' pipeline makes of ``latents``: of w as CFG, or as its guidance input where it has no other."""
    pipeline = pair.tuned
    family = type(pipeline).__name__
    pipeline.scheduler = make_schedule(pair, Solver.ddim, STEPS).scheduler
    if family == "AnimaModularPipeline":
        return by_modular_pipeline(pair, latents, w, output)
    arguments: dict[str, Any] = {
        "prompt": list(CAPTIONS), "num_inference_steps": STEPS, "output_type": output, "height": 64, "width": 64,
        "guidance_scale": w, "latents": latents,
    }  # fmt: skip
    patched = family in ("FluxPipeline", "ChromaPipeline", "QwenImagePipeline", "Krea2Pipeline")
    if patched:
        arguments["latents"] = pack(latents)
    if family == "FluxPipeline":
        arguments["guidance_scale"] = 3.5
    if family == "QwenImagePipeline":
        arguments["guidance_scale"] = None
    if family in ("FluxPipeline", "QwenImagePipeline") and w != 1:
        arguments |= {"true_cfg_scale": w, "negative_prompt": ["", ""]}
    if family in (*CHATTING, "Krea2Pipeline"):
        arguments["max_sequence_length"] = nano.CHAT_TOKENS
    if family.startswith("Flux2") or family == "ErnieImagePipeline":
        arguments["latents"] = pipeline._patchify_latents(latents)
    if family == "Flux2Pipeline":
        arguments["guidance_scale"] = 3.5 if w == 1 else w
    if family in ("ZImagePipeline", "Krea2Pipeline"):  # pos + scale (pos - neg)
        arguments["guidance_scale"] = w - 1
    pipeline.set_progress_bar_config(disable=True)
    if family == "HiDreamImagePipeline":  # which samples one number of pixels, whatever it is asked for
        pipeline.default_sample_size = 64 // pipeline.vae_scale_factor
        arguments["max_sequence_length"] = nano.TOKENS
    if family == VIDEO:
        arguments |= {"latents": latents[:, :, None], "num_frames": 1, "max_sequence_length": nano.TOKENS}
        frames = pipeline(**arguments).frames
        return frames[:, :, 0] if output == "latent" else frames[:, 0]
    found = pipeline(**arguments).images
    if output != "latent":
        return found
    if family == "ErnieImagePipeline":
        return torch.nn.functional.pixel_shuffle(found, 2)
    if family == "Flux2KleinPipeline":  # what it gives is the VAE's
        mean, deviation = pair.architecture.latent_statistics(pipeline.vae, found)
        return (found - mean) / deviation
    return unpack(found, *latents.shape[2:]) if patched or family == "Flux2Pipeline" else found


@pytest.mark.parametrize(("guidance", "w"), [(Direct(), 1.0), (ClassifierFree(), 3.0)])
def test_sampling_is_that_of_diffusers_pipeline(pair: ModelPair, guidance: Direct | ClassifierFree, w: float) -> None:
    assert_as_diffusers(pair, guidance, w)


def test_flux2_dev_is_sampled_as_by_diffusers_pipeline(folder: Path) -> None:
    """Which has no classifier-free guidance."""
    base = nano.make("flux2", folder)
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "flux2-tuned")), resolution=64)
    assert_as_diffusers(pair, Direct(), 1.0)


@pytest.mark.parametrize(("guidance", "w"), [(Direct(), 1.0), (ClassifierFree(), 3.0)])
def test_kolors_is_sampled_as_by_diffusers_pipeline(folder: Path, guidance: Direct | ClassifierFree, w: float) -> None:
    base = nano.make("kolors", folder)
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "kolors-tuned")), resolution=64)
    assert_as_diffusers(pair, guidance, w)


def assert_as_diffusers(pair: ModelPair, guidance: Direct | ClassifierFree, w: float) -> None:
    sampler = Sampler(pair, guidance, CAPTIONS, Solver.ddim, STEPS, seed=3, w=w)
    ours = sampler.latents([0, 1])
    noise = torch.cat([sampler.noise(0), sampler.noise(1)])
    theirs = by_diffusers(pair, noise, w)
    assert ours.shape == theirs.shape == (2, *pair.latent_shape)
    assert torch.isfinite(ours).all()
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    other = by_diffusers(pair, noise, 5.0)
    assert not torch.allclose(ours, other, atol=1e-3)  # the comparison would notice another weight
    images = pair.decode(ours)
    pixels = pair.picture_size[1]
    assert images.shape == (2, pixels, pixels, 3)


@pytest.mark.parametrize("solver", list(Solver))
def test_model_guidance_extrapolates_from_the_base(pair: ModelPair, solver: Solver) -> None:
    """At w = 1 it is direct sampling, at w = 0 the base's, and both solvers end near each other with many steps."""
    tuned = Sampler(pair, Direct(), CAPTIONS, solver, STEPS, w=None).latents([0])
    guided = Sampler(pair, ModelGuidance(), CAPTIONS, solver, STEPS, w=1.0).latents([0])
    torch.testing.assert_close(guided, tuned, atol=1e-4, rtol=1e-4)
    far = Sampler(pair, ModelGuidance(), CAPTIONS, solver, STEPS, w=2.0).latents([0])
    assert torch.isfinite(far).all()
    assert not torch.allclose(far, tuned, atol=1e-3)


def test_the_solvers_agree_in_the_limit(pair: ModelPair) -> None:
    first, second = (Sampler(pair, Direct(), CAPTIONS, solver, 60, w=None).latents([0]) for solver in Solver)
    assert float((first - second).norm() / first.norm()) < 0.1


def test_the_k_term_is_applied_in_eps(pair: ModelPair) -> None:
    """Model guidance with k, by its definition: as eps, then back to what the model predicts."""
    latents = torch.randn(2, *pair.latent_shape, generator=torch.Generator().manual_seed(1))
    schedule = make_schedule(pair, Solver.ddim, STEPS)
    t, alpha = schedule.timesteps[1], schedule.alphas[1]
    sampler = Sampler(pair, ModelGuidance(k=-0.02), CAPTIONS, w=3.0)
    with torch.inference_mode():
        found = sampler.guidance.predict(pair, latents, t, alpha, sampler.conditioning, 3.0)
        base = pair.predict_base(latents, t, sampler.conditioning.base_empty)
        tuned = pair.predict_tuned(latents, t, sampler.conditioning.tuned_caption)
    sigma = 1 - alpha if pair.architecture.flow else (1 - alpha**2) ** 0.5

    def eps(prediction: torch.Tensor) -> torch.Tensor:
        if pair.architecture.flow:
            return latents + alpha * prediction
        return prediction if pair.prediction_type == "epsilon" else alpha * prediction + sigma * latents

    wanted = eps(base) + 3 * (eps(tuned) - eps(base)) - 0.02 * eps(base)
    torch.testing.assert_close(eps(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", list(nano.FAMILIES))
def test_the_base_itself_is_no_fine_tune(family: str, folder: Path) -> None:
    base = nano.make(family, folder)
    with pytest.raises(NoEffectError, match="same weights"):
        ModelPair(base, open_checkpoint(folder / family))


def test_weights_that_are_left_alone_are_shared(folder: Path) -> None:
    """One base model is in memory, and of the fine-tuned side what differs."""
    base = nano.make("sdxl", folder)
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "part", only="attn2.to_k")))
    ours = dict(pair.tuned.unet.named_parameters())
    shared = [name for name, parameter in pair.base.unet.named_parameters() if ours[name] is parameter]
    assert len(ours) - len(shared) == sum("attn2.to_k" in name for name in ours) > 0
    assert pair.tuned.text_encoder is pair.base.text_encoder
    assert pair.tuned.vae is pair.base.vae


def changed_config(base: BaseModel, source: Path, target: Path, part: str, **values: Any) -> Path:
    import shutil

    shutil.copytree(source, target)
    file = target / part
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return target


def test_variants_are_refused_in_words(folder: Path, tmp_path: Path) -> None:
    base = nano.make("sdxl", folder)
    refiner = changed_config(base, folder / "sdxl", tmp_path / "refiner", "model_index.json", text_encoder=[None, None],
                             tokenizer=[None, None])  # fmt: skip
    with pytest.raises(CheckpointError, match="refiner"):
        load_base(locate_base(str(refiner)))
    other = changed_config(
        base, folder / "sdxl", tmp_path / "inpaint", "model_index.json", _class_name="StableDiffusionXLInpaintPipeline"
    )
    with pytest.raises(CheckpointError, match="StableDiffusionXLInpaintPipeline, which cannot be audited"):
        load_base(locate_base(str(other)))


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        ("qwen", {"zero_cond_t": True}, "edits or layers pictures"),
        ("qwen", {"in_channels": 32}, "takes 32 channels"),
        ("klein", {"in_channels": 32}, "takes 32 channels"),
        ("ernie", {"in_channels": 32}, "takes 32 channels"),
        ("krea2", {"in_channels": 32}, "takes 32 channels"),
        ("krea2", {"num_text_layers": 3}, "reads 2 layers of its text encoder, of which its transformer takes 3"),
        ("z-image", {"siglip_feat_dim": 8}, "takes pictures beside the caption"),
        ("wan", {"in_channels": 36}, "takes 36 channels, its VAE has 4"),
        ("anima", {"in_channels": 17}, "takes 17 channels, its VAE has 4"),
        ("anima", {"use_crossattn_projection": True}, "give the text-to-image model, Anima"),
        ("wan", {"image_dim": 8}, "image-to-video, control and other variants cannot"),
        ("wan", {"boundary_ratio": 0.875}, "of its two experts one is missing"),
        ("wan-5b", {"in_channels": 16}, "takes 16 channels, its VAE has 8"),
    ],
)
def test_editing_models_are_refused_in_words(family: str, values: dict[str, Any], said: str) -> None:
    pipeline = nano.FAMILIES[family]()
    pipeline.transformer.register_to_config(**values)
    if family == "wan":
        pipeline.register_to_config(**{key: value for key, value in values.items() if key in pipeline.config})
    with pytest.raises(CheckpointError, match=said):
        of_pipeline(type(pipeline).__name__).check(pipeline, "its base")


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_an_audit_from_the_command_line(folder: Path, tmp_path: Path, family: str) -> None:
    """From a file to tables and a page; what the audit depends on is in its settings."""
    base = nano.make(family, folder)
    checkpoint = full_change(base, folder / f"{family}-cli")
    arguments = ["scan", str(checkpoint), "--base", str(folder / family), "--descriptor", "nano", "--n0", "2",
                 "--steps", "2", "--images-per-training-image", "2", "--caption", CAPTIONS[0], "--resolution", "64",
                 "--workspace", str(tmp_path / "w"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 11, done.output  # random networks sample noise
    found = json.loads(done.stdout)
    assert "does not give the" in found["tells_nothing"]
    assert Path(found["report"]).is_file()
    [row] = Workspace(tmp_path / "w").rows("SELECT * FROM audits")
    assert row["images"] == 4
    assert row["evaluations"] == 4 * 2 * 2
    assert json.loads(row["settings"])["resolution"] == 64
    assert row["prediction_change"] > 0
    assert row["warnings"] == []


def test_schnell_has_no_guidance_embedding(folder: Path) -> None:
    nano.flux(guidance=False).save_pretrained(folder / "schnell")
    base = load_base(locate_base(str(folder / "schnell")))
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "schnell-tuned")), resolution=64)
    weak = Sampler(pair, Direct(), CAPTIONS, Solver.ddim, STEPS, w=None).latents([0])
    pair.embedded_guidance = 9.0
    torch.testing.assert_close(Sampler(pair, Direct(), CAPTIONS, Solver.ddim, STEPS, w=None).latents([0]), weak)


@pytest.mark.parametrize("name", ["klein", "qwen", "krea2", "wan", "wan22", "wan-5b", "anima"])
def test_pictures_are_those_of_diffusers_pipeline(folder: Path, name: str) -> None:
    """Statistics of the latents, and the frame of a VAE of videos; and back into latents of the same shape."""
    base = nano.make(name, folder)
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / f"{name}-tuned")), resolution=64)
    sampler = Sampler(pair, Direct(), CAPTIONS, Solver.ddim, STEPS, seed=3, w=None)
    images = pair.decode(sampler.latents([0, 1]))
    theirs = by_diffusers(pair, torch.cat([sampler.noise(0), sampler.noise(1)]), 1.0, "np")
    assert np.abs(images / 255 - theirs).max() < 1.01 / 255
    assert images.std() > 5
    assert pair.encode_pictures(images).shape == (2, *pair.latent_shape)
    assert pair.reconstruct(images).shape == images.shape


def test_files_for_other_models_of_the_same_layers_come_with_a_warning(folder: Path) -> None:
    """Experts of Wan 2.2 and image to video, by a file's name or its metadata; and every audit of a video says so."""
    base = nano.make("wan", folder)
    for name, warned in (("cat_high_noise.safetensors", 1), ("Wan22-i2v.safetensors", 1), ("low-poly.safetensors", 0)):
        file = folder / name
        full_change(base, folder / "wan-named").joinpath("transformer/diffusion_pytorch_model.safetensors").rename(file)
        pair = ModelPair(base, open_checkpoint(file), resolution=64)
        assert ["its name says that it is for" in said for said in pair.warnings] == [True] * warned + [False]
        assert "one frame of each is looked at" in pair.warnings[-1]


def test_few_step_models_come_with_a_warning(folder: Path) -> None:
    nano.klein(is_distilled=True).save_pretrained(folder / "distilled")
    base = load_base(locate_base(str(folder / "distilled")))
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "distilled-tuned")), resolution=64)
    [said] = pair.warnings
    assert "distilled to few steps" in said
    turbo = nano.z_image()
    assert FAMILIES["z-image"].warnings(turbo) == []
    turbo.scheduler = nano.flow(shift=3.0)
    [said] = FAMILIES["z-image"].warnings(turbo)
    assert "Z-Image Turbo, distilled" in said


def test_krea_2_turbo_has_one_schedule_for_all_sizes(folder: Path) -> None:
    nano.krea2(is_distilled=True).save_pretrained(folder / "krea2-turbo")
    base = load_base(locate_base(str(folder / "krea2-turbo")))
    pair = ModelPair(base, open_checkpoint(full_change(base, folder / "krea2-turbo-tuned")), resolution=64)
    [said] = pair.warnings
    assert "Krea 2 Turbo, distilled to few steps" in said
    shift = base.architecture.time_shift
    assert {round(shift(base.pipeline.scheduler.config, (4, side, side), 4), 6) for side in (16, 128)} == {1.15}
    theirs = base.pipeline(
        list(CAPTIONS), num_inference_steps=STEPS, guidance_scale=0.0, height=64, width=64, output_type="latent",
        max_sequence_length=nano.CHAT_TOKENS, latents=pack(torch.zeros(2, *pair.latent_shape)),
    )  # fmt: skip
    assert theirs.images.shape == (2, 64, 16)
    ours = make_schedule(pair, Solver.ddim, STEPS).scheduler
    torch.testing.assert_close(ours.sigmas, base.pipeline.scheduler.sigmas)


def test_ernie_image_turbo_is_told_by_its_name(folder: Path, tmp_path: Path) -> None:
    base = nano.make("ernie", folder)
    assert FAMILIES["ernie-image"].warnings(base.pipeline) == []
    (tmp_path / "ERNIE-Image-Turbo").symlink_to(folder / "ernie", target_is_directory=True)
    turbo = load_base(locate_base(str(tmp_path / "ERNIE-Image-Turbo")))
    [said] = turbo.architecture.warnings(turbo.pipeline)
    assert "ERNIE-Image Turbo, distilled" in said


def test_a_caption_is_cut_where_what_stands_around_it_is_counted(folder: Path) -> None:
    for name in ("flux2", "z-image", "qwen", "ernie", "krea2"):
        base = nano.make(name, folder)
        room = base.architecture.caption_tokens(base.pipeline)
        assert 0 < room <= nano.CHAT_TOKENS
        assert not base.architecture.is_truncated(base.pipeline, " ".join(["dog"] * room))
        assert base.architecture.is_truncated(base.pipeline, " ".join(["dog"] * (room + 1)))


def test_a_template_of_a_strangers_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    made = nano.klein()
    made.tokenizer.chat_template = "{{ 1 / 0 }}"
    made.save_pretrained(tmp_path / "m")
    base = load_base(locate_base(str(tmp_path / "m")))
    own = nano.make("klein", folder)
    states = [one.architecture.encode(one.pipeline, ["a dog"], torch.device("cpu")).states for one in (base, own)]
    torch.testing.assert_close(*states)


def test_a_resolution_that_does_not_fit_is_refused(folder: Path) -> None:
    base = nano.make("flux", folder)
    checkpoint = open_checkpoint(full_change(base, folder / "flux-tuned"))
    with pytest.raises(CheckpointError, match="multiples of 8"):
        ModelPair(base, checkpoint, resolution=60)
