"""The manifest of a report page: an in-toto Statement about the page and its rows, with all that they rest on.

Beside ``reports/PAGE.html`` are ``PAGE.rows.jsonl`` (a line a row, audit/custody/record.py), ``PAGE.manifest.json``
(the statement) and, once it is signed, ``PAGE.dsse.json``. ``reports/pictures/SET.SHA256.jsonl`` has the lines of one
state of a reference set, which the manifests of many pages name by its hash. Removing a set removes them with its
pages; of decoys, which no page shows, the statement itself has no more than a name, a number and hashes.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

from audit.custody.record import Record, SetRecord, canonical_json
from audit.errors import CustodyError
from audit.workspace import Workspace
from audit.workspace.names import REPORTS

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:lora-audit:report:v1"
PICTURES = f"{REPORTS}/pictures"
MOST_BYTES = 8 << 20  # of a manifest or an envelope
MOST_ROWS_BYTES = 1 << 30  # of a document of rows
PACKAGES = ("duckdb", "jinja2", "lora-audit", "numpy", "pyarrow")
_STRICT = {"extra": "forbid", "strict": True}
_HEX = re.compile(r"[0-9a-f]{64}")
_SET_FILE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\.[0-9a-f]{64}\.jsonl")


@dataclass(frozen=True)
class Command:
    """What was asked for: a subcommand of lora-audit and the options that were given, paths as names alone."""

    __pydantic_config__ = _STRICT

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """Who made the report, by which command, when (ISO 8601, UTC), and with which versions."""

    __pydantic_config__ = _STRICT

    at: str
    operator: str | None
    command: Command | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Counted:
    """How many rows, and the hash of their lines."""

    __pydantic_config__ = _STRICT

    rows: int
    sha256: str


def list_key(name: str, sha256: str) -> str:
    """Where the lines of the set ``name`` are, by their hash."""
    return f"{PICTURES}/{name}.{sha256}.jsonl"


@dataclass(frozen=True)
class SetEntry:
    """A reference set: its kind, how many pictures, the hash of its lines; of decoys also their membership scores, and
    the question that these were measured for.
    """

    __pydantic_config__ = _STRICT

    name: str
    kind: str
    pictures: int
    sha256: str
    scores: Counted | None = None
    question: str | None = None

    @property
    def key(self) -> str:
        """Where its lines are."""
        return list_key(self.name, self.sha256)


@dataclass(frozen=True)
class Predicate:
    """What the statement says of its subjects. ``inputs`` are those of ``Record``."""

    __pydantic_config__ = _STRICT

    audit_id: str
    made: Made
    inputs: dict[str, Any]
    reference_sets: list[str]
    sets: list[SetEntry]
    tables: dict[str, Counted]


@dataclass(frozen=True)
class Statement:
    """Names and SHA256 of the page and of its rows, and the predicate."""

    page: tuple[str, str]
    rows: tuple[str, str]
    predicate: Predicate

    def to_bytes(self) -> bytes:
        """The in-toto Statement, as JSON."""
        subject = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in (self.page, self.rows)]
        return json.dumps(
            {"_type": STATEMENT, "subject": subject, "predicateType": PREDICATE, "predicate": asdict(self.predicate)},
            indent=1,
        ).encode()

    def says_as(self, other: Statement) -> bool:
        """Whether both say the same, whoever made them when."""
        return _unmade(self) == _unmade(other)


def _unmade(statement: Statement) -> str:
    said = asdict(statement)
    said["predicate"].pop("made")
    return canonical_json(said)


@cache
def versions() -> dict[str, str]:
    """The versions of what makes a report."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def entry_of(one: SetRecord, asked_about: bool) -> SetEntry:
    """What a statement says of a set."""
    scores = None if asked_about else Counted(len(one.scores.lines), one.scores.sha256)
    return SetEntry(one.name, one.kind, one.pictures, one.sha256, scores, one.question)


def statement_of(
    audit_id: str, sets: list[str], record: Record, page: tuple[str, str], rows: tuple[str, str],
    operator: str | None, command: Command | None,
) -> Statement:  # fmt: skip
    """The statement about a page and its rows, as made now."""
    made = Made(datetime.now(UTC).isoformat(timespec="seconds"), operator, command, versions())
    tables = {name: Counted(len(of.lines), of.sha256) for name, of in sorted(record.tables.items())}
    entries = [entry_of(one, one.name in sets) for one in record.sets]
    inputs = json.loads(canonical_json(record.inputs))
    return Statement(page, rows, Predicate(audit_id, made, inputs, sorted(sets), entries, tables))


def read_statement(content: bytes) -> Statement:
    """The statement in ``content``, a stranger's. Raises CustodyError for what is none, or of another kind."""
    from pydantic import TypeAdapter, ValidationError

    from audit.untrusted.documents import parse_json

    if len(content) > MOST_BYTES:
        raise CustodyError(f"it has {len(content)} bytes, more than any manifest of ours: it is none")
    try:
        document = parse_json(content)
    except ValueError as error:
        raise CustodyError(f"it is no JSON document that can be read: {str(error)[:200]}") from error
    if not isinstance(document, dict) or document.get("_type") != STATEMENT:
        raise CustodyError("it is no in-toto statement of version 1")
    if document.get("predicateType") != PREDICATE:
        raise CustodyError(f"its predicate is not of the type {PREDICATE}: it says nothing of a report of ours")
    try:
        page, rows = (_subject(one) for one in document["subject"])
        predicate = TypeAdapter(Predicate).validate_json(json.dumps(document["predicate"]))
        found = Statement(page, rows, predicate)
        _check(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CustodyError(f"its predicate is none of ours: {where[:200]}: {first['msg'][:200]}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CustodyError(f"it is no manifest of ours: {str(error)[:200]}") from error
    return found


def _subject(one: Any) -> tuple[str, str]:
    name, digest = one["name"], one["digest"]["sha256"]
    if not isinstance(name, str) or not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise ValueError("a subject without a name or a SHA256")
    return name, digest


def _check(statement: Statement) -> None:
    """Refuse what would lead to files of another name than ours."""
    for one in statement.predicate.sets:
        if not _SET_FILE.fullmatch(one.key.removeprefix(f"{PICTURES}/")):
            raise ValueError(f"{one.name!r:.80} is no name of a set with a SHA256")
    if not re.fullmatch(r"[0-9a-f]{32}", statement.predicate.audit_id):
        raise ValueError("it names no audit")


def documents_of(page: str) -> tuple[str, str, str]:
    """The keys of the rows, the manifest and the envelope of the page ``page``."""
    stem = page.removesuffix(".html")
    return f"{stem}.rows.jsonl", f"{stem}.manifest.json", f"{stem}.dsse.json"


def remove_pictures(workspace: Workspace, name: str) -> None:
    """Remove what is kept of the pictures of the set ``name``."""
    for entry in workspace.files.list(PICTURES):
        match = _SET_FILE.fullmatch(entry.key.removeprefix(f"{PICTURES}/"))
        if match and match["name"] == name:
            workspace.files.remove(entry.key)
