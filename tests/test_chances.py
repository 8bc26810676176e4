"""A scan with decoys: what was trained on is told from what was not; decoys of another look say nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import audit
from audit.demo import set_folder
from audit.states import Verdict
from tests.conftest import CAPTION, KOHYA

CONTROLS = Path(__file__).parents[1] / "testbed/controls/fluent-animals"
SETTINGS = audit.Settings(steps=6, images_per_training_image=2)
UNSEEN = 6  # of the further controls are references, the others decoys


def gathered(folder: Path, files: Sequence[Path]) -> Path:
    folder.mkdir()
    for number, file in enumerate(files):
        shutil.copy(file, folder / f"{number:02}-{file.name}")
    return folder


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, audit.Result]:
    """One LoRA asked about its training pictures and about unseen ones of their kind, with decoys of it and others."""
    place = tmp_path_factory.mktemp("chances")
    further = sorted((CONTROLS / "control").glob("*.png"))
    own = gathered(place / "own", [*sorted(set_folder("fluent-animals", "control").glob("*.png")), *further[UNSEEN:]])
    unseen = gathered(place / "unseen", [*further[:UNSEEN], *sorted((CONTROLS / "near").glob("*.png"))])
    photos = [file for name in ("photo-wildlife", "paint-elves", "photo-monuments")
              for file in sorted(set_folder(name, "train").glob("*.png"))]  # fmt: skip
    others = gathered(place / "others", photos)
    trained = set_folder("fluent-animals", "train")
    bench = audit.Bench("cpu")

    def scan(references: Path, background: Path, workspace: str, **more: Any) -> audit.Result:
        return audit.scan(
            KOHYA, "nano", references=[references], background=[background], descriptor="nano", captions=[CAPTION],
            n0=10, settings=SETTINGS, workspace=place / workspace, bench=bench, **more,
        )  # fmt: skip

    return {
        "trained": scan(trained, own, "one"),
        "unseen": scan(unseen, own, "one"),
        "others": scan(trained, others, "two"),
        "undeclared": scan(trained, own, "one", rule="either"),
        "either": scan(trained, own, "one", rule="either", drawn=True),
    }


def verdicts(result: audit.Result) -> list[Verdict]:
    return [one.verdict for one in result.facts.chances]


def test_a_set_that_was_trained_on_is_told_from_one_of_its_kind_that_was_not(scanned: dict[str, audit.Result]) -> None:
    [trained], [unseen] = scanned["trained"].facts.set_chances, scanned["unseen"].facts.set_chances
    assert (trained.pictures, trained.decoys) == (10, 23)  # one of 24 is nearly a copy of a reference
    assert trained.membership_p < 1e-4
    assert trained.membership_p < trained.p == trained.extraction_p < 0.02
    assert unseen.p > 0.05
    assert Verdict.match not in verdicts(scanned["unseen"])
    likely = [one.membership_p for one in scanned["trained"].facts.chances]
    assert sum(p <= 0.06 for p in likely) >= 5  # 1 / 24 is the least that 23 decoys can say


def test_decoys_of_another_look_say_nothing(scanned: dict[str, audit.Result]) -> None:
    assert set(verdicts(scanned["others"])) == {Verdict.uncalibrated}
    assert scanned["others"].facts.set_chances[0].p is None


def test_page_and_json_say_it(scanned: dict[str, audit.Result]) -> None:
    page = Path(scanned["trained"].page).read_text()
    assert "What can be said with an error rate" in page
    assert "as a whole, 10 pictures among 23 decoys" in page
    assert "are not of their kind" in Path(scanned["others"].page).read_text()
    plain: dict[str, Any] = scanned["trained"].as_dict()
    assert len(plain["chances"]) == 10
    assert {one["verdict"] for one in plain["chances"]} <= {"match", "possible", "none"}
    assert plain["set_chances"][0]["p"] < 0.02


def test_by_either_decoys_have_to_be_declared_and_the_page_says_what_it_rests_on(
    scanned: dict[str, audit.Result],
) -> None:
    refused, either = scanned["undeclared"], scanned["either"]
    assert (refused.verdict.said, refused.matched, refused.verdict.matched_sets) == (Verdict.uncalibrated, [], [])
    assert "if it is so, say it with &#39;scan --background FOLDER --drawn&#39;" in Path(refused.page).read_text()
    [calibrated], [whole] = scanned["trained"].facts.set_chances, either.facts.set_chances
    assert whole.p == 2 * min(calibrated.extraction_p, calibrated.membership_p) < calibrated.p
    assert either.verdict.said is Verdict.match
    page = " ".join(Path(either.page).read_text().split())
    assert "One kind of evidence is enough by the rule that was asked for (--rule either)" in page
    assert "which were declared a random split of one collection with" in page
    plain = either.as_dict()
    assert (plain["verdict"]["rule"], plain["pairings"][0]["drawn"]) == ("either", True)


def test_decoys_are_declared_where_they_are_folders_alone(tmp_path: Path) -> None:
    trained = set_folder("fluent-animals", "train")
    for background, said in (([], "name them with --background"), (["later"], "later is no folder")):
        with pytest.raises(audit.ConfigError, match=said):
            audit.scan(KOHYA, "nano", references=[trained], background=background, drawn=True, workspace=tmp_path)
    with pytest.raises(audit.ConfigError, match="named as references and as decoys"):
        audit.scan(KOHYA, "nano", references=[trained], background=[trained], workspace=tmp_path)
    with pytest.raises(audit.ConfigError, match="with which set the decoys are a random split"):
        audit.add_references("later", trained, kind="background", drawn=True, workspace=tmp_path)
