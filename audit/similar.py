"""Near-identical adapters of a workspace: their sketches, and which are near to one.

A look-up compares one sketch with all that are kept. It is a hint, never a verdict, and nothing is skipped for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import ENOMEM
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from audit.faults import is_of_the_item, reason_of_fault
from audit.models.sketches.sketch import KIND, NEAR, SIZE, Sketch, sketch_of
from audit.untrusted.pool import RefusedError

if TYPE_CHECKING:
    from audit.models.safetensors_header import Header
    from audit.workspace import Workspace

log = logging.getLogger(__name__)
TABLE = "sketches"
MOST_NEAR = 1000


@dataclass(frozen=True)
class Near:
    """Another network of the workspace: the cosine of both sketches, where it was seen, and its finished audits."""

    identity: str
    cosine: float
    item_ids: list[str]
    name: str | None
    audit_ids: list[str]


@dataclass(frozen=True)
class Attempt:
    """What came of sketching a file: None where it has no sketch; with ``later`` it may have one, another time."""

    sketch: Sketch | None
    later: bool = False


def attempt(files: Iterable[tuple[Path, Header]], what: str) -> Attempt:
    """The sketch of a stranger's file; why there is none is logged.

    One that could not be made for want of memory or time is to be tried again: that was perhaps not the file's fault.
    """
    try:
        return Attempt(sketch_of(files))
    except ValueError as error:
        log.info("no sketch of %s: %s", what, str(error)[:200])
        return Attempt(None)
    except Exception as error:
        return _failed(error, what)


def _failed(error: Exception, what: str) -> Attempt:
    """After an ``error`` nobody foresaw. Raises it where it is not the file's own."""
    if not is_of_the_item(error):
        raise error
    log.info("no sketch of %s: %s", what, reason_of_fault(error, what, log))
    return Attempt(None, later=_may_pass(error))


def _may_pass(error: BaseException | None) -> bool:
    """Whether memory or time were short, here or in the process that reads a header."""
    while error is not None:
        if isinstance(error, MemoryError | TimeoutError) or (isinstance(error, OSError) and error.errno == ENOMEM):
            return True
        if isinstance(error, RefusedError) and not error.by_child:
            return True
        error = error.__cause__
    return False


def row_of(identity: str, sketch: Sketch | None) -> dict[str, Any]:
    """A row of the table; one without a vector for what has no sketch, so that it is not tried again."""
    found: dict[str, Any] = {"identity": identity, "kind": KIND, "modules": 0, "left_out": 0, "norm": None,
                             "sketch": None, "seen_at": datetime.now(UTC)}  # fmt: skip
    if sketch is not None:
        found |= {"modules": sketch.modules, "left_out": sketch.left_out, "norm": sketch.norm,
                  "sketch": sketch.vector.tolist()}  # fmt: skip
    return found


class Sketched(Protocol):
    """A file that a crawl has stored; ``format`` is None where it cannot be audited."""

    @property
    def identity(self) -> str:
        """Of its tensors and their layout."""

    @property
    def format(self) -> Any:
        """What it is."""

    @property
    def sketch(self) -> Attempt:
        """Of what it changes."""


def keep(workspace: Workspace, stored: Sequence[tuple[str, Sketched]]) -> None:
    """Keep the sketches of files that are not there yet, by item: their items are in the catalog already."""
    fresh = {one.identity: one.sketch.sketch for _, one in stored if one.format is not None and not one.sketch.later}
    there = workspace.newest(TABLE, "identity", list(fresh))
    rows = [row_of(*one) for one in fresh.items() if there.get(one[0], {}).get("kind") != KIND]
    if rows:
        workspace.append(TABLE, rows)
        items = workspace.newest("checkpoints", "item_id", [item_id for item_id, _ in stored])
        held = {row["identity"] for row in items.values()}
        _take_back(workspace, {row["identity"] for row in rows} - held)


