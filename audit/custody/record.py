"""What the tables say of one audit and of the pictures it was asked about, as hashes that no file layout changes.

A row's hash is the SHA256 of its canonical JSON: an object of its columns without those that are null, names sorted, no
spaces, what is not ASCII escaped. In it a number with a fraction is its exact hexadecimal form (``float.hex``), a list
of such numbers the SHA256 of its little-endian 64-bit floats, bytes are their SHA256, and a time is ISO 8601 in UTC,
with microseconds. A table's hash is the SHA256 of its rows' lines, sorted, each with an end of line: ["table", key...,
hash]. Columns that a later version adds are null in older rows, and so leave their hashes as they are.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, Protocol

import duckdb
import numpy as np
import pyarrow as pa

from audit.schemas import KEY_COLUMNS, TABLES
from audit.states import SetKind

BATCH = 4096  # rows in memory
# What names a row within its audit or set; in tables that are not here those columns of OTHERS that they have.
NAMING = {
    "audits": (), "generations": ("index",), "extractions": ("rank",),
    "matches": ("reference_set", "reference_id", "rank"), "chances": ("reference_set", "reference_id"),
    "references": ("reference_set", "reference_id", "name"), "passed_over": ("reference_set", "name"),
}  # fmt: skip
OTHERS = ("reference_set", "reference_id", "kind", "rank", "index", "position")
OF_SETS = ("references", "passed_over")
# When a set was described: doing it again, from the same pictures, is no change.
LEFT_OUT = {"references": ("added_at",), "passed_over": ("added_at",)}


@dataclass(frozen=True)
class Rows:
    """Rows of one table: their lines, sorted."""

    lines: list[str]

    @property
    def sha256(self) -> str:
        """The hash of them all."""
        return sha256_of_lines(self.lines)


@dataclass(frozen=True)
class SetRecord:
    """A reference set as an audit met it: the lines of its rows in the tables ``OF_SETS``, and their hash, in their
    order; ``lines`` is None where the workspace has the list of that hash already.

    Where they are decoys, ``scores`` are the membership scores that the audit gave its pictures, and ``question`` is
    what they were measured for: another question measures decoys again.
    """

    name: str
    kind: str
    pictures: int
    sha256: str
    lines: list[str] | None
    scores: Rows = field(default_factory=lambda: Rows([]))
    question: str | None = None


@dataclass(frozen=True)
class Record:
    """``inputs`` are what the tables say of what went in, empty where the audit is not there; ``tables`` its rows."""

    inputs: dict[str, Any]
    tables: dict[str, Rows]
    sets: list[SetRecord]

    @property
    def lines(self) -> list[str]:
        """The lines of all its rows, table by table."""
        return [line for name in sorted(self.tables) for line in self.tables[name].lines]


def sha256_of_lines(lines: Iterable[str]) -> str:
    """The SHA256 of ``lines``, each with an end of line."""
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode() + b"\n")
    return found.hexdigest()


def canonical(value: Any) -> Any:
    """A value of a column as canonical JSON holds it."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, list):
        if value and all(isinstance(one, float) for one in value):
            return hashlib.sha256(struct.pack(f"<{len(value)}d", *value)).hexdigest()
        return [canonical(one) for one in value]
    if isinstance(value, dict):
        return {name: canonical(one) for name, one in value.items() if one is not None}
    return value


def canonical_json(value: Any) -> str:
    """Canonical JSON of plain values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _hash(cells: dict[str, Any]) -> str:
    kept = {name: value for name, value in cells.items() if value is not None}
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()


def _cells(column: pa.Array) -> list[Any]:
    """The canonical values of a column; vectors without making a Python number of each of theirs."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_floating(kind.value_type) and not column.flatten().null_count:
        numbers = column.flatten().to_numpy().astype("<f8")
        lengths = column.value_lengths().fill_null(0).to_numpy()
        ends = np.cumsum(lengths)
        vectors = [hashlib.sha256(numbers[end - size : end]).hexdigest() if size else []
                   for end, size in zip(ends, lengths, strict=True)]  # fmt: skip
        return [vector if there else None for vector, there in zip(vectors, column.is_valid().to_pylist(), strict=True)]
    return [canonical(value) for value in column.to_pylist()]


def _lines(connection: duckdb.DuckDBPyConnection, table: str, where: str, values: Sequence[Any]) -> list[str]:
    """The lines of the rows of ``table`` that fulfil ``where``, sorted."""
    naming = NAMING.get(table, tuple(name for name in OTHERS if name in TABLES[table].names))
    columns = [name for name in TABLES[table].names if name not in LEFT_OUT.get(table, ())]
    chosen = ", ".join(f'"{name}"' for name in columns)
    reader = connection.sql(f'SELECT {chosen} FROM "{table}" WHERE {where}', params=list(values)).to_arrow_reader(BATCH)
    found: list[str] = []
    for batch in reader:
        cells = [_cells(batch.column(name)) for name in columns]
        for values_of_row in zip(*cells, strict=True):
            row = dict(zip(columns, values_of_row, strict=True))
            found.append(canonical_json([table, *(row[name] for name in naming), _hash(row)]))
    return sorted(found)


Asked = Callable[[str, list[Any]], list[dict[str, Any]]]


class SetHashes(Protocol):
    """Hashes of the lines of sets that are known already; ``held`` is what the tables hold of the set."""

    def get(self, about: tuple[str, str], pictures: int, held: Sequence[Any]) -> str | None:
        """The hash for a set and descriptor; None where it has to be worked out."""

    def put(self, about: tuple[str, str], pictures: int, held: Sequence[Any], sha256: str) -> None:
        """Keep it."""


