"""A report against its manifest: everything that can be computed again, and the signature."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb

from audit.custody.findings import GONE, Finding, PageCheck, Verified, changed_lines, cut, differences
from audit.custody.keep import pages_of
from audit.custody.originals import Originals, check_checkpoint, check_pictures
from audit.custody.record import Record, Rows, record_of
from audit.custody.signing import MOST_ENVELOPE_BYTES, Signed, read_envelope
from audit.custody.statement import (
    MOST_BYTES,
    MOST_ROWS_BYTES,
    PICTURES,
    Counted,
    Predicate,
    SetEntry,
    Statement,
    documents_of,
    entry_of,
    read_statement,
)
from audit.errors import CustodyError
from audit.progress import Tell, quiet
from audit.schemas import KEY_COLUMNS
from audit.states import Agreement
from audit.untrusted.documents import parse_json
from audit.workspace import Workspace
from audit.workspace.names import REPORTS

AGREES, DIFFERS, REMOVED, UNCHECKED = Agreement.agrees, Agreement.differs, Agreement.removed, Agreement.unchecked
READ = " ".join((*KEY_COLUMNS, "checkpoints", "references", "passed_over"))
PAGE = re.compile(r"[A-Za-z0-9._-]{1,120}\.html")
OF_CATALOG = ("identity", "format", "bytes", "claimed_metadata_sha256")


def verify_report(
    workspace: Workspace,
    audit: str,
    *,
    public_key: str | Path | None = None,
    references: Sequence[str | Path] = (),
    checkpoint: str | Path | None = None,
    envelope: str | Path | None = None,
    tell: Tell = quiet,
) -> Verified:
    """Compare the report pages of the audit that begins with ``audit`` with their manifests, and these with tables.

    ``public_key`` is a PEM file: only with it a signature counts. ``references`` are folders with the original
    pictures, ``checkpoint`` the file or folder that was audited. ``envelope`` is one that was kept elsewhere: the page
    that it is of is compared with what it says, whatever the workspace has now. Nothing is written. Raises
    WorkspaceError for no audit or several, and CustodyError where it has no page, or a file given cannot be read.
    """
    sizes = {entry.key: entry.size for folder in (REPORTS, PICTURES) for entry in workspace.files.list(folder)}
    kept = None
    if envelope is None:
        audit_id, pages = pages_of(workspace, audit, sizes)
    else:
        kept, audit_id, page = _kept(Path(envelope), audit)
        pages = [page]
    originals = Originals.below([Path(one) for one in references], tell) if references else None
    key, file = (None if one is None else Path(one) for one in (public_key, checkpoint))
    check = _Check(workspace, audit_id, sizes, key, originals, file, kept)
    return Verified(audit_id, [check.page(page) for page in pages])


def _kept(file: Path, audit: str) -> tuple[Signed, str, str]:
    """The envelope in ``file``, the audit and the key of the page that it is of. Raises CustodyError."""
    try:
        with file.open("rb") as opened:
            signed = read_envelope(opened.read(MOST_ENVELOPE_BYTES + 1))
        said = read_statement(signed.payload)
    except OSError as error:
        raise CustodyError(f"the envelope {file} cannot be read: {error.strerror}") from error
    except CustodyError as error:
        raise CustodyError(f"the envelope {file} is none of a report: {error}") from error
    audit_id, name = said.predicate.audit_id, said.page[0]
    if not audit or not audit_id.startswith(audit):
        raise CustodyError(f"the envelope {file} is of the audit {audit_id}, not of one that begins with {audit!r}")
    if not (PAGE.fullmatch(name) and name.startswith(f"{audit_id}.")):
        raise CustodyError(f"the envelope {file} is of {name[:200]!r}, which is no page of that audit")
    return signed, audit_id, f"{REPORTS}/{name}"


class _Check:
    """One check of an audit's pages: what is given for it, and what was read for it."""

    def __init__(
        self, workspace: Workspace, audit_id: str, sizes: dict[str, int], public_key: Path | None,
        originals: Originals | None, checkpoint: Path | None, kept: Signed | None = None,
    ) -> None:  # fmt: skip
        self.workspace, self.audit_id, self.sizes = workspace, audit_id, sizes
        self.public_key, self.originals, self.checkpoint, self.kept = public_key, originals, checkpoint, kept

    def page(self, page: str) -> PageCheck:
        """What is found of one page."""
        rows_key, manifest_key, envelope_key = documents_of(page)
        found: list[Finding] = []
        manifest = self._read(manifest_key, MOST_BYTES, found)
        if self.kept is None:
            signed = self._signature(envelope_key, manifest, found)
        else:
            signed = self._kept_elsewhere(self.kept, envelope_key, manifest, manifest_key, found)
        content = signed.payload if signed else manifest  # what was signed holds
        if manifest is None and manifest_key not in self.sizes:
            told = "there is none: the page is older than manifests, or it was removed; 'lora-audit report' writes one"
            found.append(Finding(manifest_key, DIFFERS, told))
        if content is None:
            return PageCheck(page, None, [], found)
        by = signed.key_ids if signed else []
        try:
            said = read_statement(content)
        except CustodyError as error:
            where = envelope_key if signed else manifest_key
            return PageCheck(page, None, by, [*found, Finding(where, DIFFERS, str(error))])
        if said.page[0] != page.rpartition("/")[2] or said.predicate.audit_id != self.audit_id:
            told = f"it is the manifest of another page, {said.page[0][:200]}"
            return PageCheck(page, None, by, [*found, Finding(manifest_key, DIFFERS, told)])
        found += self._file(page, said.page[1])
        found += self._tables(said, rows_key)
        found.append(self._checkpoint(said.predicate))
        return PageCheck(page, asdict(said.predicate.made), by, found)

    def _read(self, key: str, most: int, found: list[Finding]) -> bytes | None:
        """The content of a document; None where there is none, or more than ours can be."""
        if self.sizes.get(key, 0) > most:
            found.append(Finding(key, DIFFERS, f"it has {self.sizes[key]} bytes, more than any of ours: it is none"))
            return None
        return self.workspace.files.read(key) if key in self.sizes else None

    def _signature(self, key: str, manifest: bytes | None, found: list[Finding]) -> Signed | None:
        """The envelope, where there is one that can be read."""
        content = self._read(key, MOST_ENVELOPE_BYTES, found)
        if content is None:
            if self.public_key is not None:
                found.append(Finding(key, DIFFERS, "there is no signature"))
            elif key not in self.sizes:
                told = "unsigned: whoever can write to the workspace could have changed page, rows and manifest alike"
                found.append(Finding("signature", UNCHECKED, told))
            return None
        try:
            signed = read_envelope(content)
        except CustodyError as error:
            found.append(Finding(key, DIFFERS, str(error)))
            return None
        if manifest is not None and signed.payload != manifest:
            found.append(
                Finding(key.replace(".dsse.", ".manifest."), DIFFERS, "it is not the manifest that was signed")
            )
        self._signed(signed, key, found)
        return signed

    def _kept_elsewhere(
        self, kept: Signed, key: str, manifest: bytes | None, manifest_key: str, found: list[Finding]
    ) -> Signed:
        """The envelope that was given, after what the workspace has in its place was compared with it."""
        self._signed(kept, "the envelope that was given", found)
        content = self._read(key, MOST_ENVELOPE_BYTES, found)
        if content is None and key not in self.sizes:
            found.append(Finding(key, DIFFERS, "there is none any more, and one was given"))
        elif content is not None:
            try:
                same = read_envelope(content).payload == kept.payload
            except CustodyError as error:
                found.append(Finding(key, DIFFERS, str(error)))
            else:
                told = "it is of the same statement as the envelope that was given"
                other = "it is of another statement than the envelope that was given"
                found.append(Finding(key, AGREES if same else DIFFERS, told if same else other))
        if manifest is not None and manifest != kept.payload:
            found.append(Finding(manifest_key, DIFFERS, "it is not the one in the envelope that was given"))
            found += cut(list(_statements_apart(kept.payload, manifest)), manifest_key)
        return kept

    def _signed(self, signed: Signed, key: str, found: list[Finding]) -> None:
        """What is to be said of the signature of an envelope."""
        if self.public_key is None:
            by = ", ".join(signed.key_ids) or "nobody"
            told = f"said to be of the key {by}: give --public-key"
            found.append(Finding("signature", UNCHECKED, told))
        elif problem := signed.problem(self.public_key):
            found.append(Finding(key, DIFFERS, problem))
        else:
            found.append(Finding("signature", AGREES, f"signed with the key of {self.public_key.name}"))

    def _file(self, key: str, sha256: str) -> list[Finding]:
        content = self.workspace.files.read(key)
        if content is None:
            return [Finding(key, DIFFERS, "the file is missing")]
        now = hashlib.sha256(content).hexdigest()
        if now != sha256:
            return [Finding(key, DIFFERS, f"it was changed since: SHA256 {now}, in the manifest {sha256}")]
        return [Finding(key, AGREES, "the page is as it was written")]

    def _lines(self, key: str, sha256: str, found: list[Finding]) -> list[str] | None:
        """The lines of a document of rows, None where it is not that of the manifest."""
        content = self._read(key, MOST_ROWS_BYTES, found)
        if content is None:
            found.append(Finding(key, DIFFERS, "the file is missing: which rows differ cannot be said without it"))
            return None
        if hashlib.sha256(content).hexdigest() != sha256:
            found.append(Finding(key, DIFFERS, "it is not the list of rows of the manifest: it was changed since"))
            return None
        return content.decode("utf-8", "replace").splitlines()

    # What the tables say

    def _tables(self, said: Statement, rows_key: str) -> list[Finding]:
        predicate = said.predicate

        def ask(connection: duckdb.DuckDBPyConnection) -> tuple[Record, set[str]]:
            rows = connection.sql('SELECT DISTINCT reference_set FROM "references"').fetchall()
            return record_of(connection, self.audit_id, predicate.reference_sets), {one for (one,) in rows}

        now, there = self.workspace.asked(ask, READ)
        found = self._inputs(predicate, now)
        lines = self._lines(rows_key, said.rows[1], found)
        of_rows = [one for name in sorted({*predicate.tables, *now.tables}) for one in self._table(
            name, predicate.tables.get(name), now.tables.get(name, Rows([])), lines)]  # fmt: skip
        if any(entry.name not in there for entry in predicate.sets):  # what was weighed with decoys goes with them
            of_rows = [
                Finding(one.part, REMOVED, "it rested on a set that was removed since")
                if one.said == GONE and one.part.startswith("set_chances ") else one
                for one in of_rows
            ]  # fmt: skip
        if not of_rows:
            of_rows = [Finding("tables", AGREES, f"{len(now.lines)} rows are as they were")]
        found += of_rows
        states = {one.name: one for one in now.sets}
        for entry in predicate.sets:
            current = states.get(entry.name)
            if entry.name not in there:
                found.append(_gone(entry, entry.name in predicate.reference_sets))
                continue
            now_entry = entry_of(current, entry.scores is None) if current else None
            found += self._set(entry, now_entry, (current.lines if current else None) or [])
        return found

    def _inputs(self, predicate: Predicate, now: Record) -> list[Finding]:
        if not now.inputs:
            return [Finding(f"audits {self.audit_id}", DIFFERS, "the audit's row is not there any more")]
        then = predicate.inputs
        found: list[Finding] = []
        checkpoint = then.get("checkpoint")
        if isinstance(checkpoint, dict) and not any(name in now.inputs["checkpoint"] for name in OF_CATALOG):
            if any(name in checkpoint for name in OF_CATALOG):
                found.append(Finding("checkpoint", REMOVED, "its row of the catalog was taken away since"))
            then = then | {"checkpoint": {k: value for k, value in checkpoint.items() if k not in OF_CATALOG}}
        changed = list(differences(then, _known_descriptor(then, now.inputs), "inputs"))
        return [
            *found,
            *(changed or [Finding("inputs", AGREES, "checkpoint, base, captions and settings are as then")]),
        ]

    def _table(self, name: str, then: Counted | None, now: Rows, lines: list[str] | None) -> list[Finding]:
        if then is None and not now.lines:
            return []  # a table of a later version, in which the audit has nothing
        if then is not None and (then.rows, then.sha256) == (len(now.lines), now.sha256):
            return []
        if lines is not None:
            named = changed_lines([line for line in lines if line.startswith(f'["{name}",')], now.lines, name)
            if named:
                return named
        return [Finding(name, DIFFERS, f"its {len(now.lines)} rows are not the {then.rows if then else 0} of then")]

    def _set(self, then: SetEntry, now: SetEntry | None, lines: list[str]) -> list[Finding]:
        part = f"reference set {then.name}"
        found: list[Finding] = []
        kept: list[str] | None = lines
        if now is None or then.sha256 != now.sha256:
            kept = self._lines(then.key, then.sha256, found)
            found += changed_lines(kept, lines, part) if kept is not None else []
            if not found:
                found.append(Finding(part, DIFFERS, "it is not the set of then"))
        elif then.question != now.question and then.kind == now.kind:
            told = "its pictures are as they were; their membership was measured again since, for another question"
            found.append(Finding(part, UNCHECKED, told))
        elif then != now:
            told = "what it is, or the membership scores of its decoys, are others than then"
            found.append(Finding(part, DIFFERS, told))
        else:
            found.append(Finding(part, AGREES, f"its {then.pictures} pictures are recorded as they were"))
        if self.originals is None:
            found.append(Finding(f"pictures of {then.name}", UNCHECKED, "the originals: give --references"))
        elif kept is not None:
            found += check_pictures(then.name, kept, self.originals)
        return found

    def _checkpoint(self, predicate: Predicate) -> Finding:
        if self.checkpoint is None:
            return Finding("checkpoint", UNCHECKED, "the file: give --checkpoint")
        return check_checkpoint(self.checkpoint, predicate.inputs.get("checkpoint"))


def _statements_apart(kept: bytes, now: bytes) -> Iterator[Finding]:
    """In what the workspace's manifest says otherwise than the envelope; nothing where it cannot be read."""
    with suppress(ValueError):
        told = "the envelope says {then}, the manifest in the workspace {now}"
        yield from differences(parse_json(kept), parse_json(now), "manifest", told)


def _known_descriptor(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """``now`` with its descriptor's SHA256 as of then, if the name bears it out: not every version knows it."""
    said, name = then.get("descriptor"), now["descriptor"]["name"]
    sha256 = said.get("sha256") if isinstance(said, dict) else None
    fits = sha256 is None or (isinstance(sha256, str) and f"@{sha256[:12]}/" in name)
    return now | {"descriptor": now["descriptor"] | {"sha256": sha256}} if fits else now


def _gone(entry: SetEntry, shown: bool) -> Finding:
    """What is said of a set that is not there; removing one that a page shows takes the page away, too."""
    part = f"reference set {entry.name}"
    if shown:
        return Finding(part, DIFFERS, "the set is not there, and its page is: removing a set takes its pages away")
    return Finding(part, REMOVED, f"the set of {entry.pictures} pictures was removed since")
