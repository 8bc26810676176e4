"""The manifest written beside its page, and its signature."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audit.custody.record import Record
from audit.custody.statement import (
    MOST_BYTES,
    Command,
    Statement,
    documents_of,
    entry_of,
    list_key,
    read_statement,
    statement_of,
)
from audit.errors import CustodyError
from audit.references.index.known import Known
from audit.workspace import Workspace
from audit.workspace.names import REPORTS

if TYPE_CHECKING:
    from audit.custody.signing import SigningKey

WHOLE_ID = re.compile(r"[0-9a-f]{32}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Custody:
    """Who makes reports and by which command, for their manifests; with a ``key`` they are signed.

    Without the key it is plain data and travels to workers.
    """

    operator: str | None = None
    command: Command | None = None
    key: SigningKey | None = None

    def without_key(self) -> Custody:
        """The part that travels."""
        return Custody(self.operator, self.command)


NOBODY = Custody()


class KeptHashes:
    """The hashes of large sets whose lists the workspace has: their pages are written without reading the set.

    They hold for what the tables said when a list was written; ``verify`` reads the set itself.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self._known = workspace, Known(workspace.files.scratch)
        self._seen: dict[str, str] = {}  # of small sets too: for many audits in a row

    def get(self, about: tuple[str, str], pictures: int, held: Sequence[Any]) -> str | None:
        """The hash of the lines of a set and descriptor; None where it, or the list, is not there."""
        found = self._seen.get(repr((about, held))) or self._known.get("rows", about, pictures, held)
        there = found is not None and self.workspace.files.exists(list_key(about[0], found))
        return found if there else None

    def put(self, about: tuple[str, str], pictures: int, held: Sequence[Any], sha256: str) -> None:
        """Keep it for those who find the list, which is written with the page."""
        self._seen[repr((about, held))] = sha256
        self._known.put("rows", about, pictures, held, sha256)


def keep_manifest(workspace: Workspace, page: str, html: bytes, audit_id: str, sets: list[str], record: Record,
                  custody: Custody = NOBODY) -> None:  # fmt: skip
    """Write the manifest of ``page`` before the page itself: a page that is there has one.

    Where the manifest there says the same already, it is left, with who made it when and its signature. Raises
    WorkspaceError.
    """
    rows = _document(record.lines)
    rows_key, manifest_key, envelope_key = documents_of(page)
    subjects = [
        (page.rpartition("/")[2], hashlib.sha256(html).hexdigest()),
        (rows_key.rpartition("/")[2], hashlib.sha256(rows).hexdigest()),
    ]
    new = statement_of(audit_id, sets, record, subjects[0], subjects[1], custody.operator, custody.command)
    for one in record.sets:
        key = entry_of(one, one.name in sets).key
        if one.lines is not None and not workspace.files.exists(key):
            workspace.files.write(key, _document(one.lines))
    if _there(workspace, manifest_key, new):
        if workspace.files.read(rows_key) != rows:
            workspace.files.write(rows_key, rows)
        return
    if workspace.files.exists(envelope_key):
        log.warning("%s says something else now: its earlier signature is taken away, sign it again", page)
        workspace.files.remove(envelope_key)
    workspace.files.write(rows_key, rows)
    workspace.files.write(manifest_key, new.to_bytes())


def _there(workspace: Workspace, key: str, new: Statement) -> bool:
    """Whether the manifest ``key`` says what ``new`` says."""
    content = workspace.files.read(key)
    if content is None or len(content) > MOST_BYTES:
        return False
    if any(sha256.encode() not in content for _, sha256 in (new.page, new.rows)):
        return False  # most that say something else: without parsing, which is done in another process
    try:
        return read_statement(content).says_as(new)
    except CustodyError:
        return False


def _document(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def sign_page(workspace: Workspace, page: str, key: SigningKey) -> bool:
    """Sign the manifest of the page ``page`` unless ``key`` has signed it; whether it did so now.

    A signature by another key gives way. Raises CustodyError where there is no manifest of ours.
    """
    from audit.custody.signing import read_envelope

    _, manifest_key, envelope_key = documents_of(page)
    content = workspace.files.read(manifest_key)
    if content is None:
        raise CustodyError(f"{workspace.files}/{page} has no manifest: write it with 'lora-audit report'")
    try:
        said = read_statement(content)
    except CustodyError as error:
        raise CustodyError(f"{workspace.files}/{manifest_key} cannot be signed: {error}") from error
    there = workspace.files.read(page)
    if there is None or hashlib.sha256(there).hexdigest() != said.page[1]:
        raise CustodyError(f"{workspace.files}/{page} is not the page of its manifest: 'lora-audit report' writes both")
    known = workspace.files.read(envelope_key)
    if known is not None:
        try:
            signed = read_envelope(known)
            if signed.payload == content and key.key_id in signed.key_ids:
                return False
        except CustodyError:
            pass
    workspace.files.write(envelope_key, key.sign(content))
    return True


def sign_written(workspace: Workspace, written: str, custody: Custody) -> None:
    """Sign the page at ``written``, where one was written to, if there is a key. Raises as ``sign_page`` does."""
    if custody.key is not None and written:
        sign_page(workspace, f"{REPORTS}/{written.rpartition('/')[2]}", custody.key)


def sign_one_of_many(workspace: Workspace, written: str, custody: Custody) -> None:
    """The same for a page of a run: one that cannot be signed, as others write it too, is named and stops nothing."""
    try:
        sign_written(workspace, written, custody)
    except CustodyError as error:
        log.warning("not signed: %s", error)


def sign_report(workspace: Workspace, audit: str, key: SigningKey) -> dict[str, bool]:
    """Sign the manifests of all pages of the audit that begins with ``audit``: by page, whether it was done now.

    Raises WorkspaceError for no audit or several, and CustodyError for a page without a manifest of its own.
    """
    _, pages = pages_of(workspace, audit, [entry.key for entry in workspace.files.list(REPORTS)])
    return {page: sign_page(workspace, page, key) for page in pages}


def pages_of(workspace: Workspace, audit: str, keys: Iterable[str]) -> tuple[str, list[str]]:
    """The id of the audit that begins with ``audit``, and the keys of its pages among those of the reports' files.

    A page counts also where its manifest alone is there. Raises WorkspaceError for no audit or several, and
    CustodyError for one without a page.
    """
    audit_id = _audit_of(workspace, audit, keys)
    stems = {key.removesuffix(ending) for key in keys for ending in (".html", ".manifest.json", ".dsse.json")
             if key.startswith(f"{REPORTS}/{audit_id}.") and key.endswith(ending)}  # fmt: skip
    if not stems:
        raise CustodyError(
            f"audit {audit_id} has no report page: none was written, or its reference sets were removed since, which "
            f"takes their pages away; 'lora-audit report {audit_id[:8]}' writes one"
        )
    return audit_id, [f"{stem}.html" for stem in sorted(stems)]


def _audit_of(workspace: Workspace, beginning: str, keys: Iterable[str]) -> str:
    """The audit's id by its pages: its row may be what somebody took away."""
    from audit.report.facts import find_audit

    names = {key.removeprefix(f"{REPORTS}/").partition(".")[0] for key in keys}
    found = [name for name in names if WHOLE_ID.fullmatch(name) and name.startswith(beginning) and beginning]
    return found[0] if len(found) == 1 else find_audit(workspace, beginning)
