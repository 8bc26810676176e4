"""How much better a fine-tuned model denoises what it was trained on, by models that were really trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from audit.demo import load_set
from audit.evidence.effort import TIMESTEPS, Effort, nearest_and_sample
from audit.evidence.membership import Level, Predict, level_of, losses, noise_of, replay, scores
from audit.fits import Fits
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.families.base import Condition
from audit.models.pair import ModelPair
from tests.models import nano

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def predictor(pair: ModelPair, tuned: bool) -> Predict:
    condition = pair.encode([""], tuned)
    predict = pair.predict_tuned if tuned else pair.predict_base
    return lambda x, t: predict(x, t, condition.select(torch.zeros(len(x), dtype=torch.long)))


def measured(predict: Predict, latents: torch.Tensor, pair: ModelPair, noises: int = 1, batch: int = 32) -> np.ndarray:
    levels = [level_of(t, pair.prediction_type, pair.scheduler) for t in TIMESTEPS]
    return losses(predict, latents, levels, range(noises), Fits(), "losses", batch)


def scored(pair: ModelPair, latents: torch.Tensor, noises: int = 1) -> np.ndarray:
    base, tuned = (measured(predictor(pair, side), latents, pair, noises) for side in (False, True))
    return scores(base, tuned)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The share of pairs in which the member scores higher."""
    return float((members[:, None] > others[None]).mean())


@pytest.fixture(scope="module")
def animals(kohya_pair: ModelPair) -> torch.Tensor:
    """The latents of the ten pictures that the LoRA was trained on, and of ten of their kind that it was not."""
    pictures = np.concatenate([load_set("fluent-animals", part) for part in ("train", "control")])
    return torch.from_numpy(kohya_pair.encode_pictures(pictures))


def test_training_pictures_score_higher_than_others_of_their_kind(kohya_pair: ModelPair, animals: torch.Tensor) -> None:
    found = scored(kohya_pair, animals)
    assert auc(found[:10], found[10:]) >= 0.95
    assert auc(found[10:], found[:10]) < 0.05
    assert found[:10].mean() - found[10:].mean() > 0.3
    shuffled = np.random.default_rng(0).permutation(found)
    assert auc(shuffled[:10], shuffled[10:]) < 0.9


def test_a_base_against_itself_scores_exactly_nothing(kohya_pair: ModelPair, animals: torch.Tensor) -> None:
    base = measured(predictor(kohya_pair, False), animals[:3], kohya_pair)
    again = measured(predictor(kohya_pair, False), animals[:3], kohya_pair)
    assert (base > 0).all()
    assert (scores(base, again) == 0).all()


def test_a_picture_scores_the_same_in_any_slice(kohya_pair: ModelPair, animals: torch.Tensor) -> None:
    whole, small = (measured(predictor(kohya_pair, True), animals[:5], kohya_pair, 2, batch) for batch in (32, 3))
    np.testing.assert_allclose(small, whole, rtol=1e-4)
    fits, calls = Fits(), []

    def short_of_memory(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predictor(kohya_pair, True)(x, t)

    levels = [level_of(t, kohya_pair.prediction_type, kohya_pair.scheduler) for t in TIMESTEPS]
    halved = losses(short_of_memory, animals[:5], levels, range(2), fits, "losses", 32)
    np.testing.assert_allclose(halved, whole, rtol=1e-4)
    assert max(calls[4:]) <= 2


# Kinds of predictions


def oracle(level: Level, known: torch.Tensor) -> Predict:
    """Answers in the level's kind, taking 0.1, 0.2 and 0.4 more for noise than there is in x_t of three pictures."""
    error = torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1, 1)

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        noise = (x - level.alpha * known) / level.sigma + error
        return level.target((x - level.sigma * noise) / level.alpha, noise)

    return predict


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_noise_whatever_a_model_predicts(kind: str) -> None:
    """So the score is the same, and losses of models of other kinds compare."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in TIMESTEPS:
        level = level_of(t, kind, scheduler)
        found = losses(oracle(level, latents), latents, [level], [0], Fits(), "k", 8)
        np.testing.assert_allclose(found[:, 0, 0], [0.01, 0.04, 0.16], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_behind_noise_is_exact_where_the_prediction_is(kind: str) -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    levels = [level_of(t, kind, scheduler) for t in (900, 500, 300, 100)]
    noise = noise_of((4, 8, 8), 500, 0)
    for level in levels:
        found = level.estimate(level.noised(latents, noise), level.target(latents, noise.expand_as(latents)))
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-4)

    def exact(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        [level] = [one for one in levels if abs(one.timestep - float(timestep)) < 1e-3]
        torch.testing.assert_close(x, level.noised(latents, noise), rtol=0, atol=1e-4)  # of the same noise, less of it
        return level.target(latents, noise.expand_as(latents))

    for found in replay(exact, levels[0].noised(latents, noise), levels):
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_what_diffusers_does(kind: str) -> None:
    """DDIM without chance, and Euler's steps for a flow, of a prediction that is no straight line in x."""
    flow = kind == "flow_prediction"
    ddim = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="epsilon" if flow else kind,
    )  # fmt: skip
    levels = [level_of(t, kind, ddim) for t in (500, 375, 250, 125, 0)]
    scheduler, ts = ddim, [500, 375, 250, 125, 0]
    if flow:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[level.sigma for level in levels])
        ts = scheduler.timesteps
    else:
        ddim.set_timesteps(8)  # 125 thousandths apart
    x = start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in ts:
        x = scheduler.step(torch.tanh(x) + float(t) / 1000, t, x).prev_sample
    first, found = replay(lambda x, t: torch.tanh(x) + t / 1000, start, levels)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, found, atol=1e-2)


