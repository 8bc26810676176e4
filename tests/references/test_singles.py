"""Single pictures: put and dropped while the others stay, with what was found before, and in the index."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.demo import load_set, set_folder
from audit.descriptors import Descriptor
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ReferenceSetError, WorkspaceError
from audit.references import ReferenceSets
from audit.references.index import Bank, open_bank
from audit.references.inputs import Given
from audit.references.singles import drop, files_given, put
from audit.schemas import TABLES
from audit.states import SetKind
from audit.workspace import Workspace
from tests.references.test_match import extractions_of, match_extractions

TRAIN = set_folder("fluent-animals", "train")
FILES = sorted(TRAIN.glob("*.png"))


@pytest.fixture
def few(workspace: Workspace, nano: Descriptor, tmp_path: Path) -> Workspace:
    """A set of the first four pictures."""
    (tmp_path / "few").mkdir()
    for path in FILES[:4]:
        shutil.copy(path, tmp_path / "few")
    ReferenceSets(workspace).add("mine", tmp_path / "few", nano)
    return workspace


def names(workspace: Workspace, name: str = "mine") -> list[str]:
    rows = workspace.rows('SELECT name FROM "references" WHERE reference_set = ? ORDER BY name', [name])
    return [row["name"] for row in rows]


def indexed(workspace: Workspace, descriptor: Descriptor) -> Bank:
    def ask(connection: duckdb.DuckDBPyConnection) -> Bank:
        return open_bank(connection, workspace, "mine", descriptor.name, large=2)

    return workspace.asked(ask, '"references"')


def test_pictures_are_put_and_found(few: Workspace, nano: Descriptor) -> None:
    assert len(indexed(few, nano)) == 4
    done = put(few, "mine", files_given(FILES[3:6], '{"case": 7}'), nano)
    assert (done.added, done.replaced, done.changed, done.images) == (2, 0, 1, 6)
    assert names(few) == [path.name for path in FILES[:6]]
    assert len(indexed(few, nano)) == 6
    told = few.rows('SELECT name FROM "references" WHERE metadata IS NOT NULL ORDER BY name')
    assert [row["name"] for row in told] == [path.name for path in FILES[3:6]]
    again = put(few, "mine", files_given(FILES[4:7]), nano)
    assert (again.added, again.changed, again.images) == (1, 0, 7)
    assert {one.name for one in again.skipped} == {path.name for path in FILES[4:6]}
    image = load_set("fluent-animals", "train")[5:6]
    rows = match_extractions(few, extractions_of(image, nano), ["mine"], nano.name, nano.threshold, large=2)
    assert [row["is_match"] for row in rows].count(True) == 1
    few.compact("references", every=True)
    assert len(indexed(few, nano)) == 7


def test_stopped_while_metadata_is_written_a_picture_stays(
    few: Workspace, nano: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        for name in ("ParquetWriter", "write_table"):
            patch.setattr(pq, name, full)
        with pytest.raises((OSError, WorkspaceError)):
            put(few, "mine", files_given(FILES[3:4], '{"case": 7}'), nano)
    assert names(few) == [path.name for path in FILES[:4]]
    assert put(few, "mine", files_given(FILES[3:4], '{"case": 7}'), nano).changed == 1
    assert names(few) == [path.name for path in FILES[:4]]


def test_a_picture_of_the_same_name_takes_the_place(few: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    before = few.rows('SELECT reference_id FROM "references" WHERE name = ?', [FILES[0].name])
    Image.open(FILES[8]).save(tmp_path / FILES[0].name)
    done = put(few, "mine", files_given([tmp_path / FILES[0].name]), nano)
    assert (done.added, done.replaced, done.images) == (0, 1, 4)
    after = few.rows('SELECT reference_id FROM "references" WHERE name = ?', [FILES[0].name])
    assert len(after) == 1
    assert after != before
    with pytest.raises(ReferenceSetError, match="no pictures of mine"):
        drop(few, "mine", [before[0]["reference_id"]])


def test_a_picture_is_dropped_for_good_and_others_stay(few: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    sets = ReferenceSets(few)
    sets.add("other", tmp_path / "few", nano)
    sets.add("mine", tmp_path / "few", PdqDescriptor())
    put(few, "mine", files_given(FILES[4:6]), nano)
    images = load_set("fluent-animals", "train")[:2]
    few.write("matches", f"{'0' * 32}.mine", match_extractions(
        few, extractions_of(images, nano), ["mine"], nano.name, nano.threshold
    ))  # fmt: skip
    few.compact("references", every=True)
    digest = few.rows('SELECT reference_id FROM "references" WHERE name = ?', [FILES[4].name])[0]["reference_id"]
    done = drop(few, "mine", [FILES[0].name, digest[:10].upper()])
    assert (done.pictures, done.images) == ([FILES[0].name, FILES[4].name], 4)
    sql = """SELECT name, count(*) AS n FROM "references" WHERE reference_set = 'mine' GROUP BY ALL ORDER BY ALL"""
    rows = few.rows(sql)
    assert {row["name"]: row["n"] for row in rows} == {
        FILES[1].name: 2, FILES[2].name: 2, FILES[3].name: 2, FILES[5].name: 1,
    }  # fmt: skip
    assert names(few, "other") == [path.name for path in FILES[:4]]
    assert few.rows("SELECT * FROM matches") == []  # the nearest may be another now
    held = [path.read_bytes() for path in (few.root / "tables/references").rglob("*.parquet")]
    assert held
    assert not any(digest.encode() in content for content in held)
    assert all(name in TABLES for name in ("references", "matches"))


def test_adding_again_replaces_what_was_put(few: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    put(few, "mine", files_given(FILES[4:8]), nano)
    few.compact("references", every=True)
    put(few, "mine", files_given(FILES[8:9]), nano)
    ReferenceSets(few).add("mine", tmp_path / "few", nano)
    assert names(few) == [path.name for path in FILES[:4]]
    few.compact("references", every=True)
    assert names(few) == [path.name for path in FILES[:4]]


def test_hashes_are_put_into_a_list(workspace: Workspace, tmp_path: Path) -> None:
    listed, more = tmp_path / "l.txt", tmp_path / "more.csv"
    listed.write_text(f"{'0f' * 32}\n{'ab' * 32}\n")
    more.write_text(f"hash,id\n{'0f' * 32},a\n{'cd' * 32},b\n")
    ReferenceSets(workspace).add_list("known", listed)
    done = put(workspace, "known", [more], PdqDescriptor())
    assert (done.added, done.images, [one.name for one in done.skipped]) == (1, 3, ["a"])
    assert drop(workspace, "known", ["b"]).images == 2


def test_what_cannot_be_put_or_dropped_is_refused(few: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    (tmp_path / "l.txt").write_text("0f" * 32)
    for files, why in (
        ([Given("broken.png", tmp_path / "broken.png")], "none of the 1 files can be put into mine"),
        ([tmp_path / "l.txt"], "no list of hashes for a set that pdq describes"),
    ):
        with pytest.raises(ReferenceSetError, match=why):
            put(few, "mine", files, nano)
    with pytest.raises(ReferenceSetError, match="was described by"):
        put(few, "mine", files_given(FILES[:1]), PdqDescriptor())
    with pytest.raises(ReferenceSetError, match="neither a folder nor"):
        put(few, "none", files_given(FILES[:1]), nano)
    with pytest.raises(ReferenceSetError, match="these are all pictures of mine"):
        drop(few, "mine", [path.name for path in FILES[:4]])
    with pytest.raises(ReferenceSetError, match="no reference set 'none'"):
        drop(few, "none", ["x"])
    control = set_folder("fluent-animals", "control")
    ReferenceSets(few).add("decoys", control, nano, kind=SetKind.background, drawn_with=["mine"])
    with pytest.raises(ReferenceSetError, match="declared a random split"):
        put(few, "decoys", files_given(FILES[:1]), nano)


def test_a_set_that_is_replaced_while_it_is_searched(few: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    held = indexed(few, nano)
    query = np.asarray(held.vectors[:1])
    before = held.nearest(query, 4)
    ReferenceSets(few).add("mine", set_folder("fluent-animals", "control"), nano)
    after = held.nearest(query, 4)  # who has the old one open finishes with it, whole
    assert before.row.tolist() == after.row.tolist()
    assert before.similarity.tolist() == after.similarity.tolist()
    fresh = indexed(few, nano)
    assert not set(fresh.ids.to_pylist()) & set(held.ids.to_pylist())
