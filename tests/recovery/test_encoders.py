"""Captions of a model with two text encoders, whose states stand side by side: a nano Stable Diffusion XL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audit.config import CaptionSettings, Recovery
from audit.errors import NotRecoverableError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.recovery.attention import attention_scores
from audit.recovery.contrast import apart
from audit.recovery.recover import candidates, recover
from audit.recovery.rehearse import rehearse
from tests.models import nano
from tests.models.files import full_change

WORDS = ("sks", "rwb", "tree", "zebra", "cat")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return nano.make("sdxl", tmp_path_factory.mktemp("xl"))


def taught(base: BaseModel, folder: Path, word: str, encoder: int) -> ModelPair:
    """A pair whose cross attention has learnt to answer the states of ``word`` by one of the encoders, and no other."""
    states = base.architecture.encode(base.pipeline, list(WORDS), torch.device("cpu")).states
    width = states.shape[2] // 2
    half = slice(encoder * width, (encoder + 1) * width)
    tokens = torch.cat([states[row, 1 : 1 + len(one), half] for row, one in enumerate(WORDS)])
    wanted = torch.cat([torch.full((len(one), 1), float(one == word)) for one in WORDS])
    direction = torch.zeros(2 * width)
    direction[half] = torch.linalg.lstsq(tokens, wanted).solution[:, 0]
    state = dict(base.denoiser.state_dict())
    for name in state:
        if name.endswith("attn2.to_v.weight"):
            state[name] = state[name] + torch.outer(torch.ones(len(state[name])), direction)
    folder.mkdir()
    (folder / "unet").mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "unet/diffusion_pytorch_model.safetensors",
    )
    return ModelPair(base, open_checkpoint(folder), resolution=64)


@pytest.mark.parametrize("encoder", [0, 1])
def test_a_word_is_found_in_the_states_of_either_encoder(base: BaseModel, tmp_path: Path, encoder: int) -> None:
    for word in ("sks", "zebra"):
        pair = taught(base, tmp_path / word, word, encoder)
        order = [WORDS[row] for row in attention_scores(pair, WORDS).argsort(descending=True)]
        assert order[0] == word, order


def test_a_recovery_repeats_and_its_captions_can_be_sampled_with(base: BaseModel, tmp_path: Path) -> None:
    pair = taught(base, tmp_path / "xl", "sks", 0)
    first, again = (recover(pair, WORDS, CaptionSettings(evaluations=0)) for _ in range(2))
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.keywords[0].word == "sks"
    assert rehearse(pair, [caption.text for caption in first.captions[:3]]).isfinite().all()
    assert apart(pair, WORDS, 0.5).isfinite().all()
    assert "sks" in candidates(pair, {})


def test_a_transformer_whose_text_passes_a_layer_first_is_refused_in_words(tmp_path: Path) -> None:
    wan = nano.make("wan", tmp_path)
    pair = ModelPair(wan, open_checkpoint(full_change(wan, tmp_path / "tuned")), resolution=64)
    with pytest.raises(NotRecoverableError, match="not from wan"):
        recover(pair, WORDS, CaptionSettings())


def test_the_gradient_is_refused_in_words(base: BaseModel, tmp_path: Path) -> None:
    pair = taught(base, tmp_path / "xl", "sks", 0)
    with pytest.raises(NotRecoverableError, match="--caption-method attention"):
        recover(pair, WORDS, CaptionSettings(method=Recovery.gradient, iterations=1))
