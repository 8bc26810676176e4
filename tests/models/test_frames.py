"""A few frames of a video for each picture: sampled as diffusers' pipeline does, and looked at in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.config import Settings, Solver
from audit.errors import CheckpointError, ConfigError
from audit.models.base import BaseModel
from audit.models.batches import CPU_BATCH, batch_to_sample
from audit.models.checkpoint import open_checkpoint
from audit.models.cost import cost_of_pair
from audit.models.pair import ModelPair
from audit.models.published import PUBLISHED
from audit.models.sizing import size
from audit.sampling.guidance import ClassifierFree, Direct
from audit.sampling.sampler import Sampler, make_schedule
from tests.models import nano
from tests.models.files import full_change

CAPTIONS = ["a photo of sks dog", "painting of the red cat"]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frames")


def pair_of(base: BaseModel, folder: Path, frames: int) -> ModelPair:
    return ModelPair(base, open_checkpoint(full_change(base, folder / "tuned")), resolution=32, frames=frames)


@pytest.mark.parametrize(("name", "frames"), [("wan", 5), ("wan22", 3), ("wan-5b", 5)])
def test_a_few_frames_are_those_of_diffusers_pipeline(folder: Path, name: str, frames: int) -> None:
    """The latents of all frames, and of the pictures the middle one, though later latents are not decoded."""
    pair = pair_of(nano.make(name, folder), folder / name / "changed", frames)
    assert pair.sampled_shape == (pair.latent_shape[0], (frames + 1) // 2, *pair.latent_shape[1:])
    pipeline = pair.tuned
    pipeline.set_progress_bar_config(disable=True)
    for guidance, w in ((Direct(), 1.0), (ClassifierFree(), 3.0)):
        sampler = Sampler(pair, guidance, CAPTIONS, Solver.ddim, STEPS, seed=3, w=w)
        ours = sampler.latents([0, 1])
        pipeline.scheduler = make_schedule(pair, Solver.ddim, STEPS).scheduler
        theirs = pipeline(
            list(CAPTIONS), num_inference_steps=STEPS, output_type="latent", height=32, width=32, num_frames=frames,
            latents=torch.cat([sampler.noise(0), sampler.noise(1)]), guidance_scale=w, max_sequence_length=nano.TOKENS,
        ).frames  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    mean, deviation = pair.architecture.latent_statistics(pipeline.vae, theirs)
    with torch.no_grad():
        video = pipeline.vae.decode(theirs * deviation + mean, return_dict=False)[0]
    shown = pipeline.video_processor.postprocess_video(video, output_type="np")
    assert shown.shape[1] == frames
    images = pair.decode(ours)
    assert np.abs(images / 255 - shown[:, (frames - 1) // 2]).max() < 1.01 / 255
    assert np.abs(images / 255 - shown[:, 0]).max() > 0.05  # the first is another picture


def test_one_frame_is_as_without_the_setting(folder: Path) -> None:
    base = nano.make("wan", folder)
    pair = pair_of(base, folder / "wan" / "changed", 1)
    assert pair.sampled_shape == pair.latent_shape
    assert "frames" not in Settings().as_dict()
    assert Settings(frames=5).as_dict()["frames"] == 5


def test_pictures_of_references_stay_of_one_frame(folder: Path) -> None:
    pair = pair_of(nano.make("wan", folder), folder / "wan" / "changed", 5)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert pair.encode_pictures(pictures).shape == (2, *pair.latent_shape)
    assert pair.reconstruct(pictures).shape == pictures.shape


def test_numbers_that_no_latents_stand_for_are_refused(folder: Path, short: str) -> None:
    with pytest.raises(CheckpointError, match="--frames 4: of this base it is 1, 3, 5"):
        pair_of(nano.make("wan", folder), folder / "wan" / "changed", 4)
    with pytest.raises(CheckpointError, match="--frames 5: flux draws pictures"):
        pair_of(nano.make("flux", folder), folder / "flux" / "changed", 5)
    with pytest.raises(ConfigError, match="frames"):
        Settings(frames=0)
    with pytest.raises(ConfigError, match="of this base it is 1, 5, 9"):
        size(short, frames=6)
    with pytest.raises(ConfigError, match="draws pictures"):
        size("sd15", frames=5)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> str:
    """A published model of videos with two of its layers, and without its text encoder."""
    whole = PUBLISHED["wan2.1-1.3b"]
    transformer = whole.networks["transformer"]
    networks = {
        "transformer": replace(transformer, configuration={**transformer.configuration, "num_layers": 2}),
        "vae": whole.networks["vae"],
    }
    monkeypatch.setitem(PUBLISHED, "short", replace(whole, networks=networks))
    return "short"


def test_frames_cost_what_they_are(folder: Path, short: str) -> None:
    base = nano.make("wan", folder)
    one, five = (pair_of(base, folder / "wan" / "changed", frames) for frames in (1, 5))
    assert cost_of_pair(five).evaluation.flops > 2.5 * cost_of_pair(one).evaluation.flops
    assert cost_of_pair(five).decoding.flops > 1.5 * cost_of_pair(one).decoding.flops
    assert batch_to_sample(five, 1) == CPU_BATCH // 3
    whole = size(short, frames=9)
    assert whole.single == size(short).sampling
    assert whole.sampling.evaluation.flops > 3 * whole.single.evaluation.flops
