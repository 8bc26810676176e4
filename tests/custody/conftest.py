"""A report page of a small audit made by hand, with its manifest, the original pictures, and keys."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.config import Settings
from audit.custody.check import verify_report
from audit.custody.findings import Finding, Verified
from audit.custody.keep import Custody
from audit.custody.statement import Command, documents_of
from audit.descriptors.base import to_png
from audit.report import collect, write_page
from audit.states import Agreement
from audit.workspace import Workspace

ID = "ab" * 16
OPERATOR = Custody("Desk 4", Command("scan", {"base": "sd15"}))


@dataclass(frozen=True)
class Report:
    """One page and what lies around it."""

    workspace: Workspace
    pictures: Path
    checkpoint: Path
    page: str

    def path(self, key: str) -> Path:
        return self.workspace.root / key

    @property
    def rows(self) -> Path:
        return self.path(documents_of(self.page)[0])

    @property
    def manifest(self) -> Path:
        return self.path(documents_of(self.page)[1])

    @property
    def envelope(self) -> Path:
        return self.path(documents_of(self.page)[2])

    def write(self, custody: Custody = OPERATOR) -> str:
        return write_page(collect(self.workspace, ID, ["mine"]), self.workspace, custody)

    def verify(self, **given: Any) -> Verified:
        return verify_report(Workspace(self.workspace.root, reading=True, create=False), ID[:6], **given)

    def differing(self, **given: Any) -> list[Finding]:
        return self.verify(**given).of(Agreement.differs)

    def rewrite(self, table: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Change rows of a table in its Parquet files, as somebody does who knows them."""
        changed = 0
        for path in (self.workspace.root / f"tables/{table}").rglob("*.parquet"):
            rows = pq.read_table(path)
            new = [change(dict(row)) for row in rows.to_pylist()]
            changed += new != rows.to_pylist()
            pq.write_table(type(rows).from_pylist(new, schema=rows.schema), path)
        assert changed


