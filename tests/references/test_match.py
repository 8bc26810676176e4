"""Reference sets and the SQL that matches, against brute force."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from audit.demo import load_set, set_folder
from audit.descriptors import Descriptor, pdq_distance, pdq_hash
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ReferenceSetError
from audit.references import ReferenceSets
from audit.references import match_extractions as match_in
from audit.references.decoys import questions_of
from audit.references.folder import known_pictures
from audit.references.index import open_bank
from audit.references.index.store import LARGE
from audit.schemas import EXTRACTIONS
from audit.states import SetKind
from audit.workspace import Workspace

TRAIN = set_folder("fluent-animals", "train")


@pytest.fixture
def sets(workspace: Workspace) -> ReferenceSets:
    return ReferenceSets(workspace)


def extractions_of(images: np.ndarray, descriptor: Descriptor) -> pa.Table:
    vectors = descriptor.describe(images)
    rows = []
    for rank, (image, vector) in enumerate(zip(images, vectors, strict=True), start=1):
        packed, quality = pdq_hash(image)
        rows.append({"audit_id": "a", "rank": rank, "descriptor": vector, "pdq": packed, "pdq_quality": quality})
    return pa.Table.from_pylist(rows, schema=EXTRACTIONS)


def match_extractions(
    workspace: Workspace, extractions: pa.Table, sets: list[str], descriptor: str, threshold: float, top: int = 3,
    large: int = LARGE, control: pa.Table | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of matches; sets of ``large`` pictures or more are searched by their index."""

    def ask(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
        banks = {name: open_bank(connection, workspace, name, descriptor, large=large) for name in sets}
        return match_in(connection, extractions, banks, threshold, top=top, control=control).to_pylist()

    return workspace.asked(ask, '"references"')


def test_a_set_is_added_listed_and_removed(sets: ReferenceSets, nano: Descriptor) -> None:
    added = sets.add("animals", TRAIN, nano)
    assert (added.images, added.skipped) == (10, [])
    (row,) = sets.list()
    assert (row["reference_set"], row["images"], row["descriptor_name"]) == ("animals", 10, nano.name)
    sets.add("animals", TRAIN, nano)
    assert sets.list()[0]["images"] == 10
    sets.remove("animals")
    assert sets.list() == []
    with pytest.raises(ReferenceSetError, match="no reference set 'animals'"):
        sets.remove("animals")


def test_decoys_are_declared_a_random_split_with_a_set_as_it_is(sets: ReferenceSets, nano: Descriptor) -> None:
    control = set_folder("fluent-animals", "control")
    with pytest.raises(ReferenceSetError, match="neither a folder nor a reference set"):
        sets.add("decoys", control, nano, kind=SetKind.background, drawn_with=["animals"])
    sets.add("animals", TRAIN, nano)
    sets.add("decoys", control, nano, kind=SetKind.background, drawn_with=["animals"])
    assert {row["reference_set"]: row["drawn"] for row in sets.list()} == {"animals": False, "decoys": True}
    drawn = questions_of(sets.workspace.rows, nano.name, ["animals"]).drawn
    assert drawn == {"animals": frozenset({"decoys"})}
    for kind, names in ((SetKind.reference, ["animals"]), (SetKind.background, ["decoys"])):
        with pytest.raises(ReferenceSetError, match="only decoys"):
            sets.add("decoys", control, nano, kind=kind, drawn_with=names)
    sets.add("animals", set_folder("stamps-birds", "train"), nano)
    assert questions_of(sets.workspace.rows, nano.name, ["animals"]).drawn == {"animals": frozenset()}


def test_removing_a_set_removes_the_matches_with_it(
    sets: ReferenceSets, nano: Descriptor, workspace: Workspace
) -> None:
    for name in ("a", "b.c"):
        sets.add(name, TRAIN, nano)
        rows = match_extractions(
            workspace, extractions_of(load_set("fluent-animals", "train")[:1], nano), [name], nano.name, 0.7
        )
        workspace.write("matches", f"{'0' * 32}.{name}", rows)
    sets.remove("b.c")
    assert {row["reference_set"] for row in workspace.rows("SELECT * FROM matches")} == {"a"}


def test_broken_pictures_among_good_ones_are_passed_over_and_listed(
    sets: ReferenceSets, nano: Descriptor, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(TRAIN, folder / "sub")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (folder / "half.png").write_bytes((TRAIN / "koala.png").read_bytes()[:900])
    (folder / "notes.txt").write_text("not a picture by name")
    shutil.copy(TRAIN / "koala.png", folder / "the same again.png")
    added = sets.add("mixed", folder, nano)
    assert added.images == 10
    reasons = {one.name: one.reason for one in added.skipped}
    again = str(Path("sub") / "koala.png")  # the files of a folder come before those of its subfolders
    assert sorted(reasons) == sorted(["broken.png", "half.png", "notes.txt", again])
    assert all("not a readable picture" in reasons[name] for name in ("broken.png", "half.png"))
    assert "the ending .txt" in reasons["notes.txt"]
    assert reasons[again] == "the same file as the same again.png"
    assert len(reasons) == len(added.skipped)


def test_folders_that_cannot_be_used_are_named(sets: ReferenceSets, nano: Descriptor, tmp_path: Path) -> None:
    with pytest.raises(ReferenceSetError, match="not a folder"):
        sets.add("x", tmp_path / "none", nano)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReferenceSetError, match="holds no pictures"):
        sets.add("x", tmp_path / "empty", nano)
    (tmp_path / "empty/a.png").write_bytes(b"no")
    with pytest.raises(ReferenceSetError, match="none of the 1 pictures"):
        sets.add("x", tmp_path / "empty", nano)
    with pytest.raises(ReferenceSetError, match="cannot name a reference set"):
        sets.add("../x", TRAIN, nano)


def test_links_that_lead_out_of_the_folder_are_passed_over(
    sets: ReferenceSets, nano: Descriptor, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    shutil.copy(TRAIN / "koala.png", tmp_path / "pictures/koala.png")
    shutil.copy(TRAIN / "otter.png", tmp_path / "private.png")
    (tmp_path / "pictures/link.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "pictures/circle.png").symlink_to(tmp_path / "pictures/circle.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictures/folder").symlink_to(tmp_path / "elsewhere")
    added = sets.add("x", tmp_path / "pictures", nano)
    assert added.images == 1
    reasons = {one.name: one.reason for one in added.skipped}
    assert set(reasons) == {"link.png", "circle.png", "folder"}
    assert "leads out of the folder" in reasons["link.png"]


def test_every_file_is_a_reference_or_is_listed_with_its_reason(
    sets: ReferenceSets, nano: Descriptor, tmp_path: Path
) -> None:
    """Whatever the files are: pictures by any known ending, and one that ends a decoder costs itself alone."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    koala = Image.open(TRAIN / "koala.png").convert("RGB")
    for number, name in enumerate(["a.JFIF", "b.jpe", "c.AVIF", "d.TIFF", "e.webp", "f.Bmp", "g.gif", "h.apng"]):
        kind = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG"}.get(name[2:].lower(), name[2:].upper())
        koala.resize((60 + number, 60)).save(folder / name, kind)
    bad = {
        "tiny.png": "too few", "noise.avif": "not a readable", "empty.jpg": "not a readable",
        "noise.heic": "not a readable", "list.csv": "ending .csv", "LICENSE": "no ending", ".hidden": "no ending",
        "vector.png": "not a readable", "exif.jpg": "not a readable",
    }  # fmt: skip
    koala.resize((15, 200)).save(folder / "tiny.png")
    (folder / "noise.avif").write_bytes((folder / "c.AVIF").read_bytes()[:200] + b"\xff" * 500)
    (folder / "noise.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    koala.save(folder / "vector.png", "EPS")
    koala.save(folder / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\0\0\xff\xff\xff\xff")
    for name in ("empty.jpg", "list.csv", "LICENSE", ".hidden"):
        (folder / name).touch()
    added = sets.add("x", folder, nano)
    reasons = {one.name: one.reason for one in added.skipped}
    if "exif.jpg" not in reasons:  # a Pillow that reads past it
        bad.pop("exif.jpg")
    assert {name: bad[name] in reasons[name] for name in reasons} == dict.fromkeys(bad, True)
    assert added.images == len(list(folder.iterdir())) - len(bad)


def test_a_picture_that_the_descriptor_fails_on_costs_itself_and_a_broken_descriptor_is_an_error(
    sets: ReferenceSets, tmp_path: Path
) -> None:
    class Picky(PdqDescriptor):
        refuses = (61,)

        def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
            if isinstance(image, Image.Image) and image.width in self.refuses:
                raise ZeroDivisionError("of this picture")
            return super()._prepare(image)

    koala = Image.open(TRAIN / "koala.png").convert("RGB")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for width in (60, 61, 62):
        koala.resize((width, 60)).save(folder / f"{width}.png")
    picky = Picky()
    added = sets.add("x", folder, picky)
    assert added.images == 2
    [skipped] = added.skipped
    assert skipped.name == "61.png"
    said = r"cannot be described \(unforeseen ZeroDivisionError: of this picture \(trace [0-9a-f]{8}\)\)"
    assert re.fullmatch(said, skipped.reason)
    picky.refuses = (60, 61, 62)
    with pytest.raises(ZeroDivisionError):
        sets.add("y", folder, picky)


def test_sets_of_another_descriptor_are_not_compared(sets: ReferenceSets, nano: Descriptor) -> None:
    sets.add("animals", TRAIN, PdqDescriptor())
    with pytest.raises(ReferenceSetError, match="described by pdq"):
        sets.require("animals", nano)
    with pytest.raises(ReferenceSetError, match="neither a folder nor a reference set"):
        sets.require("nothing", nano)
    sets.add("animals", TRAIN, nano)
    sets.require("animals", nano)


def test_matches_are_those_of_brute_force(sets: ReferenceSets, nano: Descriptor, workspace: Workspace) -> None:
    train, control = load_set("fluent-animals", "train"), load_set("fluent-animals", "control")
    sets.add("animals", TRAIN, nano)
    soft = np.stack([np.asarray(Image.fromarray(i).resize((40, 40)).resize((64, 64))) for i in train[:4]])
    images = np.concatenate([soft, control[:3]])
    rows = match_extractions(workspace, extractions_of(images, nano), ["animals"], nano.name, 0.7, top=2)
    references = workspace.rows('SELECT reference_id, descriptor, pdq, pdq_quality, name FROM "references"')
    known = np.array([row["descriptor"] for row in references])
    vectors = nano.describe(images)
    for rank in range(1, len(images) + 1):
        cosines = known @ vectors[rank - 1]
        best = np.argsort(-cosines)[:2]
        found = [row for row in rows if row["rank"] == rank and row["position"] <= 2]
        assert [row["reference_id"] for row in found] == [references[i]["reference_id"] for i in best]
        packed, quality = pdq_hash(images[rank - 1])
        for row, i in zip(found, best, strict=True):
            assert row["similarity"] == pytest.approx(cosines[i], abs=1e-5)
            assert row["is_match"] == (row["similarity"] >= 0.7 and row["position"] == 1)
            usable = quality >= 50 and references[i]["pdq_quality"] >= 50
            assert row["pdq_distance"] == (pdq_distance(packed, references[i]["pdq"]) if usable else None)
    names = {row["reference_id"]: row["name"] for row in references}
    first = {row["rank"]: names[row["reference_id"]] for row in rows if row["position"] == 1}
    assert [first[rank] for rank in range(1, 5)] == sorted(p.name for p in TRAIN.iterdir())[:4]


def test_an_extraction_speaks_for_its_nearest_reference_only(
    sets: ReferenceSets, nano: Descriptor, workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(TRAIN, tmp_path / "pictures")
    Image.open(TRAIN / "koala.png").resize((60, 60)).save(tmp_path / "pictures/koala again.png")
    sets.add("animals", tmp_path / "pictures", nano)
    koala = np.asarray(Image.open(TRAIN / "koala.png").convert("RGB"))[None]
    rows = match_extractions(workspace, extractions_of(koala, nano), ["animals"], nano.name, 0.7)
    assert [row["similarity"] > 0.7 for row in rows[:2]] == [True, True]
    assert [row["is_match"] for row in rows] == [True, False, False]


def test_pdq_alone_is_shown_but_is_no_match(sets: ReferenceSets, nano: Descriptor, workspace: Workspace) -> None:
    sets.add("animals", TRAIN, nano)
    table = extractions_of(load_set("fluent-animals", "train")[:1], nano)
    opposite = [-x for x in table["descriptor"][0].as_py()]
    table = table.set_column(
        table.schema.get_field_index("descriptor"),
        EXTRACTIONS.field("descriptor"),
        pa.array([opposite], EXTRACTIONS.field("descriptor").type),
    )
    rows = match_extractions(workspace, table, ["animals"], nano.name, 0.7)
    alone = [row for row in rows if row["evidence"] == "pdq"]
    assert [row["pdq_distance"] for row in alone] == [0]
    assert not any(row["is_match"] for row in rows)


def test_scores_want_every_known_picture_to_be_readable(tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "known")
    assert len(known_pictures(tmp_path / "known")) == 10
    (tmp_path / "known/broken.png").write_bytes(b"no")
    with pytest.raises(ReferenceSetError, match=r"broken\.png cannot be scored against"):
        known_pictures(tmp_path / "known")


def test_a_picture_whose_name_is_no_text_is_kept_and_shown_escaped(
    workspace: Workspace, sets: ReferenceSets, tmp_path: Path
) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"set")
    os.mkdir(folder)
    for name, content in (
        (b"caf\xe9.png", (TRAIN / sorted(os.listdir(TRAIN))[0]).read_bytes()),
        (b"\xff\x1b.txt", b"x"),
        (b"bad\xfe.png", b"no picture"),
    ):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    added = sets.add("odd", tmp_path / "set", PdqDescriptor())
    assert added.images == 1
    assert {one.name for one in added.skipped} == {"//\\xff\\x1b.txt", "//bad\\xfe.png"}
    [row] = workspace.rows('SELECT name FROM "references"')
    assert row["name"] == "//caf\\xe9.png"
    assert len(workspace.rows("SELECT * FROM passed_over")) == 2


def test_the_memory_of_adding_a_set_does_not_grow_with_its_pictures(workspace: Workspace, tmp_path: Path) -> None:
    for many in (2, 10):
        folder = tmp_path / str(many)
        folder.mkdir()
        for number in range(many):
            Image.new("RGB", (3000, 2000), (number, 9, 7)).save(folder / f"{number}.png", compress_level=1)
    code = (
        "import resource, sys; from pathlib import Path; from audit.descriptors.pdq import PdqDescriptor; "
        "from audit.references import ReferenceSets; from audit.workspace import Workspace; "
        "added = ReferenceSets(Workspace(sys.argv[1])).add('x', Path(sys.argv[2]), PdqDescriptor()); "
        "print(added.images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    peaks = []
    for many in (2, 10):
        command = [sys.executable, "-c", code, str(tmp_path / f"w{many}"), str(tmp_path / str(many))]
        images, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(images) == many
        peaks.append(int(peak))  # MiB; a picture of these takes 17
    assert peaks[1] - peaks[0] < 60


def test_what_the_base_alone_draws_as_near_is_no_match(
    sets: ReferenceSets, nano: Descriptor, workspace: Workspace
) -> None:
    sets.add("animals", TRAIN, nano)
    images = load_set("fluent-animals", "train")
    extractions = extractions_of(images[:3], nano)
    control = pa.Table.from_pylist(
        [{"audit_id": "a", "descriptor": vector} for vector in nano.describe(images[1:2])],
        schema=pa.schema([EXTRACTIONS.field("audit_id"), EXTRACTIONS.field("descriptor")]),
    )
    asked = (extractions, ["animals"], nano.name, 0.7)
    without = {row["rank"]: row for row in match_extractions(workspace, *asked) if row["position"] == 1}
    assert {row["verdict"] for row in without.values()} == {"match"}
    assert {row["control_similarity"] for row in without.values()} == {None}
    found = {row["rank"]: row for row in match_extractions(workspace, *asked, control=control) if row["position"] == 1}
    assert [found[rank]["verdict"] for rank in (1, 2, 3)] == ["match", "none", "match"]
    assert [found[rank]["is_match"] for rank in (1, 2, 3)] == [True, False, True]
    assert found[2]["control_similarity"] == pytest.approx(1)
    assert found[2]["similarity"] == without[2]["similarity"]
    brute = nano.describe(images[0:1]) @ nano.describe(images[1:2]).T
    assert found[1]["control_similarity"] == pytest.approx(float(brute[0, 0]), abs=1e-5)
