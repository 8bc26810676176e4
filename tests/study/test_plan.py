"""Study files and few-shot sets: what they say, and what is refused in words before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from audit.config import Method
from audit.errors import AuditError, StudyError
from audit.study.factors import AuditFactors, TrainingFactors, Tuning
from audit.study.plan import Plan, counts, difference, plan_of, read_study, settings_of, study_of, varied
from audit.study.run import begin, begun, study_from
from audit.study.sets import read_sets
from audit.workspace import Workspace

EXAMPLE = Path(__file__).parent.parent.parent / "examples/paper-nano.toml"
TREE: dict[str, Any] = {"study": "a-study", "base": "nano", "descriptor": "nano", "sets": "sets"}


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Two sets of three pictures: an artist's, and a subject's with two control pictures."""
    for number in range(3):
        picture(tmp_path / f"sets/jane-doe/{number}.png", number)
        picture(tmp_path / f"sets/dog/train/{number}.png", 10 + number)
    for number in range(2):
        picture(tmp_path / f"sets/dog/control/{number}.png", 20 + number)
    return tmp_path / "sets"


def planned(beside: Path, **said: Any) -> Plan:
    return plan_of(study_of(TREE | said), beside)


def test_the_example_is_a_plan() -> None:
    plan = plan_of(read_study(EXAMPLE), EXAMPLE.parent)
    of = counts(plan)
    assert (of.sets, of.cells, of.fine_tunes) == (3, 18, 6)
    assert varied(plan) == ["method", "extraction"]
    assert of.training_steps == (60 + 36) * (10 + 8 + 8)
    assert of.images == 8 * 3 * 2 * (10 + 8 + 8)


def test_factors_that_do_not_apply_make_no_further_cells(sets: Path) -> None:
    plan = planned(sets.parent, factors={
        "method": ["lora", "dreambooth"], "rank": [4, 8], "extraction": ["direct", "cfg"], "w": [2.0, 3.0],
    })  # fmt: skip
    fine_tunes = {(cell.training.method, cell.training.rank) for cell in plan.cells}
    assert fine_tunes == {("lora", 4), ("lora", 8), ("dreambooth", None)}
    asked = {(cell.audit.extraction, cell.audit.w) for cell in plan.cells}
    assert asked == {("direct", None), ("cfg", 2.0), ("cfg", 3.0)}
    assert len(plan.cells) == 2 * 3 * 3


def test_listed_cells_are_added_up(sets: Path) -> None:
    listed = [{"method": "lora", "lr": 1e-3}, {"method": "dreambooth", "steps": [5, 10]}]
    plan = planned(sets.parent, factors={"steps": 7}, cells=listed, only=["dog"])
    assert [(one.training.method, one.training.steps) for one in plan.cells] == [
        ("lora", 7), ("dreambooth", 5), ("dreambooth", 10),
    ]  # fmt: skip
    assert [one.training.rate for one in plan.cells] == [1e-3, 2e-6, 2e-6]


