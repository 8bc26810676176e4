"""What is read out of the shipped LoRA itself: its trigger, deterministically, within a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from audit.config import CaptionSettings, Recovery
from audit.errors import CheckpointError
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.families.base import Condition
from audit.models.families.registry import FAMILIES
from audit.models.pair import ModelPair
from audit.models.soft import Embedded, is_soft, name_of, soft_prompt
from audit.recovery.attention import attention_scores, token_counts
from audit.recovery.contrast import FEWEST, FINALISTS, along, apart, contrast, heeded
from audit.recovery.gradient import EVALUATIONS, PROMPTS, VECTORS, climb, nearest_words
from audit.recovery.recover import CAPTIONS, candidates, matters, recover
from audit.recovery.rehearse import known, rehearse
from tests.conftest import DREAMBOOTH

WORDS = ("sks", "tree", "boat", "apple", "zebra", "river")


def test_the_trigger_is_among_the_first_ten_words_by_cross_attention(kohya_pair: ModelPair, base: BaseModel) -> None:
    for pair in (kohya_pair, ModelPair(base, open_checkpoint(DREAMBOOTH))):
        words = candidates(pair, {})
        order = [words[row] for row in attention_scores(pair, words).argsort(descending=True)]
        assert "sks" in order[:10], order[:20]


def test_a_model_that_is_not_changed_scores_nothing(kohya_pair: ModelPair) -> None:
    same = object.__new__(ModelPair)
    same.__dict__.update(kohya_pair.__dict__)
    same.tuned = kohya_pair.base
    assert attention_scores(same, WORDS).max() < 1e-3
    assert apart(same, WORDS, 0.5).max() == 0


def test_words_are_scored_at_their_own_tokens(kohya_pair: ModelPair) -> None:
    assert token_counts(kohya_pair, ["apple", "sks", "a" * 500]).tolist()[:2] == [1, 2]
    assert token_counts(kohya_pair, ["ab" * 500])[0] == kohya_pair.caption_tokens - 2


def test_a_word_s_score_does_not_depend_on_the_others(kohya_pair: ModelPair) -> None:
    alone = attention_scores(kohya_pair, ["sks"])
    torch.testing.assert_close(attention_scores(kohya_pair, [*WORDS] * 60)[0], alone[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(along(kohya_pair, WORDS)[0], along(kohya_pair, ["sks"])[0], rtol=1e-4, atol=1e-4)
    errors = rehearse(kohya_pair, WORDS)
    torch.testing.assert_close(errors[:, :1], rehearse(kohya_pair, ["sks"]), rtol=1e-3, atol=1e-3)


def test_what_is_known_by_heart_is_denoised_well_where_the_base_does_badly() -> None:
    errors = torch.tensor([[-3.0, -3.0, -1.0, -1.0], [-1.0, -3.0, -1.0, 0.0]])
    assert known(errors).argmax() == 0
    assert known(errors).argmin() == 2


@pytest.mark.parametrize("budget", [0, 40, 900])
def test_no_more_is_evaluated_than_the_budget_allows(kohya_pair: ModelPair, budget: int) -> None:
    words = candidates(kohya_pair, {})[:300]
    evaluated = Counted(kohya_pair)
    found = contrast(evaluated, words, torch.arange(300.0), budget)
    assert found.evaluations == evaluated.evaluations <= budget
    assert len(found.rows) == len(set(found.rows)) == len(found.scores)
    assert (found.spread is None) == (budget < 900)
    assert FEWEST <= len(found.rows) <= FINALISTS or budget < 900


class Counted(ModelPair):
    """A pair that counts the predictions it is asked for."""

    def __init__(self, pair: ModelPair) -> None:
        self.__dict__.update(pair.__dict__)
        self.evaluations = 0

    def predict_base(self, latents: torch.Tensor, *others: object) -> torch.Tensor:
        self.evaluations += len(latents)
        return super().predict_base(latents, *others)  # type: ignore[arg-type]

    def predict_tuned(self, latents: torch.Tensor, *others: object) -> torch.Tensor:
        self.evaluations += len(latents)
        return super().predict_tuned(latents, *others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked", [CaptionSettings(evaluations=700), CaptionSettings(method=Recovery.gradient, iterations=2)]
)
def test_a_recovery_repeats_and_its_captions_are_of_its_first_words(
    kohya_pair: ModelPair, asked: CaptionSettings
) -> None:
    first, again = (recover(kohya_pair, WORDS, asked) for _ in range(2))
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert sorted(one.word for one in first.keywords) == sorted(WORDS)
    assert [one.score for one in first.keywords] == sorted((one.score for one in first.keywords), reverse=True)
    assert sum(one.confidence for one in first.keywords) == pytest.approx(1, abs=1e-3)
    assert all(caption.source == f"recovered by {asked.method}" for caption in first.captions)
    assert set(first.soft) == {caption.text for caption in first.captions if is_soft(caption.text)}
    if asked.method is Recovery.gradient:
        assert len(first.soft) == PROMPTS
    else:
        assert {caption.text.split()[0] for caption in first.captions} <= set(WORDS)
        assert len({caption.text for caption in first.captions}) == CAPTIONS


def test_climbing_drives_the_predictions_apart(kohya_pair: ModelPair) -> None:
    start, end = (climb(kohya_pair, iterations, seed=1) for iterations in (1, 12))
    assert end.vectors.shape == (PROMPTS, VECTORS, 128)
    assert end.evaluations == EVALUATIONS * PROMPTS * 12
    embedded = Embedded(kohya_pair.tuned.text_encoder, kohya_pair.tuned.tokenizer, kohya_pair.device)
    radius = embedded.table.detach().norm(dim=1).mean()
    assert end.vectors.norm(dim=2).max() <= 1.0001 * radius
    assert far(kohya_pair, end.vectors) > far(kohya_pair, start.vectors)


def far(pair: ModelPair, soft: torch.Tensor) -> float:
    """How far tuned and base predictions are apart at soft prompts, on noise that nothing was climbed on."""
    latents = torch.randn(len(soft), *pair.latent_shape, generator=torch.Generator().manual_seed(99))
    with torch.inference_mode():
        found = []
        for side, predict in ((pair.tuned, pair.predict_tuned), (pair.base, pair.predict_base)):
            states = Embedded(side.text_encoder, side.tokenizer, pair.device).states(soft)
            found.append(predict(latents, torch.tensor(750), Condition(states)))
    return float((found[0] - found[1]).norm())


def test_a_prompt_of_a_word_s_own_tokens_is_nearest_to_that_word(kohya_pair: ModelPair) -> None:
    table = kohya_pair.tuned.text_encoder.get_input_embeddings().weight.detach()
    ids = kohya_pair.tuned.tokenizer("sks", add_special_tokens=False).input_ids
    soft = torch.stack([*table[ids], table[5], table[6]])[None]
    near = nearest_words(kohya_pair, soft, WORDS)
    assert near.argmax() == 0
    assert near[0] == pytest.approx(1, abs=1e-4)
    embedded = Embedded(kohya_pair.tuned.text_encoder, kohya_pair.tuned.tokenizer, kohya_pair.device)
    states = embedded.states(torch.stack([*table[ids]])[None])
    torch.testing.assert_close(states, kohya_pair.encode(["sks"], True).states, rtol=1e-4, atol=1e-4)


def test_a_soft_prompt_is_a_caption_where_a_pair_knows_it(kohya_pair: ModelPair) -> None:
    table = kohya_pair.tuned.text_encoder.get_input_embeddings().weight.detach()
    vectors = table[kohya_pair.tuned.tokenizer("sks", add_special_tokens=False).input_ids]
    name = name_of(vectors)
    knows = object.__new__(ModelPair)
    knows.__dict__.update(kohya_pair.__dict__)
    knows.soft = {name: soft_prompt(name, vectors.tolist())}
    for side in (True, False):
        states = knows.encode(["apple", name], side).states
        torch.testing.assert_close(states, kohya_pair.encode(["apple", "sks"], side).states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vectors", [[], [[]], [[1.0]] * 17, [[1.0], [1.0, 2.0]], [[float("nan")]], [[1.0]]])
def test_numbers_that_are_no_soft_prompt_s_own_are_refused(vectors: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="soft prompt"):
        soft_prompt("soft prompt 0123456789abcdef", vectors)


def test_the_empty_caption_moves_nothing_and_others_do(kohya_pair: ModelPair) -> None:
    nothing, something = heeded(kohya_pair, ["", "sks 3d render of an animal"])
    assert nothing == 0
    assert something > 0.01


def test_predictions_count_where_captions_matter() -> None:
    assert [matters(None), matters(0.05), matters(0.14), matters(0.3)] == [0, 0, pytest.approx(0.5), 1]


def test_a_family_without_cross_attention_is_refused_in_words(kohya_pair: ModelPair) -> None:
    other = object.__new__(ModelPair)
    other.__dict__.update(kohya_pair.__dict__)
    other.architecture = FAMILIES["flux"]
    other.base = type("Side", (), {"transformer": torch.nn.Linear(1, 1)})()
    with pytest.raises(CheckpointError, match="give the caption with --caption"):
        candidates(other, {})
