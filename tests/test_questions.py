"""A verdict speaks of what was asked: the sets of this command, distinct pictures, and what is removed is gone."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from audit.cli import app
from audit.demo import set_folder
from audit.descriptors import Descriptor
from audit.references import ReferenceSets
from audit.report import collect, write_page
from audit.report.page import render
from audit.report.pages import pages
from audit.states import Verdict
from audit.workspace import Workspace
from tests.conftest import BASE, CAPTION, KOHYA

TRAIN, CONTROL = set_folder("fluent-animals", "train"), set_folder("fluent-animals", "control")


def call(*arguments: object, codes: tuple[int, ...] = (0,)) -> Any:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code in codes, (done.exit_code, done.output, done.exception)
    return json.loads(done.stdout) if "--json" in arguments else done


def scan(workspace: Path, *references: Path | str, codes: tuple[int, ...]) -> Any:
    named = [part for one in references for part in ("--references", str(one))]
    return call(
        "scan", KOHYA, "--base", BASE, "--descriptor", "nano", "--caption", CAPTION, "--n0", 4, "--steps", 10,
        "--images-per-training-image", 10, "--workspace", workspace, "--rule", "fixed", "--json", *named, codes=codes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one finished audit that was asked nothing yet."""
    folder = tmp_path_factory.mktemp("questions") / "w"
    scan(folder, codes=(0,))
    return folder


@pytest.fixture
def place(known: Path, tmp_path: Path) -> Path:
    shutil.copytree(known, tmp_path / "w")
    return tmp_path / "w"


def test_every_question_has_its_own_answer_exit_code_and_page(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "stolen")
    shutil.copytree(CONTROL, tmp_path / "other")
    first = scan(place, tmp_path / "stolen", codes=(10,))
    second = scan(place, tmp_path / "other", codes=(0,))
    third = scan(place, codes=(0,))
    assert first["matched_references"]
    assert first["references"] == 10
    assert second["matched_references"] == third["matched_references"] == []
    assert (len(second["reference_sets"]), third["reference_sets"], third["references"]) == (1, [], 0)
    paths = [Path(found["report"]) for found in (first, second, third)]
    assert len(set(paths)) == 3
    assert "stolen" in paths[0].name
    assert "other" in paths[1].name
    assert f"{len(first['matched_references'])} of your 10 reference pictures" in " ".join(paths[0].read_text().split())
    private = {one["reference_id"] for one in first["matched_references"]}
    for page in paths[1:]:
        text = page.read_text()
        assert "stolen" not in text
        assert not any(reference in text for reference in private)
    for thumbnail in Workspace(place).rows(
        """SELECT thumbnail FROM "references" WHERE starts_with(reference_set, 'stolen')"""
    ):
        assert base64.b64encode(thumbnail["thumbnail"]).decode() not in paths[1].read_text() + paths[2].read_text()
    assert f"{len(private)} of your 10" in " ".join(paths[0].read_text().split())  # and the first page is as it was


def test_a_set_of_other_pictures_under_its_old_name_is_another_question(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "set")
    before = scan(place, tmp_path / "set", codes=(10,))
    told = Path(before["report"]).read_text()
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    shutil.copy(CONTROL / sorted(path.name for path in CONTROL.iterdir())[0], tmp_path / "set")
    after = scan(place, tmp_path / "set", codes=(0,))
    assert after["references"] == 1
    assert after["report"] != before["report"]
    assert Path(before["report"]).read_text() == told


def test_a_picture_in_two_sets_counts_once(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "one")
    shutil.copytree(TRAIN, tmp_path / "two")
    single = scan(place, tmp_path / "one", codes=(10,))
    both = scan(place, tmp_path / "one", tmp_path / "two", codes=(10,))
    ids = [one["reference_id"] for one in both["matched_references"]]
    assert len(ids) == len(set(ids)) == len(single["matched_references"])
    assert both["references"] == 10
    assert "2-sets" in both["report"]


