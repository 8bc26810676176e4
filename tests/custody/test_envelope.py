"""An envelope kept elsewhere: it finds what somebody has changed who can write everything in the workspace."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from audit.cli import app
from audit.custody.keep import sign_report
from audit.custody.signing import MOST_ENVELOPE_BYTES, load_key
from audit.custody.statement import documents_of
from audit.errors import CustodyError
from audit.states import Agreement
from tests.custody.conftest import ID, Keys, Report, keys_made


@pytest.fixture
def kept(made: Report, keys: Keys, tmp_path: Path) -> Path:
    """The envelope of the page, as it was signed, outside the workspace."""
    sign_report(made.workspace, ID, load_key(keys.private))
    return shutil.copy(made.path(documents_of(made.page)[2]), tmp_path / "kept.dsse.json")


def differing(report: Report, **given: Any) -> dict[str, str]:
    return {one.part: one.said for one in report.differing(**given)}


def test_what_was_signed_agrees_with_its_copy(made: Report, keys: Keys, kept: Path) -> None:
    found = made.verify(envelope=kept, public_key=keys.public)
    assert found.agrees
    agreeing = {one.part for one in found.of(Agreement.agrees)}
    assert agreeing >= {made.page, documents_of(made.page)[2], "inputs", "tables", "signature"}


def test_who_changes_everything_in_the_workspace_is_found_by_the_copy(made: Report, keys: Keys, kept: Path) -> None:
    made.rewrite("extractions", lambda row: row | {"confidence": 0.1})
    for document in (made.page, *documents_of(made.page)):
        made.path(document).unlink()
    assert Path(made.write()).name == Path(made.page).name
    assert made.verify().agrees
    found = differing(made, envelope=kept)
    rows, manifest, envelope = documents_of(made.page)
    assert set(found) >= {made.page, rows, manifest, envelope, "extractions"}
    assert found[envelope] == "there is none any more, and one was given"
    assert "it is not the one in the envelope" in found[manifest]
    assert any("the envelope says" in said and part.startswith("manifest.") for part, said in found.items())
    other = keys_made(kept.parent, "other", "-algorithm", "ed25519")
    sign_report(made.workspace, ID, load_key(other.private))
    assert made.verify(public_key=other.public).agrees
    assert "another statement" in differing(made, envelope=kept)[envelope]
    assert "is not of this content" not in str(differing(made, envelope=kept, public_key=keys.public))
    assert "the envelope that was given" in differing(made, envelope=kept, public_key=other.public)


def test_a_page_that_is_gone_is_missed(made: Report, kept: Path) -> None:
    rows = made.path(documents_of(made.page)[0])
    for document in (made.page, *documents_of(made.page)[1:]):
        made.path(document).unlink()
    with pytest.raises(CustodyError, match="no report page"):
        made.verify()
    assert set(differing(made, envelope=kept)) == {made.page, *documents_of(made.page)[1:]}
    made.rewrite("extractions", lambda row: row | {"confidence": 0.1})
    assert "extractions 1" in differing(made, envelope=kept)
    rows.unlink()
    assert "extractions" in differing(made, envelope=kept)


def forged(kept: Path, **changes: Any) -> Path:
    """The envelope with another statement in it."""
    document = json.loads(kept.read_bytes())
    statement = json.loads(base64.b64decode(document["payload"]))
    statement["subject"][0]["name"] = changes.get("page", statement["subject"][0]["name"])
    statement["predicate"]["audit_id"] = changes.get("audit_id", ID)
    document["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    file = kept.with_name(f"forged-{len(list(kept.parent.iterdir()))}.json")
    file.write_text(json.dumps(document))
    return file


def test_an_envelope_of_something_else_is_refused(made: Report, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"{" * 1000)
    with (tmp_path / "large").open("wb") as large:
        large.truncate(MOST_ENVELOPE_BYTES + 1)
    for file, said in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "garbage", "none of a report"),
        (tmp_path / "large", "more than any envelope"),
        (forged(kept, page="../../other.html"), "no page of that audit"),
        (forged(kept, page=f"{ID}.x/../../y.html"), "no page of that audit"),
        (forged(kept, page="c" * 32 + ".html"), "no page of that audit"),
        (forged(kept, audit_id="c" * 32), "is of the audit c"),
    ):
        with pytest.raises(CustodyError, match=said):
            made.verify(envelope=file)


def test_the_command_ends_as_verify_does(made: Report, kept: Path) -> None:
    def verified(*words: object) -> int:
        place = ("--workspace", str(made.workspace.root))
        return CliRunner().invoke(app, ["verify", *map(str, words), *place]).exit_code

    assert verified(ID[:6], "--envelope", kept) == 0
    assert verified("--envelope", kept) == 2
    made.path(made.page).write_bytes(b"another page")
    assert verified(ID[:6], "--envelope", kept) == 1
