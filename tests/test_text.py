"""No text of strangers steers a terminal: every reading command shows escapes in place of ESC, OSC and overrides."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.cli import main
from audit.config import Settings, VerdictSettings
from audit.engine.state import RunState
from audit.report import collect
from audit.report.chance import Chance, Pairing
from audit.report.index import Answer, Together, write_index
from audit.report.page import render
from audit.report.verdict import Unanswered
from audit.states import Verdict
from audit.storable import storable
from audit.text import printable
from audit.workspace import Workspace
from tests.conftest import KOHYA

EVIL = "e\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\u202egnp.\u2066\u200f\u2028\rx"
SHOWN = "e\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\x7f\\u202egnp.\\u2066\\u200f\\u2028\\x0dx"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ID = "ab" * 16
NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def hostile(workspace: Workspace) -> Workspace:
    """A workspace in which every text that comes from outside is EVIL."""
    rows: dict[str, dict[str, Any]] = {
        "checkpoints": {
            "item_id": f"folder:{EVIL}", "source": EVIL, "state": "refused", "title": EVIL, "name": EVIL,
            "family": EVIL, "base_model": EVIL, "reason": EVIL, "checkpoint_sha256": "c" * 64, "format": EVIL,
            "tensors_sha256": "d" * 64, "bytes": 5, "claimed_metadata": json.dumps({EVIL: EVIL}), "seen_at": NOW,
            "identity": "1" * 64, "uploader": EVIL,
        },
        "captions": {"item_id": f"folder:{EVIL}", "caption": EVIL, "source": EVIL, "seen_at": NOW},
        "audits": {
            "audit_id": ID, "checkpoint_sha256": "c" * 64, "tensors_sha256": "d" * 64, "checkpoint_name": EVIL,
            "base_name": EVIL, "base_revision": EVIL, "settings": json.dumps(Settings().as_dict()),
            "training_images": 10, "training_images_source": EVIL, "images": 5, "evaluations": 5, "descriptor": "n@1",
            "weight_change": 0.1, "prediction_change": 0.2, "threshold": 0.7, "warnings": [EVIL], "device": EVIL,
            "seconds_sampling": 1.0, "seconds_total": 2.0, "versions": json.dumps({EVIL: EVIL}), "finished_at": NOW,
            "captions": [{"caption": EVIL, "source": EVIL, "truncated": True, "images": 5}],
        },
        "extractions": {"audit_id": ID, "rank": 1, "index": 0, "confidence": 0.8, "size": 2, "tightness": 0.9,
                        "members": [0], "descriptor": [1.0, 0.0]},
        "references": {"reference_set": EVIL, "reference_id": "f" * 64, "name": EVIL, "descriptor_name": EVIL,
                       "descriptor": [1.0, 0.0], "added_at": NOW},
        "matches": {"audit_id": ID, "rank": 1, "reference_set": EVIL, "reference_id": "f" * 64, "position": 1,
                    "similarity": 0.9, "is_match": True, "evidence": "both", "verdict": "match"},
        "failures": {"audit_id": "f1", "item_id": EVIL, "name": EVIL, "stage": "load", "kind": EVIL, "reason": EVIL,
                     "counted": True, "state": "failed", "run_id": EVIL, "failed_at": NOW},
    }  # fmt: skip
    for table, row in rows.items():
        workspace.write(table, "k", [row])
    return workspace


def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What a command of this program prints on both streams, whichever way it ends."""
    monkeypatch.setattr(sys, "argv", ["lora-audit", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    found = "".join(capfd.readouterr())
    assert stopped.value.code != 1 or arguments[0] == "verify", found
    return found


COMMANDS: dict[str, tuple[list[str], bool]] = {
    "catalog": (["catalog"], True),
    "catalog that fails": (["catalog", "--where", f"nope = '{EVIL}'"], True),
    "status": (["status"], True),
    "failures": (["failures"], True),
    "verify": (["verify"], False),
    "references": (["references", "list"], True),
    "query": (["query", 'SELECT * FROM checkpoints, captions, audits, matches, "references", failures'], True),
    "query with a hostile heading": (["query", f'SELECT title AS "{EVIL}" FROM checkpoints'], True),
    "query that fails": (["query", "SELECT error(title) FROM checkpoints"], True),
    "report": (["report", ID], False),
    "report that fails": (["report", EVIL], True),
    "match that fails": (["match", "--references", "none"], True),
    "estimate": (["estimate", "--family", "sd1"], False),
    "config": (["config", "show", "--set", f"references={EVIL}"], True),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_sends_strangers_text_raw(
    hostile: Workspace, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, shows = COMMANDS[name]
    words = words if words[0] == "config" else [*words, "--workspace", str(hostile.root)]
    for verbose in ((), ("--verbose",)):
        found = said(capfd, monkeypatch, *words, *verbose)
        assert not RAW.findall(found), ascii(found)
        assert ("\\x1b]0;owned" in found) or not shows, found


def test_file_names_of_strangers_are_shown_escaped(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, odd = tmp_path / "uploads", EVIL.replace("/", "")
    uploads.mkdir()
    checkpoint = uploads / f"{odd}.safetensors"
    shutil.copy(KOHYA, checkpoint)
    (uploads / f"{odd}.ckpt").write_bytes(b"x")
    (uploads / f"{odd}.png").write_bytes(b"no picture")
    at = ["--workspace", str(workspace.root)]
    shown = said(capfd, monkeypatch, "inspect", checkpoint)
    assert SHOWN in shown
    outputs = [
        shown,
        said(capfd, monkeypatch, "inspect", uploads / f"{odd}.ckpt"),
        said(capfd, monkeypatch, "crawl", "folder", uploads, "--settle", "0", *at),
        said(capfd, monkeypatch, "catalog", "add", checkpoint, *at),
        said(capfd, monkeypatch, "references", "add", "s", uploads, "--descriptor", "pdq", *at),
    ]
    assert not any(RAW.findall(one) for one in outputs), ascii(outputs)


def test_a_fault_of_the_program_is_shown_escaped(
    hostile: Workspace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(EVIL)

    monkeypatch.setattr("audit.report.collect", broken)
    monkeypatch.setattr(sys, "argv", ["lora-audit", "report", ID, "--workspace", str(hostile.root)])
    with pytest.raises(SystemExit) as stopped:
        main()
    found = "".join(capfd.readouterr())
    assert stopped.value.code == 1
    assert "Traceback" in found
    assert SHOWN in found
    assert not RAW.findall(found)


def test_csv_is_exact_in_a_pipe_and_escaped_at_a_terminal(
    hostile: Workspace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["query", "SELECT title FROM checkpoints", "--format", "csv", "--workspace", str(hostile.root)]
    monkeypatch.setattr(sys, "argv", ["lora-audit", *words])
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main()
    assert storable(EVIL) in capfd.readouterr().out  # as the table holds it
    seen = bytearray()

    def read(handle: int) -> bytes:
        piece = os.read(handle, 4096)
        seen.extend(piece)
        return piece

    pty.spawn([sys.executable, "-c", "from audit.cli import main; main()", *words], read, lambda handle: b"")
    assert printable(storable(EVIL)).encode() in seen
    assert b"\x1b" not in seen


def test_pages_isolate_and_escape_strangers_text(hostile: Workspace) -> None:
    facts = collect(hostile, ID)
    paired = Pairing(EVIL, EVIL, 9, 1, 1, 7, EVIL, [EVIL])
    chance = Chance(EVIL, "f" * 64, EVIL, 0.9, 1, None, 0, None, None, 0, None, EVIL, EVIL)
    verdict = replace(facts.verdict, warnings=[EVIL], unanswered=[Unanswered(EVIL, EVIL)])
    html = render(replace(facts, pairings=[paired], chances=[chance], verdict=verdict))
    assert not RAW.findall(html)
    assert html.count("<bdi>") == html.count("</bdi>") >= 12
    assert f"<h1><bdi>{printable(storable(EVIL))}</bdi></h1>" in html
    outside = re.sub(r"<bdi>.*?</bdi>|<title>.*?</title>|alt=\"[^\"]*\"", "", html, flags=re.DOTALL)
    assert "owned" not in outside
    answer = Answer(ID, EVIL, EVIL, Verdict.match, 1, 0, "reports/x.html", False)
    write_index(hostile, "r1", [EVIL], Together(VerdictSettings(), [answer]))
    index = (hostile.files.read("reports/runs/r1.html") or b"").decode()
    assert "owned" not in re.sub(r"<bdi>.*?</bdi>", "", index, flags=re.DOTALL)


def test_the_end_of_a_run_names_its_checkpoints_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    from audit.cli.logs import configure
    from audit.cli.run import show_state

    state = RunState("r", "1/1", "h", 1, 0.0, {})
    state.matched = [{"name": EVIL, "matches": 1, "matched_sets": 0, "page": EVIL}]
    state.skipped = {EVIL: 2}
    configure()
    show_state(state)
    found = "".join(capfd.readouterr())
    assert found.count("\\x1b]0;owned") >= 3
    assert not RAW.findall(found)


@given(st.text())
def test_what_is_printable_stays_and_nothing_else_is_left(text: str) -> None:
    shown = printable(text)
    assert not RAW.findall(shown)
    assert printable(shown) == shown
    shown.encode()  # also the names of files that are no UTF-8
    if text.isprintable():
        assert shown == text
    assert "\n" not in printable(text, lines=False)


def test_languages_and_emoji_are_shown_as_they_are() -> None:
    greetings = ("\u05e9\u05dc\u05d5\u05dd", "\u0633\u0644\u0627\u0645\u200c\u0647\u0627", "\u65e5\u672c", "na\xefve")
    for text in (*greetings, "\U0001f469\u200d\U0001f467"):
        assert printable(text) == text


def test_the_command_line_prints_by_one_way_alone() -> None:
    folder = Path(__file__).parents[1] / "audit" / "cli"
    allowed = {
        "text.py": {"typer.echo(printable(text, lines))"},
        "__init__.py": {'typer.echo(f"lora-audit {__version__}")'},
        "common.py": {"typer.echo(json.dumps("},
        "query.py": {"typer.echo(as_parquet(rows), nl=False)", "typer.echo(printable(line) if sys.stdout.isatty()"},
        "logs.py": {"print(json.dumps("},
    }
    for file in folder.glob("*.py"):
        for line in file.read_text().splitlines():
            if re.search(r"typer\.(secho|echo)\(|(?<![\w.])print\(|std(out|err)\.write\(|(?<!Safe)\bConsole\(", line):
                words = line.strip()
                assert words.startswith("class SafeConsole(") or any(
                    words.startswith(one) for one in allowed.get(file.name, ())
                ), f"{file.name}: {words}: print with say() or a console of audit.cli.common"
