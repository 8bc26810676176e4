"""Lists of PDQ hashes: read as they are handed out, searched by their bits, and refused line by line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from audit import add_references
from audit.demo import load_set
from audit.descriptors import pdq_hash
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ConfigError, ReferenceSetError
from audit.references import ReferenceSets, lists
from audit.references.lists import read_list
from audit.states import SetKind
from audit.workspace import Workspace
from tests.references.test_match import extractions_of, match_extractions

HASHES = [pdq_hash(one)[0].hex() for one in load_set("fluent-animals", "train")[:3]]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", f"# known\n{HASHES[0]}\n\n{HASHES[1].upper()}, 80\r\n{HASHES[2]},100\n"),
        ("l.csv", f"id,Hash,quality\n7,{HASHES[0]},\n8,{HASHES[1]},80\n9,{HASHES[2]},100\n"),
        ("l.jsonl", "".join(json.dumps({"pdq_hash": one, "quality": 80 + n}) + "\n" for n, one in enumerate(HASHES))),
    ],
)
def test_a_list_is_read_as_it_is_handed_out(tmp_path: Path, name: str, text: str) -> None:
    found = read_list(written(tmp_path / name, text))
    assert [one.tobytes().hex() for one in found.hashes] == HASHES
    assert found.qualities.min() >= 80
    assert found.skipped == []
    assert found.names[0] == {"l.txt": "line 2", "l.csv": "7", "l.jsonl": "line 1"}[name]


def test_a_list_of_a_spreadsheet_begins_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(f"\ufeffhash,name\r\n{HASHES[0]},a\r\n\0,\r\n".encode())
    found = read_list(tmp_path / "l.csv")
    assert (found.names, [one.name for one in found.skipped]) == (["a"], ["line 3"])


def test_what_is_no_hash_costs_its_line(tmp_path: Path) -> None:
    wrong = [HASHES[0][:-1], "g" * 64, f"{HASHES[1]},200", f"{HASHES[1]},x", f"{HASHES[1]},49", "x" * 10_000, HASHES[0],
             f"{HASHES[1]},0090{'0' * 20}"]  # fmt: skip
    found = read_list(written(tmp_path / "l.txt", "\n".join([HASHES[0], *wrong, HASHES[2]])))
    assert [one.tobytes().hex() for one in found.hashes] == [HASHES[0], HASHES[2]]
    assert {one.name: one.reason for one in found.skipped} == {
        "line 2": "it has no hash of 64 hex digits", "line 3": "it has no hash of 64 hex digits",
        "line 4": "'200' is no quality from 0 to 100", "line 5": "'x' is no quality from 0 to 100",
        "line 6": "quality 49 says too little: 50 is the least", "line 8": "the same hash as line 1",
        "line 9": "'00900000000000000000' is no quality from 0 to 100",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["[]", "{", '{"hash": 5}', '{"hash": null}', "[" * 4000])
def test_json_that_is_no_object_with_a_hash_costs_its_line(tmp_path: Path, line: str) -> None:
    found = read_list(written(tmp_path / "l.jsonl", f'{line}\n{{"hash": "{HASHES[0]}"}}\n'))
    assert (len(found.hashes), [one.name for one in found.skipped]) == (1, ["line 1"])


def test_lists_without_hashes_or_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text, why in (
        ("a.txt", "", "it is empty"), ("b.txt", "x\n", "line 1: it has no hash"), ("c.csv", "a,b\n1,2\n", "no column"),
        ("d.csv", "", "no column of hashes"), ("e.jsonl", "{}\n", "line 1"),
    ):  # fmt: skip
        with pytest.raises(ReferenceSetError, match=why):
            read_list(written(tmp_path / name, text))
    monkeypatch.setattr(lists, "MOST_LINES", 2)
    with pytest.raises(ReferenceSetError, match="more than 2 lines"):
        read_list(written(tmp_path / "l.txt", "\n".join(HASHES)))


def test_a_list_is_matched_by_its_bits(tmp_path: Path, workspace: Workspace) -> None:
    path = written(tmp_path / "known.txt", "\n".join([*HASHES, "bad"]))
    added = add_references("known", path, descriptor="pdq", workspace=workspace)
    assert (added.images, len(added.skipped)) == (3, 1)
    pictures = load_set("fluent-animals", "train")[:5]
    rows = match_extractions(workspace, extractions_of(pictures, PdqDescriptor()), ["known"], "pdq", 1 - 31 / 128)
    matched = {row["rank"]: row for row in rows if row["is_match"]}
    assert set(matched) == {1, 2, 3}
    assert [matched[rank]["pdq_distance"] for rank in (1, 2, 3)] == [0, 0, 0]
    assert np.allclose([one["similarity"] for one in matched.values()], 1)
    [listed] = ReferenceSets(workspace).list()
    assert (listed["descriptor_name"], listed["images"]) == ("pdq", 3)


def test_a_list_has_no_pictures(tmp_path: Path, workspace: Workspace) -> None:
    path = written(tmp_path / "known.txt", HASHES[0])
    for wrong in ({"descriptor": "nano"}, {"descriptor": "pdq", "kind": SetKind.background}):
        with pytest.raises(ConfigError, match="is a list of PDQ hashes"):
            add_references("known", path, workspace=workspace, **wrong)
