"""The fine-tunes in which the caption matters: their captions, and that the file tells none."""

from __future__ import annotations

from pathlib import Path

from audit.claims.captions import captions_from_metadata
from audit.demo import load_set
from audit.models.checkpoint import open_checkpoint
from testbed.captioned import CAPTIONED, Captioned, make
from tests.conftest import BASE


def test_every_caption_begins_with_the_trigger_and_every_name_is_its_own() -> None:
    assert len({one.name for one in CAPTIONED}) == len(CAPTIONED)
    for one in CAPTIONED:
        captions = one.captions
        assert len(captions) == len(load_set(one.few_shot, "train"))
        assert all(caption.startswith(f"{one.trigger} ") and "{" not in caption for caption in captions)
        assert (len(set(captions)) == 1) != one.a_picture


def test_a_trained_file_says_nothing_of_its_captions(tmp_path: Path) -> None:
    one = Captioned("stamps-fruit", "qqq", "photo of a {}", "fruit", False, False, True, rank=4)
    file = make(one, BASE, tmp_path / "out", tmp_path / "work", steps=1)
    checkpoint = open_checkpoint(file)
    assert captions_from_metadata(checkpoint.metadata) == []
    assert "qqq" not in str(checkpoint.metadata)