def test_presets_are_the_papers(sets: Path) -> None:
    plan = planned(sets.parent, preset="paper-dreambooth", only=["dog"])
    guided = [one for one in plan.cells if one.audit.extraction is Method.model_guidance]
    assert [(one.audit.w, one.audit.k, one.training.steps, one.training.rate) for one in guided] == [
        (3.0, -0.02, 200, 2e-6)
    ]
    said = settings_of(plan.study, guided[0].audit)
    assert (said.steps, said.solver, said.images_per_training_image, said.clustering) == (50, "ddim", 50, "cliques")
    lora = planned(sets.parent, preset="paper-lora", factors={"rank": 8}, only=["dog"])
    assert {(one.training.rank, one.training.rate) for one in lora.cells} == {(8, 1e-4)}


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"factors": {"ranks": 4}}, "no factor 'ranks'.*rank"),
        ({"factors": {"method": "lokr"}}, "factor method: there is no level 'lokr'; there are lora, dreambooth"),
        ({"factors": {"rank": [4, 0]}}, "factor rank: 0 is no level; it is a whole number from 1 to 1024"),
        ({"factors": {"rank": True}}, "factor rank: True is no level"),
        ({"factors": {"w": "high"}}, "factor w: 'high' is no level.*or 'auto'"),
        ({"factors": {"w": float("nan")}}, "factor w: nan is no level"),
        ({"factors": {"prior": 1}}, "factor prior: 1 is no level; it is true or false"),
        ({"factors": {"steps": []}}, "factor steps: the list of levels is empty"),
        ({"factors": {"n0": 4}}, "n0 = 4: the set dog has 3 pictures"),
        ({"factors": {"prior": True}, "only": ["jane-doe"]}, "what the class of the set jane-doe is called"),
        ({"factors": {"captions": "wrong"}, "only": ["dog"]}, "there is one set"),
        ({"factors": {"method": "dreambooth", "defence": "weight-filter"}}, "filters a LoRA, and method = dreambooth"),
        ({"factors": {"defence": "dp-sgd", "noise_multiplier": -1}}, "noise_multiplier: -1 is no level"),
        ({"factors": {"captions": "some"}}, "there are known, partial, trigger, wrong, empty, unknown"),
        ({"factors": {"captions": "partial", "caption_share": 2}}, "caption_share: 2 is no level"),
        ({"factors": {"rule": "fixed"}}, "jane-doe has no control pictures"),
        ({"factors": {"rule": "calibrated"}, "only": ["dog"]}, "dog has 0 decoys, of 19"),
        ({"settings": {"w": 3}}, "settings.w is varied as a factor"),
        ({"settings": {"stepz": 3}}, "no setting 'stepz'"),
        ({"settings": {"steps": 0}}, "steps = 0"),
        ({"preset": "papers"}, "no preset 'papers': there are paper-lora, paper-dreambooth"),
        ({"study": "A study"}, "study = 'A study'"),
        ({"seed": -1}, "seed = -1"),
        ({"base": 5}, "base = 5"),
        ({"bases": "nano"}, "no 'bases' in a study file"),
        ({"sets": "nowhere"}, "nowhere is not a folder"),
        ({"only": ["cat"]}, "has no set cat: there are dog, jane-doe"),
        ({"cells": []}, "cells a list of tables"),
        ({"factors": {"repeat": list(range(200)), "steps": list(range(1, 200))}}, "more than 20000 combinations"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(sets: Path, said: dict[str, Any], match: str) -> None:
    with pytest.raises(AuditError, match=match):
        planned(sets.parent, **said)


def test_files_that_are_no_study_are_named(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    for content, match in (
        (b"study = ", "is not valid TOML"),
        (b"\xff", "cannot be read"),
        (b"study = 3", "study = 3"),
    ):
        file.write_bytes(content)
        with pytest.raises(StudyError, match=match) as raised:
            read_study(file)
        assert str(file) in str(raised.value)


def test_captions_and_classes_come_from_where_people_keep_them(sets: Path) -> None:
    (sets / "prompts_and_classes.txt").write_text(
        "Classes\nsubject_name,class\ndog,dog\n\nprompt_list = [\n 'a {}',\n]\n"
    )
    found = {one.name: one for one in read_sets("sets", sets.parent)}
    assert (found["dog"].captions, found["dog"].class_caption) == (["a photo of sks dog"], "a photo of dog")
    assert found["jane-doe"].captions == ["art style of jane doe"]
    assert (len(found["dog"].training), len(found["dog"].control)) == (3, 2)
    (sets / "prompts.csv").write_text("subject,prompt,class\ndog,my sks hound,a hound\n")
    for number in range(3):
        (sets / f"jane-doe/{number}.txt").write_text(f"painting {number}\n")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"dog {number}"}) for number in range(3)]
    (sets / "dog/train/metadata.jsonl").write_text("\n".join(lines))
    found = {one.name: one for one in read_sets("sets", sets.parent)}
    assert found["jane-doe"].captions == ["painting 0", "painting 1", "painting 2"]
    assert (found["dog"].captions, found["dog"].class_caption) == (["dog 0", "dog 1", "dog 2"], "a hound")


def _one_picture(sets: Path) -> None:
    for number in (1, 2):
        (sets / f"jane-doe/{number}.png").unlink()


def _broken(sets: Path) -> None:
    (sets / "jane-doe/1.png").write_bytes(b"no picture")


def _lonely_caption(sets: Path) -> None:
    (sets / "jane-doe/9.txt").write_text("a caption")


def _some_captions(sets: Path) -> None:
    (sets / "jane-doe/1.txt").write_text("a caption")


def _empty_caption(sets: Path) -> None:
    (sets / "jane-doe/1.txt").write_text(" \n")