def make_up(workspace: Workspace) -> int:
    """Make the sketches that stored adapters lack, or have of an older kind; how many were made."""
    from audit.models.checkpoint import open_checkpoint
    from crawlers.catalog import Catalog

    lacking = workspace.rows(
        f"""SELECT DISTINCT identity FROM checkpoints WHERE identity IS NOT NULL AND state = 'stored'
        AND format IS NOT NULL AND identity NOT IN (SELECT identity FROM {TABLE} WHERE kind = '{KIND}')"""
    )
    store, rows = Catalog(workspace).store, []
    for one in lacking:
        path = store.fetch(one["identity"])
        if path is None:
            continue
        try:
            checkpoint = open_checkpoint(path)
        except Exception as error:
            tried = _failed(error, path.name)
        else:
            tried = attempt(checkpoint.files.values() if checkpoint.format.is_adapter else [], path.name)
        if not tried.later:
            rows.append(row_of(one["identity"], tried.sketch))
    if rows:
        workspace.append(TABLE, rows)
        _take_back(workspace, {row["identity"] for row in rows})
    return len(rows)


def _take_back(workspace: Workspace, made: Set[str]) -> None:
    """Remove those sketches of ``made`` whose items were opted out meanwhile."""
    if not made:
        return
    held = workspace.rows(
        "SELECT DISTINCT identity FROM checkpoints WHERE list_contains(?::VARCHAR[], identity) "
        "AND state <> 'opted-out'",
        [sorted(made)],
    )
    for identity in made - {row["identity"] for row in held}:
        workspace.erase("identity", identity, TABLE)


def nearest(
    workspace: Workspace, vector: Sequence[float], least: float = NEAR, limit: int = 20, but: str | None = None
) -> list[Near]:
    """The networks whose sketches have a cosine of at least ``least`` to ``vector``, the nearest first; not ``but``."""
    assert len(vector) == SIZE
    rows = workspace.rows(
        f"""SELECT identity, max(list_inner_product(sketch, ?::FLOAT[])) AS cosine FROM {TABLE}
        WHERE kind = '{KIND}' AND sketch IS NOT NULL AND identity <> ? GROUP BY identity
        HAVING cosine >= ? ORDER BY cosine DESC, identity LIMIT {min(limit, MOST_NEAR):d}""",
        [list(vector), but or "", least],
    )
    identities = [row["identity"] for row in rows]
    places: dict[str, list[dict[str, Any]]] = {one: [] for one in identities}
    for row in workspace.rows(
        """SELECT identity, item_id, name, checkpoint_sha256 FROM checkpoints
        WHERE state <> 'opted-out' AND list_contains(?::VARCHAR[], identity) ORDER BY first_seen_at, item_id""",
        [identities],
    ):
        places[row["identity"]].append(row)
    hashes = [row["checkpoint_sha256"] for some in places.values() for row in some]
    audits: dict[str, list[str]] = {}
    for row in workspace.rows(
        "SELECT audit_id, checkpoint_sha256 FROM audits WHERE list_contains(?::VARCHAR[], checkpoint_sha256)", [hashes]
    ):
        audits.setdefault(row["checkpoint_sha256"], []).append(row["audit_id"])
    return [
        Near(
            row["identity"], round(float(row["cosine"]), 4), [one["item_id"] for one in places[row["identity"]]],
            next((one["name"] for one in places[row["identity"]]), None),
            sorted({a for one in places[row["identity"]] for a in audits.get(one["checkpoint_sha256"], [])}),
        )
        for row in rows
        if places[row["identity"]]
    ]  # fmt: skip


def kept(workspace: Workspace, identities: Sequence[str]) -> dict[str, list[float]]:
    """The vectors of those of ``identities`` that have one."""
    rows = workspace.rows(
        f"SELECT identity, any_value(sketch) AS sketch FROM {TABLE} WHERE kind = '{KIND}' AND sketch IS NOT NULL "
        "AND list_contains(?::VARCHAR[], identity) GROUP BY identity",
        [list(identities)],
    )
    return {row["identity"]: row["sketch"] for row in rows}
