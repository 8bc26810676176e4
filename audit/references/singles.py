"""Single pictures of a set: added, replaced and taken away without touching the others."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from audit.errors import ReferenceSetError
from audit.references.describe import Wanted, at_once, describe
from audit.references.folder import SkippedImage
from audit.references.index import forget
from audit.references.inputs.given import Given, chunks
from audit.references.inputs.metadata import plain
from audit.references.lists import is_list, read_list
from audit.references.parts import require_few
from audit.references.sets import PDQ_NAME, ReferenceSets
from audit.schemas import REFERENCES
from audit.stages.membership import Membership
from audit.storable import path_as_text, storable_values
from audit.workspace import Workspace
from audit.workspace.names import KEY

if TYPE_CHECKING:
    from audit.descriptors import Descriptor

MOST = 10_000  # pictures at once: more are a set of their own
SHORTEST = 8  # digits of an id's beginning
LOOSE = 64  # files of single pictures that are merged


@dataclass(frozen=True)
class Put:
    """What `put` did: how many pictures are new, took the place of one of the same name, or have other metadata; how
    many the set has now; and what was passed over.
    """

    name: str
    added: int
    replaced: int
    changed: int
    images: int
    skipped: list[SkippedImage]


@dataclass(frozen=True)
class Dropped:
    """What `drop` did: the names of the pictures, how many the set has now, and the pages that showed it."""

    name: str
    pictures: list[str]
    images: int
    pages: list[str]


def files_given(files: Iterable[Path], metadata: str | None = None) -> list[Given]:
    """Picture files as they are put: under their own names, all with the same ``metadata``."""
    return [Given(path_as_text(one.name), one, metadata) for one in files]


def put(workspace: Workspace, name: str, files: Sequence[Given | Path], descriptor: Descriptor) -> Put:
    """Add pictures, or the hashes of lists, to the set ``name``; one of the same name takes the other's place.

    They are there when this returns, all at once. A picture that the set has already stays, with the metadata that is
    given now, if any. Raises ReferenceSetError where there is no such set by this descriptor, for decoys that were
    declared a random split, for more than MOST pictures, and where none of them can be read.
    """
    sets = ReferenceSets(workspace)
    sets.require(name, descriptor, in_force=False)
    [about] = workspace.rows(
        """SELECT any_value(kind) AS kind, any_value(decoys_of) AS decoys_of, any_value(drawn_with) AS drawn_with,
            count(thumbnail) > 0 AS thumbnails, any_value(parts_layout) AS layout, count(*) AS images FROM "references"
        WHERE reference_set = ? AND descriptor_name = ?""",
        [name, descriptor.name],
    )
    if about["drawn_with"]:
        raise ReferenceSetError(
            f"{name} are decoys that were declared a random split of one collection (--drawn): with other pictures "
            "they are another split; add the set again"
        )
    rows, skipped = _rows(files, Wanted(descriptor.name, "", about["thumbnails"], layout=about["layout"]), descriptor)
    if not rows:
        listed = "; ".join(f"{one.name}: {one.reason}" for one in skipped[:3])
        raise ReferenceSetError(f"none of the {len(files)} files can be put into {name} ({listed})")
    there = _known(workspace, name, descriptor.name, rows)
    fresh, changed = [], []
    for row in rows.values():
        known = there.get(row["reference_id"])
        if known is None:
            fresh.append(row)
        elif row["metadata"] is not None and plain(row["metadata"]) != plain(known["metadata"]):
            changed.append(row | {"name": known["name"]})
        else:
            skipped.append(SkippedImage(row["name"], f"the same file as {known['name']}, which is in the set"))
    require_few(about["images"] + len(fresh) if about["layout"] else 0, name)
    names = {row["name"] for row in fresh}
    replaced = [one for one, row in there.items() if row["name"] in names and one not in rows]
    same = {"reference_set": name, "descriptor_name": descriptor.name, "added_at": datetime.now(UTC),
            "kind": about["kind"], "decoys_of": about["decoys_of"]}  # fmt: skip
    key = sets.key_of(name, descriptor.name)
    if fresh:
        workspace.write("references", f"{key}.{secrets.token_hex(8)}", storable_values([row | same for row in fresh]))
    for row in changed:  # the old row goes when the new one is written, and not before
        part = pa.Table.from_pylist(storable_values([row | same]), schema=REFERENCES)
        instead = _one(name, descriptor.name, row["reference_id"])
        workspace.write_parts("references", f"{key}.{secrets.token_hex(8)}", [part], instead)
    if (fresh or changed) and len(workspace.table("references").view().loose) >= LOOSE:
        workspace.compact("references")
    if replaced:
        _take(workspace, name, replaced, descriptor.name)
    return Put(name, len(fresh) - len(replaced), len(replaced), len(changed),
               about["images"] + len(fresh) - len(replaced), skipped)  # fmt: skip


def drop(workspace: Workspace, name: str, pictures: Sequence[str]) -> Dropped:
    """Take single pictures out of the set ``name`` for good, by their SHA256, its beginning, or their names.

    What was found with them goes too, and the pages that show the set, which 'match' and 'report' write again. Raises
    ReferenceSetError for a picture that is not there, or several that are meant, and where none would be left.
    """
    rows = workspace.rows(
        'SELECT DISTINCT reference_id, name FROM "references" WHERE reference_set = ? ORDER BY ALL', [name]
    )
    if not rows:
        ReferenceSets(workspace).require_any([name])
    chosen: dict[str, str] = {}
    for one in pictures:
        found = {
            row["reference_id"]: row["name"] for row in rows
            if row["name"] == one or (len(one) >= SHORTEST and row["reference_id"].startswith(one.lower()))
        }  # fmt: skip
        if len(found) != 1:
            raise ReferenceSetError(
                f"{len(found) or 'no'} pictures of {name} are called {one[:100]!r}, or have a SHA256 that begins so: "
                "give one as the table references has it"
            )
        chosen |= found
    left = len({row["reference_id"] for row in rows}) - len(chosen)
    if left == 0:
        raise ReferenceSetError(f"these are all pictures of {name}: 'lora-audit references remove {name}' removes it")
    pages = _take(workspace, name, list(chosen))
    return Dropped(name, sorted(chosen.values()), left, pages)


def _rows(
    files: Sequence[Given | Path], wanted: Wanted, descriptor: Descriptor
) -> tuple[dict[str, dict[str, Any]], list[SkippedImage]]:
    """Rows by id, and what was passed over."""
    lists = [one for one in files if isinstance(one, Path)]
    if any(not is_list(one) for one in lists) or (lists and descriptor.name != PDQ_NAME):
        raise ReferenceSetError(f"{lists[0]} is no list of hashes for a set that pdq describes")
    rows: dict[str, dict[str, Any]] = {}
    skipped: list[SkippedImage] = []
    for chunk in chunks((one for one in files if isinstance(one, Given)), at_once(wanted.layout)):
        found = describe(chunk, descriptor, wanted)
        skipped += found.skipped
        for one in found.seen:
            rows.setdefault(one.digest, found.rows[one.digest] | {"metadata": one.metadata})
        if len(rows) > MOST:
            raise ReferenceSetError(f"more than {MOST} pictures are a set of their own: 'lora-audit references add'")
    for path in lists:
        listed = read_list(path)
        if len(listed.names) > MOST:
            raise ReferenceSetError(f"{path}: more than {MOST} hashes are a set of their own")
        columns = listed.rows()
        for number in range(len(listed.names)):
            row = {column: values[number] for column, values in columns.items()}
            rows.setdefault(row["reference_id"], row)
        skipped += listed.skipped
    return rows, skipped


def _known(workspace: Workspace, name: str, by: str, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the set has of these pictures, or under their names, by id."""
    found = workspace.rows(
        """SELECT reference_id, name, metadata FROM "references" WHERE reference_set = ? AND descriptor_name = ?
        AND (list_contains(?::VARCHAR[], reference_id) OR list_contains(?::VARCHAR[], name))""",
        [name, by, list(rows), [row["name"] for row in rows.values()]],
    )
    return {row["reference_id"]: row for row in found}


