"""Damaged workspaces: what a disk, a half-written copy or another program makes of the files, under every command."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from audit.cli import app
from audit.config import Config, Settings
from audit.engine.run import _plain
from audit.engine.state import RunState
from audit.errors import AuditError, WorkspaceError
from audit.report.pages import PageFacts, write_page_with
from audit.schemas import KEY_COLUMNS, TABLES
from audit.workspace import Workspace
from audit.workspace.leases import Holder, Leases, alive_runs
from tests.fuzz.kind import FindingError, Kind
from tests.fuzz.mutate import as_bytes, changed_bytes, changed_json

AUDIT = "0123456789abcdef0123456789abcdef"
COMMANDS = (
    ("catalog", "--json"), ("status", "--json"), ("verify", "--json"), ("failures", "--json"),
    ("query", 'SELECT count(*) FROM checkpoints, "references", audits, matches', "--json"), ("report", AUDIT, "--json"),
)  # fmt: skip
DOCUMENTS = {
    "reference_set": "set", "settings": json.dumps(_plain(asdict(Settings()))), "versions": "{}", "claims": "{}",
    "claimed_metadata": "{}", "verdict": "none", "evidence": "none", "tells_nothing": None, "image": None,
    "thumbnail": None, "captions": [{"caption": "a", "source": "user", "truncated": False, "images": 1}],
    "descriptor_name": "pdq", "name": "a.safetensors", "checkpoint_name": "a.safetensors", "url": "",
}  # fmt: skip
DAMAGES = ("emptied", "cut", "overwritten", "bits", "bits", "document", "document", "foreign", "removed")
UNMISTAKABLE = ("emptied", "cut", "overwritten")  # damage that no file of any kind survives unseen
CODES = (0, 1, 2, 10, 11, 12, 13)  # report ends with that of its verdict


def plain_value(kind: pa.DataType, name: str) -> Any:
    """A value that fits a column."""
    if name == "audit_id":
        return AUDIT
    if name in DOCUMENTS and (name != "captions" or "struct" in str(kind)):
        return DOCUMENTS[name]
    if pa.types.is_string(kind):
        return "a" * 64 if name.endswith(("sha256", "_id", "identity")) else "text"
    if pa.types.is_boolean(kind):
        return True
    if pa.types.is_integer(kind):
        return 1
    if pa.types.is_floating(kind):
        return 0.5
    if pa.types.is_timestamp(kind):
        return datetime(2026, 5, 1, tzinfo=UTC)
    if pa.types.is_fixed_size_binary(kind):
        return b"\1" * kind.byte_width
    if pa.types.is_list(kind):
        return (
            [0.5] * 8 if pa.types.is_floating(kind.value_type) else [1] if pa.types.is_integer(kind.value_type) else []
        )
    return None


def build(folder: Path) -> None:
    """A workspace with rows in every table, merged and loose, two runs, a lease, a spool, a page and a training set."""
    workspace = Workspace(folder)
    for name, schema in TABLES.items():
        row = {field.name: plain_value(field.type, field.name) for field in schema}
        for number in range(2):
            if name in KEY_COLUMNS:
                workspace.write(name, ".".join(str(row[one]) for one in KEY_COLUMNS[name]), [row])
            else:
                workspace.append(name, [row | ({"item_id": f"file:{number}"} if "item_id" in row else {})])
        workspace.compact(name)
        if name not in KEY_COLUMNS:
            workspace.append(name, [row])
        workspace.remove_where(name, schema.names[0], "nobody")
        workspace.vacuum(name, 0.0)  # what a merge has replaced is read no more, and its damage told by nobody
    now = time.time()
    for number in range(2):
        state = RunState(f"1-{number}", "0/1", "host", 1, now, _plain(asdict(Config())), "done", now)
        workspace.files.write(f"runs/1-{number}.json", json.dumps(asdict(state)).encode())
    Leases(workspace.files).take(Holder("1-0", "0/1", "host", 1))
    spool = workspace.spool(AUDIT)
    spool.add(0, pa.table({"index": [0, 1], "image": [b"a", b"b"]}))
    spool.keep_precision("fp32")
    spool.finish({"seconds": 1.0})
    facts = PageFacts(AUDIT, "a", ["set"], 1, 1, 0, None, "2026-05-01")
    write_page_with(workspace, f"reports/{AUDIT}.html", "<html></html>", facts)
    said = {"item_id": "civitai:1:2:3", "license": "", "pictures": [{"file": "0001.png", "caption": "a"}]}
    workspace.files.write("ground-truth/x/source.json", json.dumps(said).encode())
    workspace.files.write("ground-truth/x/0001.png", b"png")
    workspace.files.write("checkpoints/quarantined/x.bin", b"1")
    workspace.files.write("checkpoints/quarantined/x.json", b"{}")
    workspace.files.write("opt-out.txt", b"civitai:user:jane\n")


def foreign_parquet(choose: Random) -> bytes:
    """A sound Parquet file of other columns, or of ours with other types."""
    columns = choose.choice(
        (["x"], ["audit_id"], ["audit_id", "failed_at"], ["item_id", "seen_at"], ["index", "image"])
    )
    values = choose.choice(([1, 2], ["a", "b"], [None, None], [b"\xff", b""], [[1], []], [{"a": 1}, {"a": 2}]))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict.fromkeys(columns, values)), sink)
    return bytes(sink.getvalue())


class Workspaces(Kind):
    """One or two files of a workspace are damaged; what reads it must go on, or refuse in words, and name the file."""

    name, share, memory, patience = "workspaces", 120, 768, 60.0  # for six commands

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.seed, self.copy = place / "seed", place / "copy"
        build(self.seed)
        self.keys = sorted(str(path.relative_to(self.seed)) for path in self.seed.rglob("*") if path.is_file())

    def make(self, choose: Random) -> bytes:
        number = choose.choice((1, 1, 1, 2))
        return json.dumps([self._damage(choose.randrange(10**6), choose) for _ in range(number)]).encode()

    @staticmethod
    def _damage(file: int, choose: Random) -> dict[str, Any]:
        how = choose.choice(
            ("emptied", "cut", "overwritten", "bits", "bits", "document", "document", "foreign", "removed")
        )
        return {"file": file, "how": how, "seed": choose.randrange(2**32)}

    def check(self, data: bytes) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.seed, self.copy)
        damaged = [self._apply(one) for one in json.loads(data)]
        said, refused = self._commands()
        self._leases()
        for key, how in damaged:
            if how in UNMISTAKABLE and self._is_told(key) and Path(key).name not in said:
                raise FindingError(f"no command names the damaged {key} ({how})")
        if refused:
            raise WorkspaceError(refused)

    def _apply(self, one: dict[str, Any]) -> tuple[str, str]:
        key, how, choose = self.keys[one["file"] % len(self.keys)], one["how"], Random(one["seed"])
        path = self.copy / key
        content = path.read_bytes() if path.is_file() else b""
        if how == "removed":
            path.unlink(missing_ok=True)
            return key, how
        if how == "document" and key.endswith(".json") and content:
            try:
                path.write_bytes(as_bytes(changed_json(json.loads(content), choose), choose))
                return key, how
            except ValueError:
                how = "bits"
        made = {
            "emptied": b"", "cut": content[: len(content) // 2], "overwritten": b"<html>" * 50,
            "foreign": foreign_parquet(choose), "bits": changed_bytes(content, choose, 2),
            "document": changed_bytes(content, choose, 2),
        }[how]  # fmt: skip
        path.write_bytes(made)
        return key, how if made != content else "nothing"

    def _is_told(self, key: str) -> bool:
        """Whether damage of the file has to be told: not of what is not read, or is made again without a word."""
        if key.endswith((".gone", ".png", ".bin", ".txt")) or "/clock/" in key or key.startswith("spool/"):
            return False
        return not key.startswith(("runs/leases/", "reports/runs", "checkpoints/quarantined/"))

    def _commands(self) -> tuple[str, str]:
        """Everything that the commands say, and what one of them was refused with."""
        said, refused = "", ""
        for command in COMMANDS:
            done = CliRunner().invoke(app, [*command, "--workspace", str(self.copy)])
            said += done.output + (str(done.exception) if done.exception else "")
            error = done.exception
            if isinstance(error, AuditError):
                refused = refused or str(error)
            elif error is not None and not isinstance(error, SystemExit):
                raise error
            elif done.exit_code not in CODES:
                raise FindingError(f"{command[0]} ends with {done.exit_code}: {done.output[-300:]}")
        return said, refused

    def _leases(self) -> None:
        """A damaged lease or state of a run keeps no run away, and says nothing that crashes one."""
        workspace = Workspace(self.copy)
        alive_runs(workspace.files)
        mine = Holder("2-0", "0/1", "host", 2)
        workspace.files.write("runs/2-0.json", json.dumps({"state": "running", "heartbeat_at": time.time()}).encode())
        Leases(workspace.files).take(mine)
        if not Leases(workspace.files).held("2-0"):
            raise FindingError("a lease that was taken is not held")
        spool = workspace.spool(AUDIT)
        spool.precision(), spool.finished(), spool.take_begun()
        for _ in spool.read(["index"]):
            pass
