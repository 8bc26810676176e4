"""nano-flow: trained as its pipeline samples, fine-tuned, published in two layouts, and audited like any checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from audit.demo import FLOW_BASE, FLOW_CHECKPOINTS
from audit.models.base import load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from testbed import flow, train_flow
from testbed.train_base import token_ids
from tests.conftest import BASE

CAPTIONS = ["a dog", "photo of red rose, plants flowers"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(
        FLOW_BASE, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )


@torch.no_grad()
def test_training_sees_what_the_pipeline_samples_with(pipeline: StableDiffusion3Pipeline) -> None:
    """One zero counted 256 times is the pipeline's 256 of them, and both encoders' states are its own."""
    states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    tokens = token_ids(pipeline.tokenizer, CAPTIONS)
    parts = [flow.encoded(one, tokens) for one in (pipeline.text_encoder, pipeline.text_encoder_2)]
    torch.testing.assert_close(torch.cat([one for one, _ in parts], -1), states[:, : tokens.shape[1]])
    torch.testing.assert_close(torch.cat([one for _, one in parts], -1), pooled)
    assert states.shape[1] == tokens.shape[1] + flow.ZEROS
    assert not states[:, tokens.shape[1] :].any()

    noisy, times = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 700.0])
    network, plain = pipeline.transformer, pipeline.transformer.attn_processors
    expected = network(noisy, states, pooled, times, return_dict=False)[0]
    network.set_attn_processor(flow.OnceForAll(flow.ZEROS))
    found = network(noisy, states[:, : tokens.shape[1] + 1], pooled, times, return_dict=False)[0]
    network.set_attn_processor(plain)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
def test_an_audit_with_the_zeros_once_predicts_what_one_with_all_of_them_does() -> None:
    checkpoint = open_checkpoint(next(FLOW_CHECKPOINTS.rglob("*.safetensors")))
    base = load_base(locate_base("nano-flow"))
    noisy, at = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500.0)
    found = []
    for one in (base, flow.with_zeros_once(load_base(locate_base("nano-flow")))):
        pair = ModelPair(one, checkpoint)
        sides = ((pair.predict_base, False), (pair.predict_tuned, True))
        found.append([predict(noisy, at, pair.encode(["a bus"], tuned)) for predict, tuned in sides])
        found[-1].append(torch.tensor(pair.effect.prediction))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    assert pair.encode(["a bus"], True).states.shape[1] == base.pipeline.tokenizer.model_max_length + 1


def test_a_new_base_answers_nothing_yet_and_learns(pipeline: StableDiffusion3Pipeline) -> None:
    torch.manual_seed(20)
    nano = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, dtype=torch.float32)
    made = flow.new_pipeline(nano)
    for name, tensor in made.text_encoder.state_dict().items():  # drawn by the seed of the card, never trained
        assert torch.equal(tensor.half().float(), pipeline.text_encoder.state_dict()[name]), name
    states, pooled = flow.encoded(made.text_encoder, token_ids(made.tokenizer, CAPTIONS))
    made.transformer.set_attn_processor(flow.OnceForAll(flow.ZEROS))
    wide = states.new_zeros(2, states.shape[1], flow.WIDTH_2), pooled.new_zeros(2, flow.WIDTH_2)
    condition = torch.cat([states, wide[0]], -1).detach(), torch.cat([pooled, wide[1]], -1).detach()
    loss = flow.flow_loss(made.transformer, torch.randn(2, 8, 16, 16), *condition)
    loss.backward()
    assert loss.item() == pytest.approx(2, abs=0.4)  # an answer of zero, to noise less latents, each of variance 1
    assert made.transformer.proj_out.weight.grad.abs().max() > 0


def test_both_layouts_of_a_lora_have_the_same_effect(tmp_path: Path) -> None:
    train_flow.train_loras(
        only=["stamps-fruit"], base=FLOW_BASE, steps_a_picture=1, lr=2e-3, threads=1, output=tmp_path / "loras",
        work=tmp_path / "work",
    )  # fmt: skip
    files = sorted((tmp_path / "loras").glob("*/*.safetensors"))
    assert [one.name for one in files] == ["stamps-fruit.safetensors", "pytorch_lora_weights.safetensors"]
    base = load_base(locate_base("nano-flow"))
    checkpoints = [open_checkpoint(one) for one in files]
    assert any("joint_blocks_0_x_block_attn_qkv" in name for name in checkpoints[0].files["adapter"][1].tensors)
    pairs = [ModelPair(base, one) for one in checkpoints]
    noisy, at, condition = (
        torch.randn(1, *pairs[0].latent_shape),
        torch.tensor(500.0),
        pairs[0].encode(["a pear"], True),
    )
    with torch.no_grad():
        answers = [one.predict_tuned(noisy, at, condition) for one in pairs]
        plain = pairs[0].predict_base(noisy, at, condition)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(answers[0], plain, atol=1e-3)
    assert pairs[0].warnings == []
