"""What a manifest is for: whoever changes a byte of a report, of its rows or of its inputs is found out, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from audit.custody.check import verify_report
from audit.custody.keep import Custody, sign_written
from audit.custody.signing import load_key
from audit.custody.statement import PICTURES
from audit.errors import CustodyError, WorkspaceError
from audit.references import ReferenceSets
from audit.report import collect, write_page
from audit.schemas import KEY_COLUMNS, TABLES
from audit.states import Agreement
from audit.workspace import Workspace
from benchmarks.counts import counting
from tests.custody.conftest import ID, Keys, Report, rows_of
from tests.test_files import s3 as s3


def parts(report: Report, **given: Any) -> list[str]:
    return [one.part for one in report.differing(**given)]


def test_an_untouched_report_agrees_and_what_was_not_looked_at_is_said(made: Report) -> None:
    found = made.verify()
    assert found.agrees
    assert [page.page for page in found.pages] == [made.page]
    unchecked = {one.part for one in found.of(Agreement.unchecked)}
    assert unchecked == {"signature", "checkpoint", "pictures of mine", "pictures of decoys"}
    assert any(one.said.startswith("unsigned") for one in found.of(Agreement.unchecked))
    agreeing = {one.part for one in found.of(Agreement.agrees)}
    assert agreeing == {made.page, "inputs", "tables", "reference set mine", "reference set decoys"}
    assert found.pages[0].made is not None
    assert found.pages[0].made["operator"] == "Desk 4"
    assert found.pages[0].made["command"] == {"name": "scan", "options": {"base": "sd15"}}


def test_originals_are_compared_where_they_are_given(made: Report) -> None:
    given = {"references": [made.pictures], "checkpoint": made.checkpoint}
    found = made.verify(**given)
    assert found.agrees
    assert {one.part for one in found.of(Agreement.unchecked)} == {"signature"}


def test_a_byte_of_the_page_is_named(made: Report) -> None:
    page = made.path(made.page)
    content = page.read_bytes()
    page.write_bytes(content[:-2] + b"x" + content[-1:])
    assert parts(made) == [made.page]
    page.unlink()
    assert [(one.part, one.said) for one in made.differing()] == [(made.page, "the file is missing")]


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("table", "change", "named"),
    [
        ("extractions", lambda row: row | {"confidence": 0.8000000000000002}, ["extractions 1"]),
        ("extractions", lambda row: row | {"image": row["image"][:-1] + b"x"}, ["extractions 1"]),
        ("generations", lambda row: row | {"seed": 7 if row["index"] == 2 else row["seed"]}, ["generations 2"]),
        ("generations", lambda row: row | {"pdq_quality": 0 if row["index"] == 1 else None}, ["generations 1"]),
        ("audits", lambda row: row | {"seconds_total": 3.0}, ["audits"]),
        ("references", lambda row: row | {"width": 64 if row["name"] == "red.png" else 32}, ["references mine"]),
        ("passed_over", lambda row: row | {"reason": "it is small"}, ["passed_over mine notes.txt"]),
    ],
)
def test_a_changed_row_is_named(made: Report, table: str, change: Change, named: list[str]) -> None:
    made.rewrite(table, change)
    found = made.differing()
    assert len(found) == len(named)
    assert all(one.part.startswith(name) for one, name in zip(found, named, strict=True))
    assert all("changed since" in one.said for one in found)


@pytest.mark.parametrize("table", ["matches", "memberships", "chances"])
def test_a_changed_row_of_a_reference_is_named_by_it(made: Report, table: str) -> None:
    column = "score" if table == "memberships" else "similarity"
    made.rewrite(table, lambda row: row | {column: row[column] + 1e-12 if row["reference_set"] == "mine" else 0.01})
    [found] = made.differing()
    [reference] = {row["reference_id"] for row in made.workspace.rows("SELECT * FROM matches")}
    assert found.part.startswith(f"{table} mine {reference}")


def test_scores_of_decoys_count_though_none_of_them_is_named(made: Report) -> None:
    made.rewrite("memberships", lambda row: row | {"score": 0.02 if row["reference_set"] == "decoys" else 0.25})
    assert parts(made) == ["reference set decoys"]
    decoy = next((made.pictures / "decoys").iterdir()).name
    assert decoy not in made.manifest.read_text() + made.rows.read_text()


def test_scores_of_decoys_that_were_measured_for_another_question_are_not_called_changed(made: Report) -> None:
    made.rewrite("memberships", lambda row: row | (
        {"score": 0.02, "question": "another"} if row["reference_set"] == "decoys" else {}
    ))  # fmt: skip
    found = made.verify()
    assert found.agrees
    [said] = [one.said for one in found.of(Agreement.unchecked) if one.part == "reference set decoys"]
    assert "for another question" in said


def test_rows_that_come_and_go_are_named(made: Report) -> None:
    rows = made.workspace.rows("SELECT * FROM generations WHERE index < 2")
    made.workspace.write("generations", ID, [*rows, rows[0] | {"index": 9}])
    assert {(one.part, one.said) for one in made.differing()} == {
        ("generations 2", "this row is not there any more"), ("generations 9", "this row was added since"),
    }  # fmt: skip
    made.workspace.remove("audits", ID)
    assert f"audits {ID}" in parts(made)


def test_what_the_manifest_says_of_settings_is_compared_with_the_tables(made: Report) -> None:
    document = json.loads(made.manifest.read_bytes())
    document["predicate"]["inputs"]["settings"]["steps"] = 50
    document["predicate"]["inputs"]["checkpoint"]["sha256"] = "0" * 64
    made.manifest.write_text(json.dumps(document))
    found = made.differing()
    assert [one.part for one in found] == ["inputs.checkpoint.sha256", "inputs.settings.steps"]
    assert found[1].said == "the manifest says 50, the tables say 15"


def test_changed_settings_of_the_tables_are_named(made: Report) -> None:
    made.rewrite("audits", lambda row: row | {"settings": row["settings"].replace('"steps": 15', '"steps": 16')})
    assert parts(made) == ["inputs.settings.steps", "audits"]


def test_a_changed_picture_is_named_and_a_missing_one_is_not_called_changed(made: Report) -> None:
    Image.new("RGB", (32, 32), "yellow").save(made.pictures / "mine" / "red.png")
    (made.pictures / "decoys" / "blue.png").unlink()
    found = made.verify(references=[made.pictures / "mine", made.pictures / "decoys"])
    [changed] = found.of(Agreement.differs)
    assert changed.part == "picture red.png of mine"
    assert "another file" in changed.said
    said = [one.said for one in found.of(Agreement.unchecked) if one.part == "pictures of decoys"]
    assert said == ["1 of 2 originals are not in the folders given"]


def test_pictures_of_one_name_in_two_folders_are_not_taken_for_each_other(made: Report) -> None:
    """The folder of one set has a file that is called as one of the decoys is, which are not given."""
    Image.new("RGB", (32, 32), "white").save(made.pictures / "mine" / "blue.png")
    found = made.verify(references=[made.pictures / "mine"])
    assert found.agrees
    said = {one.part: one.said for one in found.of(Agreement.unchecked)}
    assert said["pictures of decoys"] == "2 of 2 originals are not in the folders given"


def test_a_set_that_is_gone_while_its_page_is_there_is_a_difference(made: Report) -> None:
    """Whoever takes away a set's rows alone does not hide what became of its matches."""
    made.workspace.remove("references", "mine.1")
    made.workspace.remove("matches", f"{ID}.mine")
    assert {one.partition(" ")[0] for one in parts(made)} == {"reference", "matches"}


