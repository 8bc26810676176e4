"""Who opts out, and what is removed with a set: nothing of it is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from audit.errors import CustodyError, WorkspaceError
from audit.models.sketches.sketch import Sketch, sketch_of
from audit.references import ReferenceSets
from audit.references.losses import SPOOLED
from audit.report.again import match_again
from audit.schemas import KEY_COLUMNS, TABLES
from audit.similar import row_of
from audit.stages.membership import Membership
from audit.workspace import Workspace
from crawlers.catalog import Catalog, OptOuts
from crawlers.crawl import Crawl
from crawlers.sources.folder import Folder
from tests.conftest import KOHYA, PEFT
from tests.custody.conftest import ID, Report

JANE = OptOuts("folder:user:jane")
ITEM = "folder:x:style.safetensors"


def uploaded(workspace: Workspace) -> None:
    """Let the audited file be one that Jane uploaded, with a training set, in an index page and with a failure."""
    [row] = workspace.rows("SELECT * FROM checkpoints")
    item = {"item_id": ITEM, "source": "folder", "model_id": "style", "uploader": "Jane", "ground_truth": "t" * 32}
    workspace.append("checkpoints", [row | item])
    assert row["identity"]
    recovered = {"recovery_id": "r" * 32, "identity": row["identity"], "base_revision": "b", "kind": "keyword"}
    workspace.append("recoveries", [recovered, recovered | {"identity": "another"}])
    far = {"identity": row["identity"], "base_revision": "b", "distance": 0.1}
    workspace.append("base_distances", [far, far | {"identity": "another"}])
    workspace.append("failures", [{"audit_id": ID, "item_id": ITEM, "name": "style.safetensors", "state": "retry"}])
    workspace.files.write(f"ground-truth/{'t' * 32}/0000.png", b"a picture")
    workspace.files.write("reports/runs/r1.html", f'<a href="../{ID}.html">'.encode())
    workspace.files.write("reports/runs/r1.json", json.dumps({"reference_sets": ["mine"]}).encode())
    workspace.files.write("reports/runs/r2.html", b"another run")
    workspace.spool(ID).begin()


def left(workspace: Workspace) -> dict[str, int]:
    """Rows of the audit by table."""
    tables = [name for name, schema in TABLES.items() if "audit_id" in schema.names]
    counts = {name: len(workspace.rows(f"SELECT 1 FROM {name} WHERE audit_id = ?", [ID])) for name in tables}
    return {name: count for name, count in counts.items() if count}


def test_nothing_is_left_of_the_audits_of_a_checkpoint_that_was_opted_out(made: Report) -> None:
    workspace = made.workspace
    uploaded(workspace)
    assert set(left(workspace)) == {*KEY_COLUMNS, "failures"} - {"evaluations"}
    workspace.erase("item_id", "file:1", "checkpoints")
    assert Catalog(workspace, JANE).forget_opted_out() == 1
    assert left(workspace) == {}
    assert workspace.rows("SELECT identity FROM recoveries") == [{"identity": "another"}]
    assert workspace.rows("SELECT identity FROM base_distances") == [{"identity": "another"}]
    files = {entry.key for folder in ("reports", "ground-truth", "spool")
             for entry in workspace.files.list(folder, recursive=True)}  # fmt: skip
    assert [key for key in files if "/pictures/" not in key] == ["reports/runs/r2.html"]
    assert workspace.rows("SELECT state, uploader FROM checkpoints") == [{"state": "opted-out", "uploader": None}]
    tables = b"".join(path.read_bytes() for path in (workspace.root / "tables").rglob("*.parquet"))
    assert ID.encode() not in tables
    with pytest.raises((CustodyError, WorkspaceError), match=r"no finished audit|no report page"):
        made.verify()
    found, _ = match_again(workspace, ["mine"])
    assert found.answers == []
    assert Catalog(workspace, JANE).forget_opted_out() == 0


def test_who_opts_out_while_a_crawl_sketches_leaves_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = tmp_path / "uploads"
    for name in ("a", "b"):
        path = uploads / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((KOHYA if name == "a" else PEFT).read_bytes())
        Path(f"{path}.json").write_text(f'{{"uploader": "{"jane" if name == "a" else "ann"}"}}')

    def look() -> dict[str, int]:
        catalog = Catalog(workspace, OptOuts.read(workspace, None))
        return Crawl(Folder(catalog, str(uploads), settle=0), catalog, downloads=1).run().states

    def opted_out_meanwhile(files: Any) -> Sketch | None:
        workspace.files.write("opt-out.txt", b"folder:user:jane\n")
        assert Catalog(workspace, OptOuts.read(workspace, None)).forget_opted_out() == 0  # nothing is recorded yet
        return sketch_of(files)

    monkeypatch.setattr("audit.similar.sketch_of", opted_out_meanwhile)
    assert look() == {"opted-out": 1, "stored": 1}
    [row] = workspace.rows("SELECT identity, uploader FROM checkpoints WHERE state = 'stored'")
    assert row["uploader"] == "ann"
    assert workspace.rows("SELECT identity FROM sketches") == [{"identity": row["identity"]}]
    stored = [entry.key for entry in workspace.files.list("checkpoints") if entry.key.endswith(".safetensors")]
    assert stored == [f"checkpoints/{row['identity']}.safetensors"]
    # of what two crawls recorded at once nothing is left behind the next look
    workspace.append("sketches", [row_of("1" * 64, None)])
    assert look() == {}
    assert len(workspace.rows("SELECT identity FROM sketches")) == 1


def test_what_another_item_has_stays(made: Report) -> None:
    uploaded(made.workspace)
    assert Catalog(made.workspace, JANE).forget_opted_out() == 1
    assert set(left(made.workspace)) == {*KEY_COLUMNS, "failures"} - {"evaluations"}
    assert made.workspace.files.exists(made.page)
    assert len(made.workspace.rows("SELECT identity FROM recoveries")) == 2
    assert not made.workspace.files.exists(f"ground-truth/{'t' * 32}/0000.png")  # that was Jane's alone


def test_a_removed_set_leaves_no_score_of_its_pictures_not_even_of_an_unfinished_audit(made: Report) -> None:
    workspace = made.workspace
    pictures = workspace.rows('SELECT reference_set, reference_id FROM "references" ORDER BY reference_set DESC')
    spool = workspace.spool("0" * 32, Membership.batch)
    for number, row in enumerate(pictures):
        loss = {"reference_id": row["reference_id"], "model": "m", "view": "whole", "timestep": 100, "noise": 0}
        spool.add(number, pa.Table.from_pylist([{**loss, "loss": float(np.pi)}], schema=SPOOLED))
    ReferenceSets(workspace).remove("mine")
    kept = {
        one for rows in workspace.spool("0" * 32, Membership.batch).read() for one in rows["reference_id"].to_pylist()
    }
    assert kept == {row["reference_id"] for row in pictures if row["reference_set"] == "decoys"}
    by_set = [name for name, schema in TABLES.items() if "reference_set" in schema.names]
    for table in by_set:
        assert workspace.rows(f"SELECT 1 FROM \"{table}\" WHERE reference_set = 'mine'") == [], table
    ReferenceSets(workspace).remove("decoys")
    for table in by_set:
        assert workspace.rows(f'SELECT 1 FROM "{table}"') == [], table
