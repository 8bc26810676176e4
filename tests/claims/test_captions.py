"""Captions and N0 from users and from metadata that anybody could have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audit.claims.captions import (
    MAX_CAPTION_CHARACTERS,
    MAX_TRAINING_IMAGES,
    captions_from_metadata,
    choose_captions,
    choose_n0,
)
from audit.errors import AuditError
from audit.models.safetensors_header import read_header
from tests.conftest import KOHYA

DIRS = {"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 6}, "2_reg": {"img_count": 4}})}


def test_the_shipped_lora_says_its_caption_and_number_of_images() -> None:
    metadata = read_header(KOHYA).metadata
    captions, _ = choose_captions([], None, metadata)
    count, warnings = choose_n0(None, metadata)
    assert [(c.text, c.source) for c in captions] == [("sks 3d render of an animal", "modelspec.trigger_phrase")]
    assert (count.count, count.source, warnings) == (10, "ss_dataset_dirs", [])


def test_the_user_comes_first(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("# a comment\na cat\n\nanother  cat\n")
    captions, _ = choose_captions(["mine"], tmp_path / "captions.txt", DIRS)
    assert [(c.text, c.source) for c in captions] == [("mine", "user"), ("a cat", "file"), ("another cat", "file")]
    assert choose_n0(3, DIRS)[0].source == "user"


def test_kohya_folders_and_tags_become_captions() -> None:
    tags = {"10_sks dog": {"sks dog": 6, "outdoors": 5, "rare": 1}}
    found = captions_from_metadata(DIRS | {"ss_tag_frequency": json.dumps(tags)})
    assert [c.text for c in found] == ["sks dog", "reg", "sks dog, outdoors"]
    assert choose_n0(None, DIRS)[0].count == 10


@pytest.mark.parametrize(
    "value",
    [
        "",
        "not json",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"a": 1}',
        '{"a": {"img_count": "x"}}',
        '{"a": {"img_count": -4}}',
    ],
)
def test_broken_metadata_falls_back_to_the_default_and_says_so(value: str) -> None:
    metadata = {"ss_dataset_dirs": value, "ss_tag_frequency": value, "modelspec.trigger_phrase": " \n "}
    count, warnings = choose_n0(None, metadata)
    assert (count.count, count.source) == (10, "default")
    assert "not known" in warnings[0]
    captions, warnings = choose_captions([], None, metadata)
    assert [c.text for c in captions] == [""]
    assert "empty caption" in warnings[0]


def test_claims_are_bounded() -> None:
    huge = {"ss_dataset_dirs": json.dumps({"1_x": {"img_count": 10**9}})}
    count, warnings = choose_n0(None, huge)
    assert count.count == MAX_TRAINING_IMAGES
    assert "1000000000" in warnings[0]
    long = {"modelspec.trigger_phrase": "\x1b[31m" + "x" * 10**6}
    text = captions_from_metadata(long)[0].text
    assert len(text) == MAX_CAPTION_CHARACTERS
    assert "\x1b" not in text


def test_a_caption_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in (
        ("empty.txt", "holds no captions"),
        ("binary.txt", "cannot be read"),
        ("none.txt", "cannot be read"),
    ):
        with pytest.raises(AuditError, match=words):
            choose_captions([], tmp_path / name, {})


def test_the_class_of_regularisation_images_is_no_caption() -> None:
    metadata = {
        "ss_dataset_dirs": json.dumps({"10_sks animal": {"n_repeats": 10, "img_count": 10}}),
        "ss_reg_dataset_dirs": json.dumps({"1_3d render of an animal": {"n_repeats": 1, "img_count": 100}}),
        "ss_tag_frequency": json.dumps(
            {"10_sks animal": {"sks animal": 10}, "1_3d render of an animal": {"3d render of an animal": 100}}
        ),
    }
    assert [one.text for one in captions_from_metadata(metadata)] == ["sks animal"]


def test_a_caption_a_picture_is_not_joined_with_the_others() -> None:
    captions = {f"sks animal number {number} in a field": 1 for number in range(10)}
    alone = {"ss_tag_frequency": json.dumps({"10_sks": captions})}
    assert {one.text for one in captions_from_metadata(alone)} >= {"sks", "sks animal number 0 in a field"}
    several = {"a red fox at night": 6, "the blue house by a lake": 4}
    counted = {
        "ss_dataset_dirs": json.dumps({"10_sks": {"img_count": 10}}),
        "ss_tag_frequency": json.dumps({"10_sks": several}),
    }
    assert [one.text for one in captions_from_metadata(counted)] == ["sks", *several]


def test_tags_that_images_share_are_one_caption() -> None:
    tags = {"sks": 10, "animal": 9, "red": 4, "night": 1}
    metadata = {
        "ss_dataset_dirs": json.dumps({"10_x": {"img_count": 10}}),
        "ss_tag_frequency": json.dumps({"10_x": tags}),
    }
    assert [one.text for one in captions_from_metadata(metadata)] == ["x", "sks, animal"]