def rows_of(pictures: Path, now: datetime) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Rows of every table, by table and key."""
    made = []
    for kind, name in (("reference", "mine"), ("background", "decoys")):
        for file in sorted((pictures / name).iterdir()):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            made.append({"reference_set": name, "reference_id": digest, "name": file.name, "kind": kind,
                         "descriptor_name": "nano@1", "descriptor": [1.0, 0.0], "thumbnail": None,
                         "width": 32, "height": 32, "added_at": now})  # fmt: skip
    audit = {
        "audit_id": ID, "checkpoint_sha256": hashlib.sha256(b"checkpoint").hexdigest(), "tensors_sha256": "d" * 64,
        "checkpoint_name": "style.safetensors", "base_name": "base", "base_revision": "e" * 64,
        "settings": json.dumps(Settings().as_dict()), "training_images": 10, "training_images_source": "user",
        "images": 3, "evaluations": 90, "weight_change": 0.1, "prediction_change": 0.2, "descriptor": "nano@1",
        "threshold": 0.7, "descriptor_size": 64, "warnings": [], "seconds_sampling": 1.0, "seconds_total": 2.0,
        "device": "cpu", "versions": json.dumps({"torch": "2"}), "finished_at": now, "precision": "fp32",
        "captions": [{"caption": "a cat", "source": "user", "truncated": False, "images": 3}],
    }  # fmt: skip
    checkpoint = {"item_id": "file:1", "checkpoint_sha256": audit["checkpoint_sha256"], "tensors_sha256": "d" * 64,
                  "identity": "9" * 64, "name": "style.safetensors", "format": "lora-kohya", "bytes": 10,
                  "claimed_metadata": "{}", "seen_at": now, "state": "stored"}  # fmt: skip
    sampled = [{"audit_id": ID, "index": n, "seed": n, "caption": "a cat", "w": 5.0, "descriptor": [0.1 * n, 0.3]}
               for n in range(3)]  # fmt: skip
    found = [{"audit_id": ID, "rank": 1, "index": 0, "confidence": 0.8, "size": 3, "tightness": 0.9,
              "members": [0, 1, 2], "descriptor": [1.0, 0.0],
              "image": to_png(Image.new("RGB", (8, 8), "red"))}]  # fmt: skip
    of = {"audit_id": ID, "reference_set": "mine", "reference_id": made[0]["reference_id"]}
    match = {**of, "rank": 1, "position": 1, "similarity": 0.91, "is_match": True, "evidence": "both",
             "verdict": "match"}  # fmt: skip
    member = {**of, "score": 0.25, "view": "whole", "base_loss": 1.0, "tuned_loss": 0.75, "timesteps": [100, 500],
              "by_timestep": [0.2, 0.3], "evaluations": 8, "question": "q"}  # fmt: skip
    decoy = {**member, "reference_set": "decoys", "reference_id": made[-1]["reference_id"], "score": 0.01}
    whole = {"audit_id": ID, "reference_set": "mine", "pictures": 2, "decoys": 2, "uncalibrated": "2 are too few",
             "backgrounds": [{"background": "decoys", "pictures": 2, "suspects": []}]}  # fmt: skip
    denoised = {**of, "view": "whole", "timestep": 500, "steps": 8, "w": 2.0, "noised": b"n", "tuned_estimate": b"t"}
    return [
        ("checkpoints", "k", [checkpoint]), ("audits", ID, [audit]), ("generations", ID, sampled),
        ("control_generations", ID, [{**sampled[0], "w": 3.0, "image": b"w"}]),
        ("extractions", ID, found), ("matches", f"{ID}.mine", [match]), ("memberships", f"{ID}.mine", [member]),
        ("memberships", f"{ID}.decoys", [decoy]), ("chances", f"{ID}.mine", [{**of, "similarity": 0.91, "rank": 1}]),
        ("set_chances", f"{ID}.mine", [whole]), ("denoised", f"{ID}.mine", [denoised]),
        ("references", "mine.1", [one for one in made if one["reference_set"] == "mine"]),
        ("references", "decoys.1", [one for one in made if one["reference_set"] == "decoys"]),
        ("passed_over", "mine.1", [{"reference_set": "mine", "descriptor_name": "nano@1", "name": "notes.txt",
                                    "reason": "the ending .txt is no picture's", "added_at": now}]),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def _made_once(tmp_path_factory: pytest.TempPathFactory) -> Report:
    tmp_path = tmp_path_factory.mktemp("custody")
    for name, colours in (("mine", ("red", "green")), ("decoys", ("blue", "black"))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (32, 32), colour).save(tmp_path / "pictures" / name / f"{colour}.png")
    (tmp_path / "style.safetensors").write_bytes(b"checkpoint")
    workspace = Workspace(tmp_path / "w")
    for table, key, rows in rows_of(tmp_path / "pictures", datetime.now(UTC)):
        workspace.write(table, key, rows)
    report = Report(workspace, tmp_path / "pictures", tmp_path / "style.safetensors", "")
    return Report(workspace, report.pictures, report.checkpoint, f"reports/{Path(report.write()).name}")


@pytest.fixture
def made(_made_once: Report, tmp_path: Path) -> Report:
    """A workspace with an audit, its page about the set "mine", and its manifest."""
    shutil.copytree(_made_once.checkpoint.parent, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / _made_once.checkpoint.name
    return Report(Workspace(tmp_path / "w"), tmp_path / "pictures", checkpoint, _made_once.page)


@dataclass(frozen=True)
class Keys:
    """PEM files made by openssl, as people make them."""

    private: Path
    public: Path


def keys_made(folder: Path, name: str, *options: str) -> Keys:
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub")
    subprocess.run(["openssl", "genpkey", *options, "-out", keys.private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", keys.private, "-pubout", "-out", keys.public,
                    *(["-passin", "pass:secret"] if "-pass" in options else [])], check=True)  # fmt: skip
    keys.private.chmod(0o600)
    return keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return keys_made(tmp_path, "ed", "-algorithm", "ed25519")
