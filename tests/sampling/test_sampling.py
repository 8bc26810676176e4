"""The sampler against diffusers' own pipeline, whatever the batch, and when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from audit.config import Solver
from audit.errors import DeviceMemoryError, SamplingError
from audit.fits import Fits
from audit.models.pair import ModelPair
from audit.sampling.guidance import ClassifierFree, Direct, Guidance, ModelGuidance
from audit.sampling.sampler import Sampler, make_schedule
from tests.conftest import CAPTION


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize(("guidance", "scale"), [(Direct(), 1.0), (ClassifierFree(), 3.0)])
def test_direct_and_cfg_are_the_images_of_diffusers_pipeline(
    kohya_pair: ModelPair, solver: Solver, guidance: Guidance, scale: float
) -> None:
    sampler = Sampler(kohya_pair, guidance, [CAPTION], solver, steps=8, w=scale)
    pipeline = StableDiffusionPipeline(
        vae=kohya_pair.vae,
        text_encoder=kohya_pair.tuned.text_encoder,
        tokenizer=kohya_pair.tuned.tokenizer,
        unet=kohya_pair.tuned.unet,
        scheduler=make_schedule(kohya_pair, solver, 4).scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.cat([sampler.noise(index) for index in range(3)])
    theirs = pipeline(
        [CAPTION] * 3, latents=noise, guidance_scale=scale, num_inference_steps=8, output_type="latent"
    ).images
    ours = sampler.latents([0, 1, 2])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        pixels = pipeline(
            [CAPTION] * 3, latents=noise, guidance_scale=scale, num_inference_steps=8, output_type="np"
        ).images
    assert np.abs(kohya_pair.decode(ours).astype(int) - (pixels * 255).round().astype(int)).max() <= 1


def test_an_image_is_the_same_in_every_batch(kohya_pair: ModelPair) -> None:
    def images(batch_size: int, indices: list[int]) -> np.ndarray:
        sampler = Sampler(kohya_pair, ModelGuidance(), [CAPTION, "sks"], steps=5, seed=3, batch_size=batch_size)
        return np.concatenate([batch.images for batch in sampler.batches(indices)])

    together = images(8, list(range(8)))
    assert np.abs(images(3, list(range(8))).astype(int) - together).max() <= 1
    assert np.abs(images(1, [5])[0].astype(int) - together[5]).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 20


def test_seeds_give_different_images_and_the_same_seed_the_same(kohya_pair: ModelPair) -> None:
    one, again, other = (Sampler(kohya_pair, Direct(), [CAPTION], steps=2, seed=s).latents([0]) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1)


def test_captions_share_the_budget_evenly(kohya_pair: ModelPair) -> None:
    sampler = Sampler(kohya_pair, Direct(), ["a", "b", "c"])
    assert [sampler.caption_of(index) for index in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_when_memory_runs_out_the_batch_is_halved(kohya_pair: ModelPair) -> None:
    def limited(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    sampler = Sampler(kohya_pair, Direct(), [CAPTION], steps=2, batch_size=8)
    unlimited = np.concatenate([batch.images for batch in sampler.batches(range(5))])
    hook = kohya_pair.tuned.unet.register_forward_pre_hook(limited)
    try:
        batches = list(sampler.batches(range(5)))
    finally:
        hook.remove()
        kohya_pair.fits = Fits()  # what it has learnt is not true of the next test
    assert [batch.indices for batch in batches] == [[0, 1], [2, 3], [4]]
    assert np.abs(np.concatenate([b.images for b in batches]).astype(int) - unlimited).max() <= 1


def test_memory_for_not_one_image_is_a_clear_error(kohya_pair: ModelPair) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = kohya_pair.tuned.unet.register_forward_pre_hook(refuse)
    try:
        with pytest.raises(DeviceMemoryError, match="not one image fits"):
            list(Sampler(kohya_pair, Direct(), [CAPTION], steps=2).batches([0]))
    finally:
        hook.remove()


def test_numbers_that_are_not_finite_are_a_clear_error(kohya_pair: ModelPair) -> None:
    with pytest.raises(SamplingError, match="not finite"):
        list(Sampler(kohya_pair, ModelGuidance(), [CAPTION], steps=3, w=1e30).batches([0]))


def test_another_error_of_the_network_is_not_taken_for_memory(kohya_pair: ModelPair) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    hook = kohya_pair.tuned.unet.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="shapes"):
            list(Sampler(kohya_pair, Direct(), [CAPTION], steps=2).batches([0]))
    finally:
        hook.remove()