def _unknown_in_jsonl(sets: Path) -> None:
    (sets / "jane-doe/metadata.jsonl").write_text('{"file_name": "8.png", "text": "a"}\n')


def _no_jsonl(sets: Path) -> None:
    (sets / "jane-doe/metadata.jsonl").write_text("{}\n")


def _twice(sets: Path) -> None:
    (sets / "jane-doe/3.png").write_bytes((sets / "jane-doe/1.png").read_bytes())


def _trained_on_control(sets: Path) -> None:
    (sets / "dog/control/9.png").write_bytes((sets / "dog/train/1.png").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_one_picture, "jane-doe holds 1 picture: a few-shot set has 2 at the least"),
        (_broken, "jane-doe/1.png cannot be read"),
        (_lonely_caption, "jane-doe/9.txt is a caption without its picture"),
        (_some_captions, "1 of 3 pictures have a caption, 0.png has none"),
        (_empty_caption, "jane-doe/1.txt: the caption is empty"),
        (_unknown_in_jsonl, "metadata.jsonl has a caption of '8.png', which is no picture"),
        (_no_jsonl, "metadata.jsonl, line 1: write"),
        (_twice, "jane-doe/3.png is the same file as .*jane-doe/1.png"),
        (_trained_on_control, "control/9.png is the same file as the training picture"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_refused_by_name(
    sets: Path, spoil: Callable[[Path], None], match: str
) -> None:
    spoil(sets)
    with pytest.raises(StudyError, match=match):
        read_sets("sets", sets.parent)


def test_a_trigger_that_nobody_can_tell_is_refused_before_anything_is_trained(sets: Path) -> None:
    (sets / "prompts.csv").write_text("subject,prompt\ndog,a photo of a hound\n")
    with pytest.raises(StudyError, match="nobody says which words of 'a photo of a hound' stand for dog; write a col"):
        planned(sets.parent, factors={"captions": "trigger"}, only=["dog"])


def test_the_first_pictures_are_trained_on_and_the_others_held_out(sets: Path) -> None:
    artist, dog = read_sets("sets", sets.parent, ["dog", "jane-doe"])[::-1]
    assert [Path(one.path).name for one in artist.first(2).training] == ["0.png", "1.png"]
    assert [Path(one.path).name for one in artist.first(2).control] == ["2.png"]
    assert dog.first(2).control == dog.control


def test_a_study_goes_on_as_it_was_begun_and_in_no_other_way(sets: Path, workspace: Workspace) -> None:
    said: dict[str, Any] = {"factors": {"rank": [4, 8], "w": ["auto", 3.0], "text_encoder": False}}
    plan = planned(sets.parent, **said)
    begin(workspace, plan, sets.parent)
    begin(workspace, planned(sets.parent, **said), sets.parent)
    study, beside = begun(workspace, "a-study")
    assert study == plan.study
    assert plan_of(study, beside).cells == plan.cells
    before = workspace.rows("SELECT * FROM studies")
    with pytest.raises(StudyError, match=r"begun otherwise \(study\.cells\.0\.rank is another\).*another name.*resume"):
        begin(workspace, planned(sets.parent, factors={"rank": 4}), sets.parent)
    picture(sets / "dog/train/1.png", 99)
    with pytest.raises(StudyError, match=r"sets\.dog is another"):
        begin(workspace, planned(sets.parent, **said), sets.parent)
    assert workspace.rows("SELECT * FROM studies") == before
    with pytest.raises(StudyError, match=r"no study 'other'.*a-study"):
        begun(workspace, "other")


def test_a_study_survives_being_kept() -> None:
    study = read_study(EXAMPLE)
    assert study_from(json.loads(json.dumps(study.as_dict()))) == study
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is another"
    assert difference({"a": 1}, {}) == "a is gone"
    assert difference({"a": [1]}, {"a": [1]}) is None


def test_defaults_are_levels() -> None:
    levels = TrainingFactors.of({})
    assert TrainingFactors.of(levels.as_dict()) == levels
    assert (levels.defence, levels.filter_kept, levels.noise_multiplier) == ("none", None, None)
    assert TrainingFactors.of({"method": "dreambooth"}).layout is None
    assert TrainingFactors.of({"method": Tuning.lora}).rate == 1e-4
    assert AuditFactors.of({"extraction": "direct", "w": 3}).w is None