def test_a_changed_checkpoint_is_named(made: Report) -> None:
    made.checkpoint.write_bytes(b"checkpoinT")
    assert parts(made, checkpoint=made.checkpoint) == ["checkpoint"]
    with pytest.raises(CustodyError, match=r"no\.safetensors cannot be read"):
        made.verify(checkpoint=made.checkpoint.with_name("no.safetensors"))


def test_a_changed_list_of_rows_is_named_and_rows_are_still_compared(made: Report) -> None:
    made.rows.write_text(made.rows.read_text().replace('"generations",2', '"generations",3'))
    found = made.differing()
    assert [one.part for one in found] == [str(made.rows.relative_to(made.workspace.root))]
    made.rewrite("extractions", lambda row: row | {"size": 4})
    assert parts(made)[1:] == ["extractions"]


def test_a_changed_list_of_pictures_is_named(made: Report) -> None:
    [listed] = (made.workspace.root / PICTURES).glob("mine.*")
    made.rewrite("references", lambda row: row | {"width": 64})
    listed.write_text("")
    assert any(one.part == f"{PICTURES}/{listed.name}" for one in made.differing())


def test_a_missing_manifest_is_a_difference(made: Report) -> None:
    made.manifest.unlink()
    [found] = made.differing()
    assert found.part.endswith(".manifest.json")
    assert "there is none" in found.said
    made.write()
    assert made.verify().agrees


