"""References described in parts: crops are found, decoys are compared alike, and fixed matches stay those of wholes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from audit import api
from audit.config import VerdictSettings
from audit.demo import set_folder
from audit.descriptors import Descriptor
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ConfigError, ReferenceSetError
from audit.references import ReferenceSets, describe, parts
from audit.references import match_extractions as match_in
from audit.references.audits import match_audit
from audit.references.decoys import OTHER_PARTS, questions_of
from audit.references.index import open_bank
from audit.references.inputs.given import Pictures
from audit.references.inputs.source import folder_pictures
from audit.references.parts import FIVE, LAYOUTS, crops, frame_of, open_parts, place_of
from audit.references.singles import drop, files_given, put
from audit.report.chance import set_chances_of
from audit.workspace import Workspace
from tests.references.test_match import extractions_of
from tests.references.test_weigh import AUDIT, audited, digest, reference, unit

TRAIN = set_folder("fluent-animals", "train")
FILES = sorted(TRAIN.glob("*.png"))
EACH = len(LAYOUTS[FIVE])
WIDTH = 32


def opened(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """A crop of so much of the area, near the bottom left."""
    side = round(picture.width * share**0.5)
    return picture.crop((1, picture.height - side - 1, 1 + side, picture.height - 1))


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The ten animals, by nano, with parts and without."""
    workspace = Workspace(tmp_path_factory.mktemp("parts"))
    for name, with_parts in (("parts", True), ("plain", False)):
        api.add_references(name, TRAIN, descriptor="nano", workspace=workspace, parts=with_parts)
    return workspace