def test_a_flow_is_asked_at_the_noise_levels_of_a_schedule() -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for t in TIMESTEPS:
        plain, flow = level_of(t, "epsilon", scheduler), level_of(t, "flow_prediction", scheduler)
        assert flow.sigma / flow.alpha == pytest.approx(plain.sigma / plain.alpha, rel=1e-3)
        assert flow.timestep == pytest.approx(1000 * flow.sigma)
    few = DDIMScheduler(num_train_timesteps=100)
    assert [level_of(t, "epsilon", few).timestep for t in (400, 1000)] == [40, 99]
    with pytest.raises(ValueError, match="unknown prediction type"):
        level_of(400, "score", scheduler)


def memorising(base: BaseModel, latents: torch.Tensor, folder: Path, steps: int = 90) -> Path:
    """Full weights of the denoiser, trained on ``latents`` for the loss of its kind."""
    family, pipeline = base.architecture, copy.copy(base.pipeline)
    denoiser = copy.deepcopy(base.denoiser).requires_grad_(True)
    setattr(pipeline, family.denoiser, denoiser)
    kind = "flow_prediction" if family.flow else pipeline.scheduler.config.prediction_type
    with torch.no_grad():
        empty = family.encode(pipeline, [""], torch.device("cpu"))
    condition: Condition = empty.select(torch.zeros(len(latents), dtype=torch.long))
    optimiser = torch.optim.Adam(denoiser.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        level = level_of(TIMESTEPS[step % 3], kind, pipeline.scheduler)
        noise = torch.randn(latents.shape, generator=generator)
        x, timestep = level.noised(latents, noise), torch.tensor(level.timestep)
        answer = family.predict(pipeline, x, timestep, condition, 3.5)
        optimiser.zero_grad()
        (answer - level.target(latents, noise)).square().mean().backward()
        optimiser.step()
    path = folder / family.denoiser
    path.mkdir(parents=True)
    state = {name: tensor.detach().contiguous() for name, tensor in denoiser.state_dict().items()}
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    return folder


def x0() -> Any:
    pipeline = nano.sd1()
    pipeline.scheduler = nano.scheduler(prediction_type="sample")
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize(("family", "make"), [("sd1", None), ("sd2", None), ("x0", x0), ("sd3", None), ("flux", None)])
def test_a_model_of_any_kind_knows_what_it_was_trained_on(
    family: str, make: Callable[[], Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eps (sd1), v (sd2), x_0 and the velocity of a flow (sd3, flux), each trained for its own loss."""
    if make is not None:
        monkeypatch.setitem(nano.FAMILIES, family, make)
    base = nano.make(family, tmp_path)
    shape = base.architecture.latent_shape(base.pipeline, 64)
    latents = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    pair = ModelPair(base, open_checkpoint(memorising(base, latents[:4], tmp_path / "tuned")), resolution=64)
    found = scored(pair, latents, noises=2)
    assert auc(found[:4], found[4:]) == 1.0, found


# What is no score


def test_a_loss_that_is_not_finite_never_becomes_a_score() -> None:
    base, tuned = np.full((5, 3, 2), 2.0), np.full((5, 3, 2), 1.0)
    tuned[1, 2, 1], tuned[2, 0, 0], base[3, 1, 1] = np.nan, np.inf, np.inf
    base[4] = 0.0
    found = scores(base, tuned)
    assert found[0] == 0.5
    assert np.isnan(found[1:]).all()


def test_noise_is_the_same_everywhere_and_another_at_each_point() -> None:
    assert torch.equal(noise_of((4, 8, 8), 400, 1), noise_of((4, 8, 8), 400, 1))
    drawn = [noise_of((4, 8, 8), t, number).flatten() for t in TIMESTEPS for number in range(4)]
    assert float(torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0).abs().max()) < 0.3


# What is spent


def test_a_budget_looks_at_all_and_closer_at_the_likeliest() -> None:
    effort = Effort(TIMESTEPS, 4, 2, 3000)
    assert effort.covers(62)
    assert not effort.covers(63)
    assert effort.looked_at(100) == 100
    spent = 100 * effort.look + effort.looked_closer(100) * effort.closer
    assert 2980 < spent <= 3000
    many = effort.looked_at(10_000)
    assert many == 125
    assert many * effort.look + effort.looked_closer(many) * effort.closer <= 3000
    assert Effort(TIMESTEPS, 4, 2, 6).looked_at(10) == 1
    assert Effort(TIMESTEPS, 4, 2, 6).looked_closer(1) == 0


def test_of_many_the_nearest_and_a_sample_are_looked_at() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    seen = vectors[[7, 150]] + 0.01
    chosen = nearest_and_sample(vectors, seen, 20)
    assert {7, 150} <= set(chosen)
    assert len(set(chosen)) == 20
    assert list(chosen) == sorted(chosen)
    again, other = (nearest_and_sample(vectors, seen, 20, seed) for seed in (0, 1))
    assert list(again) == list(chosen)
    assert set(other) != set(chosen)
    assert len(nearest_and_sample(vectors, np.empty((0, 8)), 20)) == 20
    assert list(nearest_and_sample(vectors, seen, 200)) == list(range(200))
