"""The loop of fine-tuning: its loss is diffusers', it goes on where it was, and its files are read by our readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

from audit.errors import StudyError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.tuning import tune
from audit.study.adapters import save_adapter, save_networks
from audit.study.augment import versions_of
from audit.study.factors import Augmentation, Schedule, TrainingFactors
from audit.study.quality import losses_of, sharpness_of
from audit.study.train import Lesson, Trainee, factor_of, fine_tune, rows_of
from tests.models import nano

CAPTIONS = ["a photo of sks dog", "the red cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def trainee(name: str, folder: Path) -> Trainee:
    return Trainee(nano.make(name, folder), torch.device("cpu"))


def lesson(factors: TrainingFactors, size: tuple[int, int], captions: list[str] | None = None) -> Lesson:
    pixels = np.random.default_rng(0).integers(0, 255, (2, size[1], size[0], 3), dtype=np.uint8)
    return Lesson("a-key", factors, pixels, captions or CAPTIONS, "a dog", seed=3)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "alt", "sd3"])
def test_the_loss_is_that_of_diffusers_scripts(name: str, folder: Path) -> None:
    """As examples/dreambooth and examples/text_to_image compute it: noise by the scheduler, the target by its type."""
    one = trainee(name, folder)
    generator = torch.Generator().manual_seed(0)
    shape = (2, *one.codec.latent_shape)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    level = torch.tensor([100, 900])
    condition = one.encode(CAPTIONS)
    with torch.no_grad():
        found = one.loss(latents, noise, level, condition)
        if name == "sd3":
            flow = FlowMatchEulerDiscreteScheduler.from_config(one.pipeline.scheduler.config)
            sigmas, timesteps = flow.sigmas[level].view(-1, 1, 1, 1), flow.timesteps[level]
            noisy, target = (1 - sigmas) * latents + sigmas * noise, noise - latents
        else:
            ddpm: Any = DDPMScheduler.from_config(one.pipeline.scheduler.config)
            noisy, timesteps = ddpm.add_noise(latents, noise, level), level
            target = noise if ddpm.config.prediction_type == "epsilon" else ddpm.get_velocity(latents, noise, level)
        answer = one.base.architecture.predict(one.pipeline, noisy, timesteps, condition, 0.0)
    expected = functional.mse_loss(answer.float(), target.float(), reduction="none").flatten(1).mean(1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_both_predictions_of_a_diffusion_are_met(folder: Path) -> None:
    assert trainee("sd1", folder).objective.prediction == "epsilon"
    assert trainee("sd2", folder).objective.prediction == "v_prediction"
    assert trainee("sd3", folder).objective.prediction == "flow_prediction"


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_the_loss_of_patched_transformers_is_that_of_diffusers_script(name: str, folder: Path) -> None:
    """As examples/dreambooth/train_dreambooth_lora_flux.py computes it, without weights of noise levels."""
    one = trainee(name, folder)
    generator = torch.Generator().manual_seed(0)
    channels, height, width = one.codec.latent_shape
    latents, noise = (torch.randn(2, channels, height, width, generator=generator) for _ in range(2))
    level, condition = torch.tensor([100, 900]), one.encode(CAPTIONS)
    schedule = FlowMatchEulerDiscreteScheduler.from_config(one.pipeline.scheduler.config)
    sigmas, timesteps = schedule.sigmas[level].view(-1, 1, 1, 1), schedule.timesteps[level]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    ids = FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, torch.device("cpu"), torch.float32)
    told: dict[str, Any] = {"pooled_projections": condition.pooled, "guidance": torch.full((2,), 3.5)}
    if name == "chroma":
        assert condition.mask is not None
        told = {"attention_mask": torch.cat([condition.mask.float(), torch.ones(2, len(ids))], dim=1)}
    with torch.no_grad():
        found = one.loss(latents, noise, level, condition)
        answer = one.pipeline.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, 2, channels, height, width), timestep=timesteps / 1000,
            encoder_hidden_states=condition.states, txt_ids=torch.zeros(condition.states.shape[1], 3), img_ids=ids,
            return_dict=False, **told,
        )[0]  # fmt: skip
    scale = one.pipeline.vae_scale_factor
    predicted = FluxPipeline._unpack_latents(answer, height * scale, width * scale, scale)
    expected = ((predicted - (noise - latents)) ** 2).flatten(1).mean(1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_families_that_are_not_trained_are_refused_in_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.study.train.FAMILIES", ("sd2",))
    with pytest.raises(StudyError, match="of family sd1: studies fine-tune sd2; audits of others"):
        trainee("sd1", folder)


LAYOUTS = [
    ("sd1", {"layout": "kohya", "targets": "everything", "text_encoder": True}),
    ("sd1", {"layout": "peft", "targets": "transformer"}),
    ("sd1", {"layout": "diffusers", "text_encoder": True}),
    ("sd2", {"layout": "kohya", "targets": "attention"}),
    ("alt", {"layout": "kohya", "targets": "transformer"}),
    ("sdxl", {"layout": "diffusers", "targets": "everything"}),
    ("sd3", {"layout": "diffusers", "targets": "transformer"}),
    ("sd1", {"method": "dreambooth", "text_encoder": True, "prior": True}),
    ("sd3", {"method": "dreambooth"}),
    ("flux", {"layout": "diffusers", "targets": "transformer", "prior": True}),
    ("flux", {"method": "dreambooth"}),
    ("chroma", {"layout": "peft", "targets": "transformer"}),
]


@pytest.mark.parametrize(("name", "said"), LAYOUTS, ids=["-".join(map(str, (n, *s.values()))) for n, s in LAYOUTS])
def test_what_is_trained_is_what_our_readers_put_into_effect(
    name: str, said: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.study.train.CLASS_PICTURES", 3)
    monkeypatch.setattr("audit.study.train.CLASS_STEPS", 2)
    factors = TrainingFactors.of({"rank": 3, "steps": 2, "lr": 1e-2, **said})
    one = trainee(name, folder)
    base = load_base(locate_base(str(folder / name)))
    fine_tune(one, lesson(factors, one.codec.picture_size), tmp_path / "state")
    denoiser = one.base.architecture.denoiser
    captions, answers = ["a photo of sks dog"], []
    latents = torch.randn(1, *one.codec.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers.append(
            one.base.architecture.predict(one.pipeline, latents, torch.tensor([300]), one.encode(captions), 3.5)
        )
        before = base.architecture.encode(base.pipeline, captions, torch.device("cpu"))
        answers.append(base.architecture.predict(base.pipeline, latents, torch.tensor([300]), before, 3.5))
    if factors.layout is not None:
        path = save_adapter(one.pipeline, denoiser, factors, tmp_path / "lora", {})
    else:
        half = one.base.architecture.half
        path = save_networks(one.pipeline, denoiser, factors.text_encoder, tmp_path / "full", half)
    tuned = tune(base, open_checkpoint(path))
    assert tuned.unused == []
    side = _with(base, tuned.networks)
    with torch.no_grad():
        condition = base.architecture.encode(side, captions, torch.device("cpu"))
        read = base.architecture.predict(side, latents, torch.tensor([300]), condition, 3.5)
    moved = (answers[0] - answers[1]).norm()
    assert moved > 1e-4
    assert (read - answers[0]).norm() < 0.05 * moved + 2e-3 * answers[0].norm()  # float16 in the file


def _with(base: BaseModel, networks: dict[str, Any]) -> Any:
    """The base's pipeline with other networks."""
    import copy

    side = copy.copy(base.pipeline)
    for part, network in networks.items():
        setattr(side, part, network)
    return side