def matched(workspace: Workspace, pictures: list[Image.Image], by: Descriptor, name: str) -> list[dict[str, Any]]:
    def ask(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
        bank = open_bank(connection, workspace, name, by.name)
        found = open_parts(connection, bank, name, by.name)
        given = {name: found} if found else None
        asked = extractions_of(pictures, by)
        return match_in(connection, asked, {name: bank}, by.threshold, parts=given).to_pylist()

    return workspace.asked(ask, '"references"')


def test_a_crop_that_the_whole_misses_is_found_by_a_part(added: Workspace, nano: Descriptor) -> None:
    asked = [cropped(opened(file), 0.6) for file in FILES]
    plain = {row["rank"]: row for row in matched(added, asked, nano, "plain") if row["position"] == 1}
    found = {row["rank"]: row for row in matched(added, asked, nano, "parts") if row["position"] == 1}
    ids = {row["name"]: row["reference_id"] for row in added.rows('SELECT name, reference_id FROM "references"')}
    missed = [rank for rank, row in plain.items() if row["similarity"] < nano.threshold]
    assert len(missed) >= 3
    for rank, row in found.items():
        assert row["reference_id"] == ids[FILES[rank - 1].name]
        assert row["similarity"] >= nano.threshold
        assert place_of(row["part"]) == "the bottom left"
    for rank in missed:  # the threshold is one of wholes
        assert found[rank]["whole_similarity"] < nano.threshold
        assert (found[rank]["verdict"], plain[rank]["verdict"]) == ("possible", "none")


def test_similarity_is_the_highest_of_whole_and_parts_as_by_brute_force(added: Workspace, nano: Descriptor) -> None:
    asked = [opened(file) for file in FILES[:2]] + [cropped(opened(file), 0.5) for file in FILES]
    asked += [opened(file) for file in sorted(set_folder("stamps-birds", "train").glob("*.png"))[:5]]
    vectors = nano.describe(asked).astype(np.float64)
    each = [nano.describe([opened(file), *crops(opened(file), FIVE)]).astype(np.float64) for file in FILES]
    cosines = np.stack([vectors @ one.T for one in each], axis=1)  # [extractions, references, whole and parts]
    names = {row["reference_id"]: row["name"] for row in added.rows('SELECT name, reference_id FROM "references"')}
    rows = matched(added, asked, nano, "parts")
    for rank, of_rank in enumerate(cosines, start=1):
        mine = sorted((row for row in rows if row["rank"] == rank), key=lambda row: row["position"])
        best = of_rank.max(axis=1)
        order = np.argsort(-best)[:3]
        assert [names[row["reference_id"]] for row in mine[:3]] == [FILES[one].name for one in order]
        for row, one in zip(mine, order, strict=False):
            which = int(of_rank[one].argmax())
            assert row["similarity"] == pytest.approx(best[one], abs=1e-5)
            assert row["whole_similarity"] == pytest.approx(of_rank[one, 0], abs=1e-5)
            assert row["part"] == (list(LAYOUTS[FIVE][which - 1]) if which else None)


def test_parts_change_nothing_of_hashes_and_of_matches_by_the_fixed_threshold(
    added: Workspace, nano: Descriptor
) -> None:
    asked = [change(opened(file)) for change in (lambda one: one, lambda one: cropped(one, 0.8)) for file in FILES]
    told = []
    for name in ("plain", "parts"):
        rows = matched(added, asked, nano, name)
        told.append({(row["rank"], row["reference_id"]) for row in rows if row["is_match"]})
    assert told[0] == told[1]
    assert len(told[0]) >= 15
    hashes = added.rows('SELECT reference_id, pdq, pdq_quality FROM "references" ORDER BY ALL')
    assert hashes[::2] == hashes[1::2]
    assert {row["whole_similarity"] for row in matched(added, asked, nano, "plain")} == {None}


def test_single_pictures_and_sets_that_go_on_keep_their_parts(
    added: Workspace, nano: Descriptor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, sets = Workspace(tmp_path), ReferenceSets(Workspace(tmp_path))
    whole = {row["reference_id"]: row["parts"] for row in
             added.rows("SELECT reference_id, parts FROM \"references\" WHERE reference_set = 'parts'")}  # fmt: skip

    def stopped(known: Any) -> Pictures:
        given = folder_pictures(TRAIN)

        def some() -> Any:
            yield from itertools.islice(given.given, 5)
            raise KeyboardInterrupt

        return replace(given, given=some())

    few = tmp_path / "few"
    few.mkdir()
    for file in FILES[:-1]:
        (few / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(describe, "CHUNK", 4 * (1 + EACH))
    with pytest.raises(KeyboardInterrupt):
        sets.add("mine", stopped, nano, layout=FIVE)
    assert len(list((tmp_path / "ingest").rglob("*.parquet"))) == 1
    sets.add("mine", few, nano, layout=FIVE)
    put(workspace, "mine", files_given([FILES[-1]]), nano)
    assert {row["reference_id"]: row["parts"] for row in workspace.rows('SELECT * FROM "references"')} == whole
    [listed] = sets.list()
    assert (listed["images"], listed["parts_layout"]) == (10, FIVE)
    gone = drop(workspace, "mine", [FILES[0].name])
    assert gone.images == 9
    found = workspace.rows('SELECT parts FROM "references"')
    assert [len(row["parts"]) for row in found] == [EACH * nano.dimensions] * 9
    sets.add("mine", few, nano)
    assert {row["parts"] for row in workspace.rows('SELECT parts FROM "references"')} == {None}


def test_what_cannot_have_parts_is_refused(
    added: Workspace, nano: Descriptor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "other")
    with pytest.raises(ReferenceSetError, match="pdq is a hash of the whole"):
        ReferenceSets(workspace).add("x", TRAIN, PdqDescriptor(), layout=FIVE)
    (tmp_path / "hashes.csv").write_text("hash\n" + "0f" * 32 + "\n")
    with pytest.raises(ConfigError, match="has no pictures"):
        api.add_references("x", tmp_path / "hashes.csv", descriptor="pdq", workspace=workspace, parts=True)
    monkeypatch.setattr(parts, "MOST", 9)
    with pytest.raises(ReferenceSetError, match="9 pictures at most"):
        ReferenceSets(workspace).add("x", TRAIN, nano, layout=FIVE)
    monkeypatch.undo()
    rows = added.rows("SELECT * FROM \"references\" WHERE reference_set = 'parts'")
    for changed, said in (({"parts": None, "parts_layout": None}, "and others not"), ({"parts": [1.0]}, "has not 5")):
        workspace.append("references", [*rows[:3], rows[3] | changed])
        with pytest.raises(ReferenceSetError, match=said):
            matched(workspace, [opened(FILES[0])], nano, "parts")
        workspace.remove_where("references", "reference_set", "parts")
    workspace.append("references", [one | {"parts_layout": "nine"} for one in rows])
    with pytest.raises(ReferenceSetError, match="does not know"):
        matched(workspace, [opened(FILES[0])], nano, "parts")


def in_parts(row: dict[str, Any], rng: np.random.Generator, part: np.ndarray | None = None) -> dict[str, Any]:
    """A row of references with parts that are like the whole; the last one is ``part`` where it is given."""
    made = [unit(row["descriptor"], 0.3 * rng.normal(size=WIDTH)) for _ in range(EACH)]
    if part is not None:
        made[-1] = part
    return row | {"parts": np.concatenate(made), "parts_layout": FIVE}


def unseen(references: int, decoys: int, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of references and decoys that are alike by chance alone, with parts."""
    mine = [reference("mine", f"m{one}", unit(rng.normal(size=WIDTH))) for one in range(references)]
    others = [reference("others", f"d{one}", unit(rng.normal(size=WIDTH)), "background") for one in range(decoys)]
    return [in_parts(one, rng) for one in mine], [in_parts(one, rng) for one in others]


def weighed(workspace: Workspace, rows: list[dict[str, Any]], drawn: list[np.ndarray]) -> dict[str, Any]:
    workspace.append("references", rows)
    if not workspace.rows("SELECT 1 FROM audits"):
        workspace.append("audits", [audited(AUDIT)])
        workspace.append("extractions", [
            {"audit_id": AUDIT, "rank": rank, "index": rank, "descriptor": one} for rank, one in enumerate(drawn, 1)
        ])  # fmt: skip
    match_audit(workspace, AUDIT, ["mine"])
    chances = {row["reference_id"]: row for row in workspace.rows("SELECT * FROM chances")}
    return {"chances": chances, "whole": workspace.rows("SELECT * FROM set_chances")[0]}


def test_references_and_decoys_with_parts_are_exchangeable(workspace: Workspace) -> None:
    rng = np.random.default_rng(7)
    mine, others = unseen(200, 150, rng)
    drawn = [unit(rng.normal(size=WIDTH)) for _ in range(40)]
    learnt = unit(drawn[0], 0.3 * rng.normal(size=WIDTH) / WIDTH**0.5)
    mine[0] = in_parts(mine[0], rng, learnt)
    found = weighed(workspace, [*mine, *others], drawn)
    row = found["chances"][digest("m0")]
    assert (row["rank"], row["part"]) == (1, list(LAYOUTS[FIVE][-1]))
    assert row["similarity"] == pytest.approx(float(learnt @ drawn[0]), abs=1e-5)
    assert row["extraction_p"] < 1 / 150
    told = np.array([one["extraction_p"] for name, one in found["chances"].items() if name != digest("m0")])
    assert np.mean(told <= 0.05) <= 0.1
    assert np.mean(told <= 0.5) <= 0.6
    best = [max(float((one @ np.array(drawn).T).max()) for one in
                [other["descriptor"], *other["parts"].reshape(EACH, WIDTH)]) for other in others]  # fmt: skip
    assert sorted(found["whole"]["decoy_similarities"]) == pytest.approx(sorted(best), abs=1e-5)


@pytest.mark.parametrize("who", ["references", "decoys"])
def test_sets_with_parts_and_decoys_without_are_not_compared(workspace: Workspace, who: str) -> None:
    rng = np.random.default_rng(8)
    mine, others = unseen(20, 60, rng)
    plain = {"parts": None, "parts_layout": None}
    rows = [*mine, *(one | plain for one in others)] if who == "references" else [*(o | plain for o in mine), *others]
    found = weighed(workspace, rows, [unit(rng.normal(size=WIDTH)) for _ in range(5)])
    assert found["whole"]["p"] is None
    assert {one["p"] for one in found["chances"].values()} == {None}
    assert "not described in the same parts" in found["whole"]["uncalibrated"]
    assert {one["problem"] for one in found["whole"]["backgrounds"]} == {OTHER_PARTS}
    [said] = set_chances_of(workspace.rows, AUDIT, questions_of(workspace.rows, "d", ["mine"]), VerdictSettings())
    assert said.uncalibrated == found["whole"]["uncalibrated"]


def test_a_set_described_anew_in_parts_is_another_question(workspace: Workspace) -> None:
    mine, others = unseen(3, 3, np.random.default_rng(9))
    asked = []
    for rows in (mine, [one | {"parts": None, "parts_layout": None} for one in mine]):
        workspace.write("references", "mine.0", rows)
        workspace.write("references", "others.0", others)
        asked.append(questions_of(workspace.rows, "d", ["mine"]).of["mine"])
    assert asked[0] != asked[1]


def test_the_frame_is_where_the_part_is_in_a_picture_shown_whole_in_a_square() -> None:
    assert frame_of([0.0, 0.5, 0.5, 1.0], 200, 100) == "left: 0.00%; top: 50.00%; width: 50.00%; height: 25.00%"
    assert frame_of(None, 200, 100) is None
    assert frame_of([0, 0, 1, 1], None, None) is None