def test_the_manifest_of_another_page_is_none(made: Report) -> None:
    document = json.loads(made.manifest.read_bytes())
    document["subject"][0]["name"] = f"{ID}.html"
    made.manifest.write_text(json.dumps(document))
    [found] = made.differing()
    assert "another page" in found.said


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"_type": ' * 50_000, b"{" + b" " * (9 << 20) + b"}",
        b'{"_type": "https://in-toto.io/Statement/v0.1"}',
        b'{"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://slsa.dev/provenance/v1"}',
        b'{"_type": "https://in-toto.io/Statement/v1", "predicateType": "urn:lora-audit:report:v1"}',
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused_in_words(made: Report, content: bytes) -> None:
    made.manifest.write_bytes(content)
    found = made.differing()
    assert found
    assert all(one.part.endswith(".manifest.json") and len(one.said) < 500 for one in found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("subject",), 5), (("subject", 0), None), (("subject", 0, "digest"), {}), (("subject", 0, "name"), 7),
        (("predicate",), []), (("predicate", "sets"), {"a": 1}), (("predicate", "sets", 0, "name"), "../../etc"),
        (("predicate", "sets", 0, "sha256"), "x/../../y"), (("predicate", "audit_id"), "../a"),
        (("predicate", "tables", "audits", "rows"), "1"), (("predicate", "tables", "audits"), None),
        (("predicate", "made", "operator"), ["x"]), (("predicate", "more"), 1),
    ],
)  # fmt: skip
def test_wrong_types_and_names_that_lead_elsewhere_are_refused(made: Report, path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(made.manifest.read_bytes())
    within = document
    for step in path[:-1]:
        within = within[step]
    within[path[-1]] = value
    made.manifest.write_text(json.dumps(document))
    [found] = made.differing()
    assert found.part.endswith(".manifest.json")


def test_odd_inputs_are_differences_and_nothing_worse(made: Report) -> None:
    document = json.loads(made.manifest.read_bytes())
    document["predicate"]["inputs"] = {"checkpoint": 3, "descriptor": [1], "settings": {"a": {"b": [1, "x" * 10_000]}}}
    document["predicate"]["tables"] = {"nonsense": {"rows": 1, "sha256": ""}}
    made.manifest.write_text(json.dumps(document))
    found = made.differing(checkpoint=made.checkpoint)
    assert {"inputs.checkpoint", "inputs.base", "nonsense", "audits", "checkpoint"} <= {one.part for one in found}
    assert all(len(one.said) < 500 for one in found)


def test_merging_files_changes_nothing(made: Report) -> None:
    before = made.manifest.read_bytes()
    for table in TABLES:
        made.workspace.compact(table, every=True)
    assert made.verify(references=[made.pictures], checkpoint=made.checkpoint).agrees
    made.write()
    assert made.manifest.read_bytes() == before


def test_describing_the_same_pictures_again_changes_nothing(made: Report) -> None:
    made.rewrite("references", lambda row: row | {"added_at": row["added_at"].replace(year=2001)})
    assert made.verify().agrees


def test_a_set_that_was_removed_is_said_to_be_and_nothing_of_it_is_left(made: Report) -> None:
    ReferenceSets(made.workspace).remove("decoys")
    found = made.verify()
    assert found.agrees
    assert [one.part for one in found.of(Agreement.removed)] == ["set_chances mine", "reference set decoys"]
    files = [path for path in (made.workspace.root / "reports").rglob("*") if path.is_file()]
    assert len(files) == 5  # page, document, rows, manifest, and the pictures of the other set
    assert not any("blue.png" in path.read_text() for path in files)
    ReferenceSets(made.workspace).remove("mine")
    assert not [path for path in (made.workspace.root / "reports").rglob("*") if path.is_file()]
    with pytest.raises(CustodyError, match="removed since"):
        made.verify()


def test_an_audit_that_is_not_there_is_no_report(made: Report) -> None:
    with pytest.raises(WorkspaceError, match="no finished audit"):
        verify_report(made.workspace, "ff")


def test_a_checkpoint_that_was_opted_out_is_no_difference(made: Report) -> None:
    made.rewrite("checkpoints", lambda row: row | {"checkpoint_sha256": None, "state": "opted-out"})
    found = made.verify()
    assert found.agrees
    assert [one.part for one in found.of(Agreement.removed)] == ["checkpoint"]


def test_every_table_of_an_audit_is_in_the_manifest(made: Report) -> None:
    document = json.loads(made.manifest.read_bytes())
    assert set(document["predicate"]["tables"]) == set(KEY_COLUMNS)
    lines = [json.loads(line) for line in made.rows.read_text().splitlines()]
    assert {line[0] for line in lines} == set(KEY_COLUMNS) - {"evaluations"}


def test_a_manifest_has_no_place_of_this_machine(made: Report, tmp_path: Path) -> None:
    texts = [path.read_text() for path in (made.workspace.root / "reports").rglob("*.json*")]
    assert texts
    assert not any(str(tmp_path) in text for text in texts)


def test_a_manifest_costs_no_question_and_no_listing(made: Report) -> None:
    """What it needs is read with the facts of the page; a run makes thousands of them."""
    with counting() as found:
        facts = collect(made.workspace, ID, ["mine"])
    reading = dict(found)
    made.manifest.unlink()
    with counting() as found:
        write_page(facts, made.workspace)
    assert reading["DuckDB connections"] == 1
    assert not found
    assert made.verify().agrees


def test_writing_the_page_again_mends_the_documents_beside_it(made: Report) -> None:
    made.rows.write_text("")
    [listed] = (made.workspace.root / PICTURES).glob("mine.*")
    listed.unlink()
    assert not made.verify(references=[made.pictures]).agrees
    before = made.manifest.read_bytes()
    made.write()
    assert made.verify(references=[made.pictures]).agrees
    assert made.manifest.read_bytes() == before


def test_scores_that_came_after_the_page_are_no_difference_and_changed_ones_are(made: Report) -> None:
    score = {"audit_id": ID, "kind": "control", "images": 2, "average_similarity": 0.5, "extraction_rate_07": 0.0,
             "extraction_rate_06": 0.0, "ceiling": 0.9}  # fmt: skip
    made.workspace.write("evaluations", f"{ID}.control", [score])
    found = made.verify()
    assert found.agrees
    assert "evaluations control" in {one.part for one in found.of(Agreement.unchecked)}
    made.write()
    assert made.verify().agrees
    made.workspace.write("evaluations", f"{ID}.control", [score | {"images": 3}])
    assert parts(made) == ["evaluations control"]
    made.workspace.remove("evaluations", f"{ID}.control")
    assert parts(made) == ["evaluations control"]


def test_a_report_on_object_storage_is_signed_and_verified(made: Report, keys: Keys, s3: str) -> None:
    workspace = Workspace(f"s3://bucket/custody?{s3}")
    for table, key, rows in rows_of(made.pictures, datetime.now(UTC)):
        workspace.write(table, key, rows)
    custody = Custody(key=load_key(keys.private))
    for _ in range(2):
        sign_written(workspace, write_page(collect(workspace, ID, ["mine"]), workspace, custody), custody)
    found = verify_report(workspace, ID, public_key=keys.public, references=[made.pictures], checkpoint=made.checkpoint)
    assert {one.state for page in found.pages for one in page.findings} == {Agreement.agrees}
    ReferenceSets(workspace).remove("decoys")
    assert len(verify_report(workspace, ID, public_key=keys.public).of(Agreement.removed)) == 2