def test_files_that_were_passed_over_are_on_the_page(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "set")
    (tmp_path / "set/broken.png").write_bytes(b"no picture")
    (tmp_path / "set/letter <b>.txt").write_text("no picture by name")
    shutil.copy(TRAIN / "koala.png", tmp_path / "set/koala again.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "set/tiny.png")
    found = scan(place, tmp_path / "set", codes=(10,))
    reasons = {one["name"]: one["reason"] for one in found["passed_over"]}
    assert set(reasons) == {"broken.png", "letter <b>.txt", "koala.png", "tiny.png"}
    page = Path(found["report"]).read_text()
    for name in ("broken.png", "letter &lt;b&gt;.txt", "the same file as koala again.png", "tiny.png"):
        assert name in page
    for one in Workspace(place).rows('SELECT reference_id FROM "references"'):
        assert one["reference_id"] in page  # the SHA256 of each original


def test_a_reference_below_the_descriptors_size_is_possible_at_most(
    place: Path, tmp_path: Path, nano: Descriptor
) -> None:
    (tmp_path / "small").mkdir()
    for path in TRAIN.iterdir():
        with Image.open(path) as picture:
            picture.convert("RGB").resize((48, 48)).save(tmp_path / "small" / path.name)
    found = scan(place, tmp_path / "small", codes=(13,))
    about = ("--references", found["reference_sets"][0], "--workspace", place)
    call("report", found["audit"]["audit_id"], "--rule", "fixed", *about, codes=(13,))
    call("match", "--rule", "fixed", *about, codes=(13,))
    assert found["matched_references"] == []
    assert found["possible_references"]
    assert "reference pictures possible, none a match" in " ".join(Path(found["report"]).read_text().split())
    rows = Workspace(place).rows("SELECT DISTINCT verdict, is_match FROM matches")
    assert {(row["verdict"], row["is_match"]) for row in rows} == {("possible", False), ("none", False)}


def everything(place: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file())


@pytest.mark.parametrize("merged", [False, True])
def test_a_set_that_is_removed_is_in_no_table_and_on_no_page(place: Path, tmp_path: Path, merged: bool) -> None:
    shutil.copytree(TRAIN, tmp_path / "private")
    shutil.copytree(CONTROL, tmp_path / "other")
    for name in ("private", "other"):
        call("references", "add", name, tmp_path / name, "--descriptor", "nano", "--workspace", place)
    kept = Path(scan(place, "other", codes=(0,))["report"])
    shown = [Path(scan(place, *sets, codes=(10,))["report"]) for sets in (("private",), ("private", "other"))]
    if merged:
        call("compact", "--workspace", place)
    opened = Workspace(place)
    thumbnails = opened.rows("""SELECT thumbnail FROM "references" WHERE reference_set = 'private'""")
    matches = opened.rows("SELECT * FROM matches WHERE reference_set = 'private'")
    done = call("references", "remove", "private", "--workspace", place, "--json")
    assert done["pictures"] == 10
    assert done["matches"] == len({(row["audit_id"], row["reference_id"]) for row in matches})
    assert len(done["pages"]) == 2
    assert not any(page.exists() for page in shown)
    assert kept.exists()
    left = everything(place)
    for row in thumbnails:
        assert row["thumbnail"] not in left
        assert base64.b64encode(row["thumbnail"]) not in left
    for row in matches:
        assert row["reference_id"].encode() not in left
    again = Workspace(place)
    assert again.rows("SELECT DISTINCT reference_set FROM matches") == [{"reference_set": "other"}]
    assert call("verify", "--workspace", place, "--json") == {"problems": []}
    assert "1 report pages" in call("references", "remove", "other", "--workspace", place).stderr
    call("references", "remove", "other", "--workspace", place, codes=(1,))


def test_a_removal_that_is_killed_can_be_done_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each table in turn: the set is there until nothing else of it is."""
    from audit.workspace import compaction

    shutil.copytree(TRAIN, tmp_path / "private")
    (tmp_path / "private/notes.txt").write_text("passed over")
    call("references", "add", "private", tmp_path / "private", "--descriptor", "nano", "--workspace", place)
    inner, erased = compaction.erase, []

    def killed(table: Any, *rest: Any) -> None:
        inner(table, *rest)
        erased.append(table.name)
        if len(erased) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(compaction, "erase", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ReferenceSets(Workspace(place)).remove("private")
    ReferenceSets(Workspace(place)).remove("private")
    for table in ("references", "passed_over", "matches"):
        assert Workspace(place).rows(f"""SELECT 1 FROM "{table}" WHERE reference_set = 'private'""") == []


def test_verify_finds_what_a_removed_set_has_left(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "private")
    call("references", "add", "private", tmp_path / "private", "--descriptor", "nano", "--workspace", place)
    page = Path(scan(place, "private", codes=(10,))["report"])
    saved, document = page.read_bytes(), page.with_suffix(".json").read_bytes()
    matches = Workspace(place).rows("SELECT * FROM matches")
    call("references", "remove", "private", "--workspace", place)
    page.write_bytes(saved)
    page.with_suffix(".json").write_bytes(document)
    Workspace(place).write("matches", f"{matches[0]['audit_id']}.private", matches)
    problems = call("verify", "--workspace", place, "--json", codes=(1,))["problems"]
    told = {one["where"]: one["problem"] for one in problems}
    assert "shows the removed reference set private" in told[f"reports/{page.name}"]
    assert "a reference set that is not there" in told[f"audit {matches[0]['audit_id']}"]


def test_a_page_that_does_not_say_what_it_shows_goes_with_the_sets_of_its_audit(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "private")
    call("references", "add", "private", tmp_path / "private", "--descriptor", "nano", "--workspace", place)
    page = Path(scan(place, "private", codes=(10,))["report"])
    page.with_suffix(".json").unlink()
    assert call("references", "remove", "private", "--workspace", place, "--json")["pages"] == [f"reports/{page.name}"]
    assert not page.exists()


def test_a_wrong_base_is_not_an_acquittal(tmp_path: Path, known: Path) -> None:
    """The same weights under a configuration that says another prediction type: what is sampled is noise."""
    shutil.copytree(BASE, tmp_path / "base")
    file = tmp_path / "base/scheduler/scheduler_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"prediction_type": "epsilon"}))
    arguments = [
        "scan", KOHYA, "--base", tmp_path / "base", "--descriptor", "nano", "--caption", CAPTION, "--n0", 1,
        "--steps", 3, "--images-per-training-image", 4, "--workspace", tmp_path / "w", "--references", TRAIN,
    ]  # fmt: skip
    found = call(*arguments, "--json", codes=(11,))
    assert "does not give the epsilon predictions" in found["tells_nothing"]
    page = Path(found["report"]).read_text()
    assert "This audit tells nothing" in page
    assert "None of your" not in page
    assert "This audit tells nothing" in call(*arguments, codes=(11,)).stderr
    [right] = Workspace(known).rows("SELECT tells_nothing FROM audits")
    assert right["tells_nothing"] is None


def test_noise_and_empty_pictures_are_no_pictures() -> None:
    from audit.sampling.pictures import not_pictures, statistics

    rng = np.random.default_rng(0)
    noise = [np.kron(rng.integers(0, 255, (16, 16, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(6)]
    flat = [np.full((64, 64, 3), level, np.uint8) for level in (0, 90, 255)]
    real = [np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in sorted(TRAIN.iterdir())]

    def verdict(images: list[np.ndarray]) -> str | None:
        contrast, roughness = zip(*(statistics(image, 4) for image in images), strict=True)
        return not_pictures(np.array(contrast), np.array(roughness))

    assert "noise" in str(verdict(noise))
    assert "of one colour" in str(verdict(flat))
    assert verdict(real) is None
    assert verdict(real + noise) is None  # most are pictures


def test_no_green_for_nothing_found(place: Path) -> None:
    facts = collect(Workspace(place), "")
    html = render(replace(facts, verdict=replace(facts.verdict, said=Verdict.none, sets=["x"], references=3)))
    assert "None of your 3 reference pictures is a match" in html
    assert "That does not show that they were not used" in html
    assert "#24603f" not in html
    assert write_page(facts, Workspace(place)).endswith(f"{facts.row['audit_id']}.html")
    [(_, said)] = [one for one in pages(Workspace(place)) if one[1] and not one[1].reference_sets]
    assert said is not None
    assert said.matched == 0
