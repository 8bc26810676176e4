"""The commands on an audit of the embedded model: signed when it is made, verified, and run again bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from audit.cli import app
from audit.custody.again import compared, settings_of
from audit.custody.statement import documents_of
from audit.demo import set_folder
from audit.descriptors import load_descriptor
from audit.errors import CustodyError
from audit.references import ReferenceSets
from audit.references.asked import folder_set_name
from audit.references.parts import FIVE
from audit.workspace import Workspace
from tests.conftest import BASE, CAPTION, KOHYA, PEFT
from tests.custody.conftest import keys_made

TRAIN, CONTROL = set_folder("fluent-animals", "train"), set_folder("fluent-animals", "control")


@dataclass(frozen=True)
class Audited:
    folder: Path
    audit_id: str
    page: str

    @property
    def workspace(self) -> Path:
        return self.folder / "w"


def call(*arguments: object, codes: tuple[int, ...] = (0,)) -> Any:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code in codes, (done.exit_code, done.output, done.exception)
    return json.loads(done.stdout) if "--json" in arguments else done.output


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """A signed audit with decoys and membership scores, of pictures that are described in parts."""
    folder = tmp_path_factory.mktemp("again")
    for place in (TRAIN, CONTROL):  # a folder whose set is described in parts stays so
        ReferenceSets(Workspace(folder / "w")).add(folder_set_name(place), place, load_descriptor("nano"), layout=FIVE)
    keys_made(folder, "key", "-algorithm", "ed25519")
    found = call(
        "scan", KOHYA, "--base", BASE, "--descriptor", "nano", "--caption", CAPTION, "--n0", 4, "--steps", 8,
        "--images-per-training-image", 6, "--membership-evaluations", 300, "--references", TRAIN,
        "--background", CONTROL, "--workspace", folder / "w", "--operator", "Desk 4",
        "--signing-key", folder / "key.pem", "--json", codes=(12,),
    )  # fmt: skip
    return Audited(folder, found["audit"]["audit_id"], f"reports/{Path(found['report']).name}")


@pytest.fixture
def again(audited: Audited, tmp_path: Path) -> Audited:
    shutil.copytree(audited.folder, tmp_path / "a")
    return Audited(tmp_path / "a", audited.audit_id, audited.page)


ORIGINALS = ("--references", TRAIN, "--references", CONTROL)


def test_a_scan_signs_what_it_writes_and_says_who_asked_for_what(audited: Audited) -> None:
    found = call(
        "verify", audited.audit_id, "--workspace", audited.workspace, "--public-key", audited.folder / "key.pub",
        "--checkpoint", KOHYA, *ORIGINALS, "--json",
    )  # fmt: skip
    assert found["agrees"]
    [page] = found["pages"]
    assert {one["state"] for one in page["findings"]} == {"agrees"}
    assert page["made"]["operator"] == "Desk 4"
    options = page["made"]["command"]["options"]
    assert page["made"]["command"]["name"] == "scan"
    assert (options["file"], options["base"], options["references"]) == (KOHYA.name, "base", ["train"])
    assert not {"workspace", "signing_key", "operator"} & set(options)
    text = (audited.workspace / documents_of(audited.page)[1]).read_text()
    assert str(audited.folder) not in text
    assert str(TRAIN.parent) not in text


def test_a_changed_page_and_bad_questions_have_their_exit_codes(again: Audited) -> None:
    place = ("--workspace", again.workspace)
    assert "nothing that was checked differs" in call("verify", again.audit_id[:8], *place)
    page = again.workspace / again.page
    page.write_text(page.read_text().replace("<title>", "<title>x"))
    said = call("verify", again.audit_id[:8], *place, codes=(1,))
    assert f"DIFFERS: {again.page}: it was changed since" in " ".join(said.split())
    call("verify", *place, codes=(0,))
    assert "give AUDIT" in " ".join(call("verify", "--checkpoint", KOHYA, *place, codes=(2,)).split())


def test_sign_signs_later_and_says_when_it_has_nothing_to_do(again: Audited) -> None:
    place = ("--workspace", again.workspace, "--json")
    (again.workspace / documents_of(again.page)[2]).unlink()
    key = ("--signing-key", again.folder / "key.pem")
    first, second = (call("sign", again.audit_id, *key, *place) for _ in range(2))
    assert [one["signed_now"] for one in first["pages"]] == [True]
    assert [one["signed_now"] for one in second["pages"]] == [False]
    assert call("verify", again.audit_id, "--public-key", again.folder / "key.pub", *place)["agrees"]
    assert isinstance(CliRunner().invoke(app, ["sign", again.audit_id, *map(str, place)]).exception, Exception)


def test_reports_that_are_written_again_keep_their_manifest(again: Audited) -> None:
    """Also after merging and by another command, which describes the same pictures again."""
    envelope = again.workspace / documents_of(again.page)[2]
    before = envelope.read_bytes()
    call("compact", "--workspace", again.workspace)
    call("report", again.audit_id, "--workspace", again.workspace, codes=(12,))
    assert envelope.read_bytes() == before


def test_the_audit_reproduces_bit_for_bit(audited: Audited) -> None:
    found = call(
        "reproduce", audited.audit_id[:8], "--workspace", audited.workspace, "--checkpoint", KOHYA, "--base", BASE,
        *ORIGINALS, "--json",
    )  # fmt: skip
    assert found["exact"]
    assert found["agrees"]
    assert found["others"] == {}
    assert found["left_out"] == []
    rows = {part["table"]: part["rows"] for part in found["parts"] if part["table"] != "verdicts"}
    workspace = Workspace(audited.workspace)
    for table in ("generations", "extractions", "matches", "memberships", "chances", "audits"):
        [there] = workspace.rows(
            f"SELECT count(*) AS n FROM {table}"
            + (" WHERE starts_with(reference_set, 'train')" if table == "memberships" else "")
        )
        assert rows[table] == there["n"] > 0, table
    assert any(part["rows"] for part in found["parts"] if part["table"] == "verdicts")


def test_rows_that_were_changed_do_not_reproduce_and_missing_originals_are_said(again: Audited, tmp_path: Path) -> None:
    workspace = Workspace(again.workspace)
    rows = workspace.rows("SELECT * FROM matches")
    workspace.write("matches", f"{again.audit_id}.{rows[0]['reference_set']}", [
        row | {"verdict": "none" if row["verdict"] == "match" else "match", "similarity": row["similarity"] + 0.25}
        for row in rows
    ])  # fmt: skip
    shutil.copytree(CONTROL, tmp_path / "control")
    next((tmp_path / "control").iterdir()).unlink()
    found = call(
        "reproduce", again.audit_id, "--workspace", again.workspace, "--checkpoint", KOHYA, "--base", BASE,
        "--references", TRAIN, "--references", tmp_path / "control", "--json", codes=(1,),
    )  # fmt: skip
    assert not found["agrees"]
    parts = {(part["table"], part["column"]): part for part in found["parts"]}
    assert parts["matches", "similarity"]["largest"] == pytest.approx(0.25)
    assert parts["matches", "verdict"]["equal"] == 0
    assert parts["generations", "descriptor"]["exact"]
    [said] = found["left_out"]
    assert "1 of its 10 originals are not in --references" in said


def test_another_checkpoint_base_or_method_is_refused(again: Audited, tmp_path: Path) -> None:
    place = ("reproduce", again.audit_id, "--workspace", again.workspace)
    runner = CliRunner()
    other = runner.invoke(app, [str(one) for one in (*place, "--checkpoint", PEFT, "--base", BASE)])
    assert isinstance(other.exception, CustodyError)
    assert "not the file that was audited" in str(other.exception)
    shutil.copytree(BASE, tmp_path / "base")
    index = tmp_path / "base/model_index.json"
    index.write_text(index.read_text() + "\n")
    other = runner.invoke(app, [str(one) for one in (*place, "--checkpoint", KOHYA, "--base", tmp_path / "base")])
    assert isinstance(other.exception, CustodyError)
    assert "not the base model of the audit" in str(other.exception)
    workspace = Workspace(again.workspace)
    [row] = workspace.rows("SELECT * FROM audits")
    changed = row | {"settings": row["settings"].replace('"seed": 0', '"seed": 1')}
    workspace.write("audits", again.audit_id, [changed])
    other = runner.invoke(app, [str(one) for one in (*place, "--checkpoint", KOHYA, "--base", BASE)])
    assert isinstance(other.exception, CustodyError)
    assert "not " + again.audit_id in str(other.exception)


def test_a_run_signs_its_pages(again: Audited, tmp_path: Path) -> None:
    uploads, place = tmp_path / "uploads", tmp_path / "run"
    uploads.mkdir()
    shutil.copy(KOHYA, uploads)
    call("references", "add", "mine", TRAIN, "--descriptor", "nano", "--workspace", place)
    call("crawl", "folder", uploads, "--workspace", place)
    call(
        "run", "--base", f"sd1={BASE}", "--descriptor", "nano", "--references", "mine", "--steps", 6,
        "--workspace", place, "--images-per-training-image", 1, "--operator", "Nightly",
        "--signing-key", again.folder / "key.pem",
        codes=(0, 10, 11, 12, 13),
    )  # fmt: skip
    [row] = Workspace(place).rows("SELECT audit_id FROM audits")
    found = call(
        "verify", row["audit_id"], "--workspace", place, "--public-key", again.folder / "key.pub", "--json"
    )  # fmt: skip
    assert found["agrees"]
    assert found["pages"][0]["made"]["operator"] == "Nightly"
    assert found["pages"][0]["made"]["command"]["name"] == "run"
    assert found["pages"][0]["made"]["command"]["options"]["base"] == ["sd1=base"]


def test_settings_of_another_version_are_refused() -> None:
    with pytest.raises(CustodyError, match="none of this version"):
        settings_of('{"steps": 10, "unheard_of": 1}')
    assert settings_of('{"steps": 10}').steps == 10


def test_rows_are_compared_column_by_column() -> None:
    row = {
        "audit_id": "a",
        "rank": 1,
        "index": 0,
        "confidence": 0.5,
        "descriptor": [0.5, 1.0],
        "size": 2,
        "members": [1],
    }
    near = row | {"confidence": 0.5 + 1e-6, "descriptor": [0.5, 1.0 - 1e-6]}
    parts = {part.column: part for part in compared("extractions", [row], [near])}
    assert parts["confidence"].largest == pytest.approx(1e-6)
    assert parts["descriptor"].close
    assert not parts["descriptor"].exact
    assert parts["size"].exact
    parts = {part.column: part for part in compared("extractions", [row], [row | {"rank": 2}])}
    assert (parts["size"].rows, parts["size"].equal, parts["size"].largest) == (2, 0, None)
    other = {part.column: part for part in compared("extractions", [row], [row | {"members": [2, 3]}])}
    assert (other["members"].exact, other["members"].close) == (False, False)


def test_what_an_earlier_version_did_not_make_is_not_compared() -> None:
    match = {"reference_set": "a", "reference_id": "b", "rank": 1, "similarity": 0.5, "control_similarity": None}
    parts = {part.column: part for part in compared("matches", [match], [match | {"control_similarity": 0.4}])}
    assert "control_similarity" not in parts
    assert parts["similarity"].exact
    then = match | {"control_similarity": 0.4}
    [part] = [one for one in compared("matches", [then], [match]) if one.column == "control_similarity"]
    assert not part.close
    assert list(compared("control_generations", [], [{"index": 0, "w": 3.0}])) == []
    assert not all(part.close for part in compared("control_generations", [{"index": 0, "w": 3.0}], []))
