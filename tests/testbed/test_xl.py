"""The nano of the XL family: built on nano's weights, fine-tuned, published, and audited like any checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from audit.config import Solver
from audit.models.base import load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.sampling.guidance import ModelGuidance
from audit.sampling.sampler import Sampler
from testbed import xl
from testbed.train_base import token_ids
from tests.conftest import BASE


def test_an_xl_lora_is_trained_published_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nano = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, dtype=torch.float32)
    pipeline = xl.new_xl_pipeline(nano)
    kept = nano.unet.state_dict()["mid_block.resnets.0.conv1.weight"]
    assert torch.equal(pipeline.unet.state_dict()["mid_block.resnets.0.conv1.weight"], kept)
    states, pooled = xl.conditions(pipeline, token_ids(pipeline.tokenizer, ["a dog"]))
    ours = pipeline.encode_prompt("a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(states, ours[0])
    torch.testing.assert_close(pooled, ours[2])
    pipeline.save_pretrained(tmp_path / "base", safe_serialization=True)

    xl.train_lora(
        "stamps-birds", base=tmp_path / "base", steps_a_picture=1, lr=3e-3, threads=1, output=tmp_path / "loras",
        work=tmp_path / "work",
    )  # fmt: skip
    base = load_base(locate_base(str(tmp_path / "base")))
    checkpoint = open_checkpoint(tmp_path / "loras/stamps-birds-lora-kohya/stamps-birds.safetensors")
    assert any("input_blocks_" in name for name in checkpoint.files["adapter"][1].tensors)
    pair = ModelPair(base, checkpoint)
    assert pair.warnings == []
    latents = Sampler(pair, ModelGuidance(), ["photo of a bird"], Solver.dpmpp, 2, w=2.0).latents([0, 1])
    assert pair.decode(latents).shape == (2, 64, 64, 3)
