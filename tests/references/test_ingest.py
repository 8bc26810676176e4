"""Sets that are added in parts: nothing is described twice, and nothing is seen of a set before all of it is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit import add_references
from audit.demo import set_folder
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ReferenceSetError
from audit.references import ReferenceSets, describe, staging
from audit.workspace import Workspace

TRAIN = set_folder("fluent-animals", "train")


class Counting(PdqDescriptor):
    """PDQ, which says how many pictures it has described."""

    def __init__(self) -> None:
        super().__init__()
        self.described = 0

    def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        self.described += 1
        return super()._prepare(image)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "CHUNK", 2)
    monkeypatch.setattr(staging, "ROWS", 2)


def stop_at(number: int):  # type: ignore[no-untyped-def]
    def tell(done: int, total: int) -> None:
        if done >= number:
            raise KeyboardInterrupt

    return tell


def test_what_was_described_is_not_described_again(workspace: Workspace, small_parts: None) -> None:
    described, whole = ReferenceSets(workspace), Counting()
    with pytest.raises(KeyboardInterrupt):
        described.add("animals", TRAIN, whole, progress=stop_at(6))
    assert (whole.described, described.list()) == (6, [])
    for ask in (lambda: described.require("animals", whole), lambda: described.require_any(["animals"])):
        with pytest.raises(ReferenceSetError, match="half added: the same 'lora-audit references add' goes on"):
            ask()
    assert described.add("animals", TRAIN, whole).images == 10
    assert whole.described == 10
    assert workspace.files.list(staging.FOLDER, recursive=True) == []
    once = workspace.rows('SELECT * EXCLUDE (added_at) FROM "references" ORDER BY reference_id')
    described.add("animals", TRAIN, Counting())
    assert workspace.rows('SELECT * EXCLUDE (added_at) FROM "references" ORDER BY reference_id') == once


def test_other_conditions_describe_again(workspace: Workspace, small_parts: None) -> None:
    counting = Counting()
    with pytest.raises(KeyboardInterrupt):
        ReferenceSets(workspace).add("animals", TRAIN, counting, progress=stop_at(6))
    ReferenceSets(workspace).add("animals", TRAIN, counting, thumbnails=False)
    assert counting.described == 16
    assert workspace.rows('SELECT count(thumbnail) AS n FROM "references"') == [{"n": 0}]
    assert workspace.files.list(staging.FOLDER, recursive=True) == []


def test_a_set_stays_as_it_is_until_the_next_is_whole(workspace: Workspace, small_parts: None, tmp_path: Path) -> None:
    shutil.copytree(TRAIN, tmp_path / "few")
    for path in sorted((tmp_path / "few").iterdir())[:7]:
        path.unlink()
    described = ReferenceSets(workspace)
    described.add("animals", tmp_path / "few", Counting())
    with pytest.raises(KeyboardInterrupt):
        described.add("animals", TRAIN, Counting(), progress=stop_at(8))
    assert described.list()[0]["images"] == 3
    shutil.copy(next((tmp_path / "few").iterdir()), tmp_path / "few/again.png")
    counting = Counting()
    added = described.add("animals", tmp_path / "few", counting)  # of another folder: what is not in it is left out
    assert (added.images, described.list()[0]["images"]) == (3, 3)
    assert counting.described < 3
    assert [one.reason[:13] for one in added.skipped] == ["the same file"]


def test_removing_takes_away_what_is_half_added(workspace: Workspace, small_parts: None) -> None:
    described = ReferenceSets(workspace)
    with pytest.raises(KeyboardInterrupt):
        described.add("animals", TRAIN, Counting(), progress=stop_at(6))
    assert described.remove("animals").pictures == 0
    assert workspace.files.list(staging.FOLDER, recursive=True) == []
    with pytest.raises(ReferenceSetError, match="no reference set 'animals'"):
        described.remove("animals")


def test_a_damaged_part_is_described_again(workspace: Workspace, small_parts: None) -> None:
    described, counting = ReferenceSets(workspace), Counting()
    with pytest.raises(KeyboardInterrupt):
        described.add("animals", TRAIN, counting, progress=stop_at(6))
    part = next((workspace.root / staging.FOLDER).rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    assert described.add("animals", TRAIN, counting).images == 10
    assert counting.described == 12


def test_a_part_that_goes_meanwhile_is_refused(workspace: Workspace, small_parts: None) -> None:
    def tell(done: int, total: int) -> None:
        if done == total:
            next((workspace.root / staging.FOLDER).rglob("*.parquet")).unlink()

    with pytest.raises(ReferenceSetError, match="2 of the pictures that were described are not in"):
        ReferenceSets(workspace).add("animals", TRAIN, Counting(), progress=tell)
    assert ReferenceSets(workspace).list() == []


def test_processes_make_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TRAIN, tmp_path / "pictures")
    (tmp_path / "pictures/broken.png").write_bytes(b"no")
    monkeypatch.setattr(describe, "CHUNK", 3)
    rows = []
    for workers in (1, 2):
        place = Workspace(tmp_path / f"w{workers}")
        added = add_references("a", tmp_path / "pictures", descriptor="pdq", workspace=place, workers=workers)
        assert [one.name for one in added.skipped] == ["broken.png"]
        rows.append(place.rows('SELECT * EXCLUDE (added_at) FROM "references" ORDER BY reference_id'))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 10


def test_chunks_hold_few_bytes() -> None:
    from audit.references.inputs import given

    some = [given.Given(str(number), bytes(given.BYTES_AT_ONCE // 3)) for number in range(7)]
    assert [len(one) for one in given.chunks(some, describe.CHUNK)] == [4, 3]
