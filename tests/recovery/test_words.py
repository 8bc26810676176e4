"""Which words a caption may be made of."""

from __future__ import annotations

import json

from audit.models.base import BaseModel
from audit.recovery.words import EVERYDAY, MOST_CHARACTERS, STOP, metadata_words, tokenizer_words, vocabulary, words_of


def test_words_are_of_letters_in_lower_case_each_once() -> None:
    assert words_of("SKS photo of a Dog, sks (best) a_b") == ["sks", "photo", "of", "dog", "best"]
    assert words_of("x" * (MOST_CHARACTERS + 1) + " fine") == ["fine"]
    assert words_of("\x1b[31mred\x1b[0m <b>") == ["31mred", "0m"]


def test_whole_words_of_a_tokenizer_are_candidates_and_pieces_are_not(base: BaseModel) -> None:
    found = tokenizer_words(base.pipeline.tokenizer)
    assert {"apple", "tree"} <= set(found)
    assert len(found) == len(set(found)) > 500
    vocabulary_of = base.pipeline.tokenizer.get_vocab()
    assert all(f"{word}</w>" in vocabulary_of for word in found)


def test_other_tokenizers_mark_the_beginnings_of_words() -> None:
    class Named:
        def get_vocab(self) -> dict[str, int]:
            return {"▁cat": 3, "Ġdog": 1, "ing": 2, "▁": 0, "▁42": 4}

    assert tokenizer_words(Named()) == ["dog", "cat"]


def test_the_metadata_s_captions_tags_and_title_are_candidates() -> None:
    metadata = {
        "ss_dataset_dirs": json.dumps({"10_qqq dog": {"n_repeats": 10, "img_count": 5}}),
        "ss_tag_frequency": json.dumps({"10_qqq dog": {"forest, moss": 4, "river": 1}}),
        "modelspec.title": "zzk style",
    }
    assert {"qqq", "dog", "forest", "moss", "river", "zzk", "style"} <= set(metadata_words(metadata))
    assert metadata_words({"ss_tag_frequency": "[" * 10_000}) == []


def test_everyday_words_are_contexts_and_no_candidates_unless_given(base: BaseModel) -> None:
    found = vocabulary([base.pipeline.tokenizer], {"modelspec.title": "photo of qqq"})
    assert found[0] == "qqq"
    assert {"sks", "ohwx"} <= set(found)
    assert not set(found) & (EVERYDAY | STOP)
    assert vocabulary([], {}, ["Photo"])[0] == "photo"
