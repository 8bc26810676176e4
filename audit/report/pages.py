"""Where report pages are, and what each speaks of.

A page answers a question: one audit, and the reference sets of one command. Its name tells both, so that no other
question overwrites it, and beside it a small document says which sets it shows: removing a set removes its pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb

from audit.config import Rule, VerdictSettings
from audit.errors import WorkspaceError
from audit.references.decoys import Questions, questions_of
from audit.references.index import store
from audit.references.index.known import Known
from audit.workspace import Workspace
from audit.workspace.names import KEY, REPORTS

FOLDER = REPORTS
MOST_NAME = 40  # letters of a set's name in a page's


@dataclass(frozen=True)
class PageFacts:
    """What a page says, for lists of pages and for removing them."""

    audit_id: str
    checkpoint_name: str
    reference_sets: list[str]
    references: int
    matched: int
    possible: int
    tells_nothing: str | None
    finished_at: str
    verdict: str | None = None
    rule: str = Rule.fixed
    rate: float | None = None
    backgrounds: list[str] = field(default_factory=list)


def page_key(
    audit_id: str, sets: Sequence[str], references: Sequence[str], questions: Questions, asked: VerdictSettings
) -> str:
    """The key of the page of an audit and ``sets``, of which ``references`` are the pictures' SHA256.

    Large sets are told by the SHA256 of all of these together, and ``references`` are looked at no more.

    A set of other pictures under the same name has another page, and so have other parts of these, other decoys,
    another rule and another rate. Raises WorkspaceError for what is no audit id.
    """
    if not KEY.fullmatch(audit_id):
        raise WorkspaceError(f"{audit_id!r} is not an audit id")
    if not sets:
        return f"{FOLDER}/{audit_id}.html"
    told: list[Any] = [sorted(sets), questions.pictures if is_large(questions) else sorted(references)]
    if questions.has_decoys:
        told.append(questions.of)
    if questions.layouts:
        told.append(questions.layouts)
    if asked != VerdictSettings():
        told.append(asdict(asked))
    question = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    named = sets[0][:MOST_NAME] if len(sets) == 1 else f"{len(sets)}-sets"
    return f"{FOLDER}/{audit_id}.{named}-{question}.html"


def is_large(questions: Questions) -> bool:
    """Whether the sets are too large for all of their pictures to be listed."""
    return sum(number for number, _ in questions.pictures.values()) >= store.LARGE


class Answers:
    """Which audits have a page that answers ``sets`` as they and their decoys are now, and were weighed with them.

    Read once: a listing, the sets' pictures, and what was weighed.
    """

    def __init__(self, workspace: Workspace, sets: Sequence[str], descriptor_name: str, asked: VerdictSettings) -> None:
        self.sets, self.asked = list(sets), asked
        self._weighed: dict[str, set[str]] = {}

        def read(connection: duckdb.DuckDBPyConnection) -> None:
            def ask(sql: str, values: list[Any]) -> list[dict[str, Any]]:
                return connection.sql(sql, params=values).to_arrow_table().to_pylist()

            self._questions = questions_of(ask, descriptor_name, self.sets, Known(workspace.files.scratch))
            rows = (
                []
                if is_large(self._questions)
                else ask(
                    'SELECT DISTINCT reference_id FROM "references" WHERE descriptor_name = ? '
                    "AND list_contains(?::VARCHAR[], reference_set)",
                    [descriptor_name, self.sets],
                )
            )
            self._references = [row["reference_id"] for row in rows]
            for row in ask("SELECT audit_id, reference_set, question FROM set_chances", []):
                if self._questions.of.get(row["reference_set"]) == row["question"]:
                    self._weighed.setdefault(row["audit_id"], set()).add(row["reference_set"])

        workspace.asked(read, '"references" set_chances')
        self._pages = {entry.key for entry in workspace.files.list(FOLDER)}

    def __contains__(self, audit_id: str) -> bool:
        page = page_key(audit_id, self.sets, self._references, self._questions, self.asked)
        return page in self._pages and self._weighed.get(audit_id, set()) >= set(self.sets)


def write_page_with(workspace: Workspace, key: str, html: str, facts: PageFacts) -> str:
    """Write a page and the document of what it shows, which comes first; where the page is."""
    workspace.files.write(_document(key), json.dumps(asdict(facts)).encode())
    workspace.files.write(key, html.encode())
    return f"{workspace.files}/{key}"


def pages(workspace: Workspace) -> Iterator[tuple[str, PageFacts | None]]:
    """The pages of a workspace; with None, those whose document is missing or damaged."""
    for entry in workspace.files.list(FOLDER):
        if entry.key.endswith(".html"):
            yield entry.key, _facts(workspace, entry.key)


def pages_with(workspace: Workspace, name: str) -> list[str]:
    """The pages that show the set ``name``; of pages that do not say what they show, those of audits it matched."""
    rows = workspace.rows("SELECT DISTINCT audit_id FROM matches WHERE reference_set = ?", [name])
    audits = {row["audit_id"] for row in rows}

    def shows(key: str, facts: PageFacts | None) -> bool:
        if facts is None:
            return key.removeprefix(f"{FOLDER}/").partition(".")[0] in audits
        return name in facts.reference_sets or name in facts.backgrounds

    found = [key for key, facts in pages(workspace) if shows(key, facts)]
    return found + [key for key, sets in _index_pages(workspace) if sets is None or name in sets]


def remove_page(workspace: Workspace, key: str) -> None:
    """Remove a page, its manifest, and the document beside it."""
    from audit.custody.statement import documents_of

    for one in (key, *documents_of(key), _document(key)):
        workspace.files.remove(one)


def keep_sets(workspace: Workspace, key: str, sets: Sequence[str]) -> None:
    """Write the document beside the index page of a run: the sets that it speaks of."""
    workspace.files.write(_document(key), json.dumps({"reference_sets": list(sets)}).encode())


def _index_pages(workspace: Workspace) -> Iterator[tuple[str, list[str] | None]]:
    """The index pages of runs and the pages of studies, with the sets they speak of; None where they do not say."""
    for entry in (*workspace.files.list(f"{FOLDER}/runs"), *workspace.files.list(f"{FOLDER}/studies")):
        if entry.key.endswith(".html"):
            try:
                found = json.loads(workspace.files.read(_document(entry.key)) or b"")["reference_sets"]
            except (ValueError, KeyError, TypeError, RecursionError):
                found = None
            yield entry.key, found if isinstance(found, list) else None


def _document(key: str) -> str:
    return key.removesuffix(".html") + ".json"


def _facts(workspace: Workspace, key: str) -> PageFacts | None:
    try:
        found = PageFacts(**json.loads(workspace.files.read(_document(key)) or b""))
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found.reference_sets, list) else None