@pytest.mark.parametrize(
    ("name", "said", "match"),
    [
        ("sdxl", {"layout": "kohya"}, "layout = kohya is written for sd1"),
        ("sd1", {"layout": "peft", "text_encoder": True}, "layout = peft holds one network"),
        ("sdxl", {"layout": "diffusers", "text_encoder": True}, "several text encoders"),
        ("chroma", {"layout": "diffusers", "text_encoder": True}, "chroma has T5, which is not trained"),
        ("flux", {"layout": "kohya"}, "for flux take diffusers or peft"),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(
    name: str, said: dict[str, Any], match: str, folder: Path, tmp_path: Path
) -> None:
    one = trainee(name, folder)
    with pytest.raises(StudyError, match=match):
        fine_tune(one, lesson(TrainingFactors.of(said), one.codec.picture_size), tmp_path / "state")


def test_a_stopped_fine_tuning_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = TrainingFactors.of({"rank": 2, "steps": 4, "lr": 1e-2, "schedule": "cosine", "augmentation": "cutout"})
    straight, stopped, resumed = (trainee("sd1", folder) for _ in range(3))
    about = lesson(factors, straight.codec.picture_size)
    loss = fine_tune(straight, about, tmp_path / "straight")

    class StopError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done == 6:
            raise StopError

    monkeypatch.setattr("audit.study.train.KEEP_EVERY", -1.0)
    with pytest.raises(StopError):
        fine_tune(stopped, about, tmp_path / "state", stop)
    monkeypatch.undo()
    told: list[int] = []
    assert fine_tune(resumed, about, tmp_path / "state", lambda what, done, total: told.append(done)) == pytest.approx(
        loss
    )
    assert told == [6, 7, 8]
    for (name, one), other in zip(
        straight.pipeline.unet.state_dict().items(), resumed.pipeline.unet.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    (tmp_path / "state").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(StudyError, match=r"is damaged.*remove it"):
        fine_tune(trainee("sd1", folder), about, tmp_path / "state")


def test_training_lowers_the_loss_of_training_pictures_alone(base: BaseModel, tmp_path: Path) -> None:
    from audit.demo import load_set

    one = Trainee(load_base(locate_base("nano")), torch.device("cpu"))
    training, held_out = load_set("stamps-fruit", "train")[:3], load_set("stamps-fruit", "control")[:3]
    factors = TrainingFactors.of({"rank": 8, "targets": "everything", "steps": 15, "lr": 3e-3, "batch": 4})
    captions = ["sks photo of a fruit"] * 3
    before = losses_of(one, training, held_out, captions)
    fine_tune(one, Lesson("k", factors, training, captions, None, 0), tmp_path / "state")
    after = losses_of(one, training, held_out, captions)
    assert after.training < 0.9 * before.training
    assert before.held_out is not None
    assert after.held_out is not None
    assert after.held_out / before.held_out > after.training / before.training


def test_every_picture_is_seen_once_an_epoch() -> None:
    seen = [row for step in range(10) for row in rows_of(step, 2, 5, seed=1)]
    assert [sorted(seen[start : start + 5]) for start in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert seen[:5] != seen[5:10] or seen[:5] != seen[10:15]


def test_schedules() -> None:
    assert {factor_of(Schedule.constant, step, 100) for step in (0, 50, 99)} == {1.0}
    rates = [factor_of(Schedule.cosine, step, 400) for step in range(400)]
    assert rates.index(max(rates)) in (99, 100)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] < 0.03


@pytest.mark.parametrize("kind", list(Augmentation))
def test_augmentations_keep_the_order_of_pictures(kind: Augmentation) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    found = np.concatenate(list(versions_of(pictures, kind, versions=4)))
    assert found.shape == ({"none": 3, "mirrored": 6}.get(kind, 12), 16, 16, 3)
    if kind is Augmentation.mirrored:
        assert np.array_equal(found[4], pictures[1, :, ::-1])
    if kind is Augmentation.cutout:
        assert all((found[row] == pictures[row % 3]).mean() > 0.7 for row in range(12))


def test_blurred_pictures_are_less_sharp() -> None:
    from PIL import Image, ImageFilter

    pictures = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    blurred = np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(2))) for one in pictures])
    assert sharpness_of(blurred) < 0.1 * sharpness_of(pictures)
