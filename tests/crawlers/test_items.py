"""Claims from strangers: cleaning, ranking, families, N0, and what contradicts what."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.claims.captions import (
    MAX_CAPTION_CHARACTERS,
    MAX_CLAIMED_CAPTIONS,
    N0,
    Caption,
    captions_from_metadata,
    clean_prompt,
    n0_claims,
    rank_captions,
)
from audit.models.families.identify import Family, family_of_name, family_of_shapes
from audit.models.safetensors_header import Header, TensorInfo
from crawlers.items import Claim, Item, clean_name, conclude, count_in_prose, hex_of, time_of

ITEM = Item("civitai:1:2:3", "civitai", "1", "2", "x.safetensors", "")


def header(tensors: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Header:
    infos = {name: TensorInfo("F16", shape, 0, 0) for name, shape in tensors.items()}
    return Header(infos, metadata or {}, 8, 8)


SDXL = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 2048)}


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("masterpiece, (best quality:1.2), <lora:foo:0.8>, ((cat)), [dog], BREAK a sks dog, , ,x",
         "masterpiece, best quality, cat, dog, a sks dog, x"),
        ("<lora:only:1>", ""),
        ("plain words", "plain words"),
        ("(((deep:1.1)))", "deep"),
        ("(unclosed", "(unclosed"),
        ("  \x1b[31m red\n\n", "[31m red"),
    ],
)  # fmt: skip
def test_prompts_become_words(prompt: str, clean: str) -> None:
    assert clean_prompt(prompt) == clean


@given(st.text(max_size=3000))
def test_any_prompt_becomes_one_bounded_printable_line_and_stays_so(prompt: str) -> None:
    clean = clean_prompt(prompt)
    assert len(clean) <= MAX_CAPTION_CHARACTERS
    assert all(character.isprintable() for character in clean)
    assert "  " not in clean
    assert clean == clean.strip()
    assert "<lora:" not in clean or ">" not in clean.partition("<lora:")[2]


def test_sources_that_agree_gain_and_near_duplicates_go() -> None:
    found = rank_captions(
        [Caption("SKS dog", "trainedWords", 0.8), Caption("sks dog ", "widget", 0.5), Caption("a cat", "widget", 0.5),
         Caption("dog, sks", "image prompt", 0.3)]
    )  # fmt: skip
    assert [(c.text.lower(), c.source, c.confidence) for c in found] == [
        ("sks dog", "trainedWords", 0.9), ("a cat", "widget", 0.5),
    ]  # fmt: skip


@given(st.lists(st.builds(Caption, st.text(max_size=40), st.sampled_from("abc"), st.floats(0, 1)), max_size=60))
def test_ranking_is_bounded_ordered_and_without_repeats(claims: list[Caption]) -> None:
    found = rank_captions(claims)
    assert len(found) <= MAX_CLAIMED_CAPTIONS
    assert [c.confidence for c in found] == sorted((c.confidence for c in found), reverse=True)
    assert len({c.text.casefold() for c in found}) == len(found)
    assert all(0 <= c.confidence <= 1 and c.text for c in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=20,
)
KEYS = ("ss_dataset_dirs", "ss_datasets", "ss_tag_frequency", "ss_num_train_images", "modelspec.trigger_phrase",
        "ss_sd_model_name", "ss_base_model_version")  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), JSON.map(json.dumps) | st.text(max_size=50)))
def test_any_metadata_is_read_without_a_crash(metadata: dict[str, str]) -> None:
    found = conclude(ITEM, header({"x": (1, 2)}, metadata))
    assert all(caption.text for caption in found.captions)
    assert all(claim.count > 0 for claim in n0_claims(metadata))


def test_kohyas_data_sets_are_read() -> None:
    metadata = {
        "ss_datasets": json.dumps([{"subsets": [
            {"class_tokens": "sks dog", "is_reg": False, "img_count": 7, "num_repeats": 10},
            {"class_tokens": "dog", "is_reg": True, "img_count": 100, "num_repeats": 1},
        ]}]),
    }  # fmt: skip
    assert [c.text for c in captions_from_metadata(metadata)] == ["sks dog"]
    assert n0_claims(metadata) == [N0(7, "ss_datasets")]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<p>Trained on 23 images</p>", 23),
        ("A dataset of 15 high quality pictures.", 15),
        ("I used 40 photos for training this", 40),
        ("Trained with <b>8</b>&nbsp;images", 8),
        ("Version 2. 30 images in the gallery", None),
        ("trained for 2000 steps", None),
        ("", None),
        (None, None),
        ("trained on 0 images", None),
    ],
)
def test_counts_in_prose(text: str | None, count: int | None) -> None:
    found = count_in_prose(text)
    assert (found.count if found else None) == count


def test_claims_that_cannot_all_be_true_are_named() -> None:
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_dataset_dirs": json.dumps({"10_a": {"n_repeats": 10, "img_count": 6}}),
        "ss_num_train_images": "90",
    }
    item = Item(**{**vars(ITEM), "base_models": (Claim("SD 1.5", "baseModel"),),
                   "n0": (N0(23, "description"),)})  # fmt: skip
    found = conclude(item, header(SDXL, metadata))
    assert found.family == Claim(Family.sdxl, "shapes")
    assert found.n0 == N0(6, "ss_dataset_dirs")
    assert [text.partition(":")[0] for text in found.contradictions] == ["family", "N0", "ss_num_train_images"]
    agreeing = conclude(Item(**{**vars(ITEM), "base_models": (Claim("SDXL 1.0", "baseModel"),)}), header(SDXL))
    assert agreeing.contradictions == []


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (SDXL, Family.sdxl),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}, Family.sd1),
        ({"lora_unet_x_attn2_to_k.lora_down.weight": (4, 1024)}, Family.sd2),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, Family.flux),
        ({"transformer.single_blocks.0.linear1.lora_A.weight": (4, 3072)}, Family.flux),
        ({"lora_unet_x_attn2_to_k.lora_down.weight": (4, 128)}, None),
        ({"model.weight": (4, 4)}, None),
    ],
)
def test_shapes_tell_the_family(tensors: dict[str, tuple[int, ...]], family: Family | None) -> None:
    assert family_of_shapes(header(tensors).tensors) == family


@pytest.mark.parametrize(
    ("name", "family"),
    [("SD 1.5", "sd1"), ("SDXL 1.0", "sdxl"), ("Pony", "sdxl"), ("Illustrious", "sdxl"), ("Flux.1 D", "flux"),
     ("SD 2.1 768", "sd2"), ("SD 3.5 Large", "sd3"), ("sd_v1", "sd1"), ("sdxl_base_v1-0", "sdxl"),
     ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1"), ("black-forest-labs/FLUX.1-dev", "flux"),
     ("Wan Video", "other"), ("", "other")],
)  # fmt: skip
def test_names_tell_the_family(name: str, family: str) -> None:
    assert family_of_name(name) == family


@given(st.text(max_size=300) | st.none() | st.integers())
def test_any_file_name_is_shown_safely(name: object) -> None:
    clean = clean_name(name)
    assert 0 < len(clean) <= 200
    assert not set(clean) & {"/", "\\", "\0", "\n", "\x1b"}


def test_hashes_and_times_are_what_they_say_or_nothing() -> None:
    assert hex_of(" ABCDEF0123 ", 10) == "abcdef0123"
    assert [hex_of(value, 10) for value in ("xyz", None, 7, "AB" * 200)] == [None] * 4
    assert time_of("2026-01-02T03:04:05Z") is not None
    assert [time_of(value) for value in ("yesterday", None, 5, "2026-01-02", "9999-01-01T00:00:00Z")] == [None] * 5


@pytest.mark.parametrize(
    "text",
    ["(a:" + "1" * 2_000_000, " " * 2_000_000, "(" * 1_000_000 + ")" * 1_000_000, "train" * 400_000, "<" * 2_000_000,
     "[a" * 1_000_000, ",\u00a0" * 1_000_000, "1 a-b " * 400_000, "'/" * 1_000_000],
    ids=lambda text: repr(text[:6]),
)  # fmt: skip
def test_prose_of_megabytes_is_read_at_once(text: str) -> None:
    began = time.thread_time()
    clean_prompt(text)
    count_in_prose(text)
    clean_name(text)
    family_of_name(text)
    rank_captions([Caption(text + str(number), "widget") for number in range(50)])
    assert time.thread_time() - began < 1.5


def test_sources_need_no_torch() -> None:
    script = "import sys; from crawlers.source import SOURCES; list(SOURCES); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_the_base_that_a_file_wants_is_concluded_from_its_hash_first() -> None:
    pony = "67ab2fd8ec439a89b3fedb15cc65f54336af163c7eb5e4f2acc98f090a29b0b3"
    item = Item("civitai:1:2:3", "civitai", "1", "2", "x", "", base_models=(Claim("SDXL 1.0", "baseModel"),))
    found = conclude(item, header(SDXL, {"ss_new_sd_model_hash": pony}))
    assert (found.wanted.base, found.wanted.by, found.wanted.sure) == ("pony-v6", "hash", "medium")
    assert found.claims["base_hash"] == [[pony, "ss_new_sd_model_hash"]]
    assert conclude(item, header(SDXL)).wanted.base == "sdxl"
    assert conclude(ITEM, header(SDXL)).wanted.by == "shapes"
    assert conclude(ITEM, None).wanted.by == "nothing"