_KNOWN = """SELECT reference_set AS name, coalesce(any_value(kind), 'reference') AS kind, count(*) AS pictures,
max(added_at) AS newest, sum(epoch_us(added_at)) AS added FROM "references" WHERE descriptor_name = ?
AND (list_contains(?::VARCHAR[], reference_set) OR kind = ?) GROUP BY ALL ORDER BY ALL"""
_PASSED = """SELECT count(*) AS passed, max(added_at) AS last_passed, sum(epoch_us(added_at)) AS passed_at
FROM passed_over WHERE descriptor_name = ? AND reference_set = ?"""


def record_of(
    connection: duckdb.DuckDBPyConnection, audit_id: str, sets: Sequence[str], hashes: SetHashes | None = None
) -> Record:
    """All that a report of ``audit_id`` about ``sets`` rests on, over a connection that sees the tables it names.

    Those are the tables of KEY_COLUMNS, checkpoints, references and passed_over. Decoys are the background sets that
    the audit's descriptor has described. A set whose hash is among ``hashes`` is not read; without, every one is.
    """

    def ask(sql: str, values: list[Any]) -> list[dict[str, Any]]:
        return connection.sql(sql, params=values).to_arrow_table().to_pylist()

    audits = ask("SELECT * FROM audits WHERE audit_id = ? LIMIT 1", [audit_id])
    descriptor = audits[0]["descriptor"] if audits else None
    tables = {name: Rows(_lines(connection, name, *_of_audit(name, audit_id, sets))) for name in KEY_COLUMNS}
    found = []
    for one in ask(_KNOWN, [descriptor, list(sets), SetKind.background]):
        about, values = (one["name"], descriptor or ""), [descriptor, one["name"]]
        held = [*one.values(), *ask(_PASSED, values)[0].values()]
        del one["newest"], one["added"]
        lines, sha256 = None, hashes.get(about, one["pictures"], held) if hashes else None
        if sha256 is None:
            where = "descriptor_name = ? AND reference_set = ?"
            lines = [line for table in OF_SETS for line in _lines(connection, table, where, values)]
            sha256 = sha256_of_lines(lines)
            if hashes:
                hashes.put(about, one["pictures"], held, sha256)
        if one["name"] in sets:
            found.append(SetRecord(**one, sha256=sha256, lines=lines))
            continue
        where, values = "audit_id = ? AND reference_set = ?", [audit_id, one["name"]]
        [asked] = ask(f"SELECT max(question) AS question FROM memberships WHERE {where}", values)
        scores = Rows(_lines(connection, "memberships", where, values))
        found.append(SetRecord(**one, sha256=sha256, lines=lines, scores=scores, **asked))
    return Record(_inputs(ask, audits[0]) if audits else {}, tables, found)


def _of_audit(table: str, audit_id: str, sets: Sequence[str]) -> tuple[str, list[Any]]:
    if "reference_set" in TABLES[table].names:
        return "audit_id = ? AND list_contains(?::VARCHAR[], reference_set)", [audit_id, list(sets)]
    return "audit_id = ?", [audit_id]


def _inputs(ask: Asked, audit: dict[str, Any]) -> dict[str, Any]:
    """What went into the audit, in plain values. The checkpoint's own row is missing where it was opted out since."""
    rows = ask(
        "SELECT identity, format, bytes, claimed_metadata FROM checkpoints WHERE checkpoint_sha256 = ? "
        "ORDER BY item_id LIMIT 1",
        [audit["checkpoint_sha256"]],
    )
    claimed = rows[0].pop("claimed_metadata") if rows else None
    more = rows[0] | {"claimed_metadata_sha256": _text_hash(claimed)} if rows else {}
    return {
        "checkpoint": {
            "name": audit["checkpoint_name"], "sha256": audit["checkpoint_sha256"],
            "tensors_sha256": audit["tensors_sha256"], **more,
        },
        "base": {"name": audit["base_name"], "revision": audit["base_revision"]},
        "captions": audit["captions"],
        "training_images": {"count": audit["training_images"], "source": audit["training_images_source"]},
        "settings": _plain(audit["settings"]),
        "descriptor": {
            "name": audit["descriptor"], "sha256": descriptor_sha256(audit["descriptor"]),
            "threshold": audit["threshold"], "input_size": audit["descriptor_size"],
        },
        "sampled_with": {
            "versions": _plain(audit["versions"]), "device": audit["device"], "precision": audit["precision"],
            "finished_at": audit["finished_at"].isoformat(),
        },
    }  # fmt: skip


def _plain(text: str) -> Any:
    """The value of our own JSON; the text itself where somebody has made it none."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text


def _text_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


@cache
def descriptor_sha256(name: str) -> str | None:
    """The SHA256 of the file of a descriptor that is pinned or comes with this package; None for others.

    The first 12 digits are in the name of every network.
    """
    from audit.descriptors.kinds import NetworkKind
    from audit.descriptors.networks import file_sha256
    from audit.descriptors.registry import DESCRIPTORS

    for source, kind in DESCRIPTORS.items():
        if isinstance(kind, NetworkKind) and (kind.spec.sha256 or source in DESCRIPTORS.ours):
            digest = kind.spec.sha256 or file_sha256(kind.path())
            if kind.spec.name(digest) == name:
                return digest
    return None


def keys_of(lines: Iterable[str]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """((table, key...), hash) of lines; a line that is none of ours is a key by itself."""
    for line in lines:
        try:
            parts = json.loads(line)
            *key, digest = parts
            yield tuple(json.dumps(one) if isinstance(one, list | dict) else one for one in key), str(digest)
        except (ValueError, TypeError, RecursionError):
            yield (line[:200],), ""
