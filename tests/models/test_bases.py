"""Known base models: what files claim, what bases at hand are, and what is said where the two differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import CheckpointError
from audit.models.bases import (
    BaseClaim,
    claims_of,
    identified,
    known_bases,
    lineage,
    mismatches,
    named_in,
    of_hash,
    of_name,
    prediction_refusal,
    relation,
    wanted,
)
from audit.models.checkpoint import open_checkpoint
from audit.models.families.identify import Family, family_of_name
from audit.models.tuning import check_prediction, family_warnings
from tests.conftest import KOHYA

PONY = "67ab2fd8ec439a89b3fedb15cc65f54336af163c7eb5e4f2acc98f090a29b0b3"
VPRED = "ea349eeae87ca8d25ba902c93810f7ca83e5c82f920edf12f273af004ae02819"


def test_the_table_is_whole() -> None:
    table = known_bases()
    hashes = [one for base in table.values() for one in (*base.sha256, *base.autov2, *base.legacy)]
    assert len(set(hashes)) == len(hashes)
    for key, base in table.items():
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in base.sha256)
        assert all(re.fullmatch("[0-9a-f]{10}", one) for one in base.autov2)
        assert all(re.fullmatch("[0-9a-f]{8}", one) for one in base.legacy)
        assert base.family in [*Family]
        assert base.prediction in (None, "epsilon", "v_prediction")
        assert base.parent is None or table[base.parent].family == base.family
        assert set(base.versions) <= set(table)
        assert next(lineage(base)) is base
        assert all(of_name(repo) is base for repo in base.repos)
        assert of_name(key) is base


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Wan Video 2.2 T2V-A14B", "wan2.2-t2v-a14b"), ("Wan Video 2.2 TI2V-5B", "wan2.2-ti2v-5b"),
        ("Wan Video 14B i2v 720p", "wan2.1-i2v-14b"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1-t2v-1.3b"), ("wan2.1_t2v_14B_fp16", "wan2.1-t2v-14b"),
        ("SD 1.5", "sd15"), ("v1-5-pruned-emaonly.safetensors", "sd15"), ("C:\\models\\v1-5-pruned.ckpt", "sd15"),
        ("runwayml/stable-diffusion-v1-5", "sd15"), ("SDXL 1.0", "sdxl"), ("sd_xl_base_1.0.safetensors", "sdxl"),
        ("sd_xl_base_1.0_0.9vae.safetensors", "sdxl"), ("Pony", "pony-v6"), ("290640.safetensors", "pony-v6"),
        ("ponyDiffusionV6XL_v6StartWithThisOne.safetensors", "pony-v6"), ("/a/illustriousXL_v01.safetensors",
        "illustrious-v0.1"), ("Illustrious-XL-v2.0", "illustrious-v2.0"), ("Illustrious", "illustrious"),
        ("noobaiXLNAIXL_vPred10Version.safetensors", "noobai-vpred-v1.0"), ("NoobAI", "noobai"),
        ("noobaiXLNAIXL_epsilonPred11Version", "noobai-v1.1"), ("Laxhar/noobai-XL-1.0", "noobai-v1.0"),
        ("noobai-XL-Vpred-0.75", "noobai-vpred"), ("animagine-xl-3.1.safetensors", "animagine-v3.1"),
        ("urn:air:sdxl:checkpoint:civitai:257749@290640", "pony-v6"), ("animefull-final-pruned-fp16.ckpt", "animefull"),
        ("anyloraCheckpoint_bakedvaeBlessedFp16.safetensors", "anylora"), ("counterfeitV30_v30", "counterfeit-v3"),
    ],
)  # fmt: skip
def test_names(text: str, key: str) -> None:
    found = of_name(text)
    assert found is not None
    assert found.key == key
    assert family_of_name(text) in (found.family, Family.other)


@pytest.mark.parametrize(
    "text", ["", "nano", "mymodel", "sd_v1", "Pony V7", "ponyRealism_v22", "sdxl_base_v1-0/lora", "x" * 10_000]
)
def test_names_of_nothing_known(text: str) -> None:
    assert of_name(text) is None


def test_hashes() -> None:
    for text in (PONY, PONY.upper(), PONY[:10], PONY[:12], "e577480d"):
        assert of_hash(text) is known_bases()["pony-v6"]
    for text in (PONY[:9], PONY[:8], "0" * 64, PONY + "0", "", "not a hash"):
        assert of_hash(text) is None
    assert of_hash("ef49fbb25f" + "0" * 54) is known_bases()["anylora"]


def test_a_hash_outranks_a_name_and_shapes_outrank_both() -> None:
    claims = claims_of({"ss_sd_model_name": "sd_xl_base_1.0.safetensors", "ss_new_sd_model_hash": PONY})
    assert [one.source for one in claims] == ["ss_new_sd_model_hash", "ss_sd_model_name"]
    found = wanted(claims, "sdxl", "sdxl")
    assert (found.base, found.by, found.sure) == ("pony-v6", "hash", "medium")
    assert "ss_sd_model_name says Stable Diffusion XL 1.0" in found.why
    assert wanted(claims_of({"ss_new_sd_model_hash": PONY}), "sdxl", None).sure == "high"
    assert wanted(claims_of({"ss_sd_model_hash": "e577480d"}), "sdxl", None).sure == "medium"  # of 64 KiB of the file
    other = wanted(claims, "sd1", "sdxl")
    assert (other.base, other.family, other.by) == (None, "sd1", "shapes")
    assert "of family sdxl" in other.why
    assert wanted([], None, None).by == "nothing"


def test_what_a_base_at_hand_is() -> None:
    assert identified("renamed.safetensors", PONY) is known_bases()["pony-v6"]
    assert identified("stabilityai/stable-diffusion-xl-base-1.0", "4" * 40) is known_bases()["sdxl"]
    assert identified("mine.safetensors", "0" * 64) is None
    assert identified("x", "0" * 64, "pony-v6") is known_bases()["pony-v6"]


@pytest.mark.parametrize(
    ("given", "claimed", "said"),
    [
        ("sdxl", "pony-v6", "a parent of it"), ("pony-v6", "sdxl", "a child of it"),
        ("illustrious-v0.1", "noobai-vpred-v1.0", "a parent of it"), ("illustrious", "illustrious-v2.0", None),
        ("pony-v6", "illustrious-v0.1", "a sibling of it (both descend from Stable Diffusion XL 1.0)"),
        ("illustrious-v1.0", "illustrious-v2.0", "a sibling of it (both descend from Illustrious XL 0.1)"),
        ("illustrious", "noobai-v1.1", "a parent of it"), ("anylora", "sd15", "another model of its family"),
        ("sd15", "pony-v6", "of family sd1"), ("pony-v6", "pony-v6", None),
    ],
)  # fmt: skip
def test_relations_in_words(given: str, claimed: str, said: str | None) -> None:
    assert relation(known_bases()[given], known_bases()[claimed]) == said


def test_a_base_that_is_not_the_claimed_one_is_said() -> None:
    claims = claims_of({"ss_sd_model_name": "ponyDiffusionV6XL.safetensors"})
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    (warning,) = mismatches(claims, sdxl, "4" * 40)
    assert "trained on Pony Diffusion V6 XL (ss_sd_model_name)" in warning
    assert "is Stable Diffusion XL 1.0, a parent of it" in warning
    assert mismatches(claims, "pony.safetensors", PONY) == []
    (unknown,) = mismatches(claims, "mine.safetensors", "0" * 64)
    assert "cannot be told" in unknown
    # a file that is named by its very hash is the base, whatever it is called; Civitai's "SDXL 1.0" is said of children
    assert mismatches([BaseClaim("0" * 64, "ss_new_sd_model_hash"), *claims], "mine.safetensors", "0" * 64) == []
    assert mismatches(claims_of({}, [("SDXL 1.0", "baseModel")]), "pony.safetensors", PONY) == []
    experts = claims_of({}, [("Wan Video 2.2 T2V-A14B", "baseModel")])  # which the list names apart
    assert "another model of its family" in mismatches(experts, "Wan-AI/Wan2.1-T2V-14B-Diffusers", "0" * 40)[0]
    assert mismatches([], sdxl, "4" * 40) == []


def test_which_configured_base_a_claim_means() -> None:
    pony, noob = (BaseClaim(text, "ss_sd_model_name", of_name(text)) for text in ("pony", "NoobAI"))
    by_hash = BaseClaim(PONY, "ss_new_sd_model_hash", of_hash(PONY))
    assert named_in(pony, ["sdxl", "pony-v6"]) == "pony-v6"
    assert named_in(pony, ["sdxl", "Pony Diffusion v6"]) == "Pony Diffusion v6"
    assert named_in(by_hash, ["sdxl", PONY[:10]]) == PONY[:10]
    assert named_in(BaseClaim("f" * 64, "ss_new_sd_model_hash"), ["sdxl", "f" * 64]) == "f" * 64
    assert named_in(pony, ["sdxl", "sd1"]) is None
    assert named_in(noob, ["noobai-v1.1"]) == "noobai-v1.1"
    assert named_in(noob, ["noobai-v1.1", "noobai-vpred-v1.0"]) is None  # they predict different things


def test_a_child_that_predicts_something_else_is_refused(base: Any, tmp_path: Path) -> None:
    claims = claims_of({"ss_new_sd_model_hash": VPRED})
    said = prediction_refusal(claims, "sdxl", "epsilon")
    assert said is not None
    assert "NoobAI XL V-Pred 1.0, which predicts v_prediction; sdxl predicts epsilon" in said
    assert prediction_refusal(claims, "noob", "v_prediction") is None
    assert prediction_refusal(claims_of({}, [("NoobAI", "baseModel")]), "sdxl", "epsilon") is None
    vague = claims_of({"ss_base_model_version": "sdxl_base_v1-0"})
    assert vague[0].known is not None
    assert prediction_refusal(vague, "noob", "v_prediction") is None
    # the embedded base predicts v
    path = tmp_path / "f.safetensors"
    save_file(load_file(KOHYA), path, {"ss_sd_model_name": "sd-v1-4.ckpt"})
    with pytest.raises(CheckpointError, match=r"Stable Diffusion 1\.4, which predicts epsilon"):
        check_prediction(base, open_checkpoint(path))
    save_file(load_file(KOHYA), path, {"ss_sd_model_name": "sd-v1-4.ckpt", "ss_v_parameterization": "True"})
    check_prediction(base, open_checkpoint(path))  # the file itself knows better
    assert "cannot be told by its name or hash" in " ".join(family_warnings(open_checkpoint(path), base))


def test_inspect_says_which_base_how_sure_and_why(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file(
        load_file(KOHYA), path, {"ss_sd_model_name": "animefull-final-pruned.ckpt", "ss_sd_model_hash": "925997e9"}
    )
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["inspect", str(path), "--json"]).stdout)
    assert (found["wants"]["base"], found["wants"]["by"], found["wants"]["sure"]) == ("animefull", "hash", "medium")
    text = runner.invoke(app, ["inspect", str(path)], env={"COLUMNS": "200"}).stdout
    assert "NovelAI anime (animefull) (sure: medium; the hash '925997e9' that ss_sd_model_hash claims" in text
