"""What an operator asks of a workspace: reasons of failures."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from audit.cli import app
from audit.schemas import AUDITS
from audit.workspace import Workspace

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def fail(workspace: Workspace, audit: str, reason: str, hours: float, item: str = "folder:a:x", **others: Any) -> None:
    workspace.append(
        "failures",
        [{"audit_id": audit, "item_id": item, "name": "x", "stage": "load", "kind": "input", "reason": reason,
          "counted": True, "state": "failed", "run_id": "r", "failed_at": NOON + timedelta(hours=hours)} | others],
    )  # fmt: skip


def failures(workspace: Workspace, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    app(["failures", "--json", "--workspace", str(workspace.root), *arguments], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def test_the_newest_reason_of_a_file_is_shown_and_no_older_one(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(workspace, "a1", "x.safetensors does not fit the base /models/old", 1)
    fail(workspace, "a1", "the tensors of '/srv/x.safetensors' are 3 too few", 2)
    fail(workspace, "a2", "out of memory at 40 GiB", 3, kind="out-of-memory")  # another configuration
    fail(workspace, "b1", "out of memory at 60 GiB", 4, "folder:a:y", kind="out-of-memory")
    [group] = failures(workspace, capsys)["groups"]
    assert (group["audits"], group["items"]) == (2, ["folder:a:y", "folder:a:x"])
    assert group["newest_reason"] == "out of memory at 60 GiB"
    assert failures(workspace, capsys, "--retry")["forgiven"] == 3  # under both configurations
    assert failures(workspace, capsys)["groups"] == []
    fail(workspace, "a2", "no such base", 20 * 365 * 24, kind="error")
    [group] = failures(workspace, capsys)["groups"]
    assert group["newest_reason"] == "no such base"


def test_reasons_are_shown_in_full_when_piped(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    reason = f"tensor {'blocks.0.' * 20}weight of /srv/uploads/x.safetensors has no place"
    fail(workspace, "a1", reason, 1)
    app(["failures", "--workspace", str(workspace.root)], standalone_mode=False)
    assert reason in capsys.readouterr().out


def test_a_failure_after_the_result_is_not_hidden_by_it(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for audit in ("a1", "a2"):
        row = dict.fromkeys(AUDITS.names) | {"audit_id": audit, "finished_at": NOON}
        workspace.write("audits", audit, [row])
    fail(workspace, "a1", "sampling ran out of memory", -1)
    fail(workspace, "a2", "no reference set 'mine'", 1, "folder:a:y", stage="match", state="quarantined")
    assert [group["items"] for group in failures(workspace, capsys)["groups"]] == [["folder:a:y"]]


def test_trace_ids_do_not_split_what_failed_for_one_reason() -> None:
    from audit.upkeep.failing import _general

    first, second = (f"KeyError: 'a' (trace {trace})" for trace in ("0a1b2c3d", "deadbeef"))
    assert _general(first) == _general(second) == "KeyError: *"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pictures": [1]}', b'{"pictures": [{"name": "x"}]}'])
def test_verify_names_a_damaged_list_of_known_pictures(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    workspace.files.write("ground-truth/x/source.json", content)
    app(["verify", "--json", "--workspace", str(workspace.root)], standalone_mode=False)
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert problem == {"where": "ground-truth/x/source.json", "problem": "the list of its pictures is damaged"}