def _one(name: str, by: str, reference_id: str) -> list[tuple[str, str | int]]:
    return [("reference_id", reference_id), ("reference_set", name), ("descriptor_name", by)]


def _take(workspace: Workspace, name: str, ids: list[str], by: str | None = None) -> list[str]:
    """Erase pictures of a set, by one descriptor or by all, and what was found with them; the pages that went."""
    from audit.custody.statement import remove_pictures
    from audit.report.pages import pages_with, remove_page

    pages = pages_with(workspace, name)
    for page in pages:  # what shows pictures goes first
        remove_page(workspace, page)
    remove_pictures(workspace, name)
    # What came out is judged by the reference nearest to it: without that one, all of it is another answer.
    workspace.erase("reference_set", name, "set_chances", "chances", "matches")
    others = workspace.rows(
        """SELECT DISTINCT reference_id FROM "references" WHERE reference_set = ? AND descriptor_name <> ?
        AND list_contains(?::VARCHAR[], reference_id)""",
        [name, by or "", ids],
    )
    kept = {row["reference_id"] for row in others} if by else set()
    gone_from_set = [[("reference_id", one), ("reference_set", name)] for one in ids if one not in kept]
    for table in ("denoised", "latents", "base_losses", "memberships"):
        workspace.erase_rows(table, gone_from_set)
    workspace.erase_rows("references", [_one(name, by, one) for one in ids] if by else gone_from_set)
    elsewhere = workspace.rows(
        'SELECT DISTINCT reference_id FROM "references" WHERE list_contains(?::VARCHAR[], reference_id)', [ids]
    )
    gone = pa.array(sorted(set(ids) - {row["reference_id"] for row in elsewhere}), pa.string())
    spools = {entry.key.split("/")[1] for entry in workspace.files.list("spool", recursive=True)}
    for audit_id in spools if len(gone) else ():
        if KEY.fullmatch(audit_id):
            workspace.spool(audit_id, Membership.batch).forget("reference_id", gone)
    forget(workspace.files.scratch, name)
    return pages
