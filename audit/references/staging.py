"""What is described of a set that is not whole yet: files beside the tables, which nothing is ever matched with.

A set appears in the table of references when all of it is there, at once. Whoever is stopped before finds here what was
described, by the SHA256 of the pictures' files, and goes on.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audit.errors import ReferenceSetError
from audit.files import Files
from audit.schemas import REFERENCES
from audit.storable import storable_values

log = logging.getLogger(__name__)
FOLDER = "ingest"
ROWS = 512  # of a part, at most
SECONDS = 10.0  # that may pass before what was described is kept
GROUP_ROWS, GROUP_BYTES = 4096, 32 << 20  # that are in memory when a set is written


class Staging:
    """The parts of the set with the key ``key``, as ``about`` says how it is described."""

    def __init__(self, files: Files, key: str, about: str) -> None:
        self.files, self.key = files, key
        told = hashlib.sha256(f"{about} {version('lora-audit')}".encode()).hexdigest()[:12]
        self.folder = f"{FOLDER}/{key}/{told}"
        self.parts: list[str] = []
        self.known: set[bytes] = set()
        self.named: dict[str, str] = {}  # the SHA256 of files by the names that they had
        self._rows: list[dict[str, Any]] = []
        self._since = time.monotonic()
        for part in sorted(self.files.names(self.folder)):
            if part.endswith(".parquet"):
                self._take(f"{self.folder}/{part}")

    def _take(self, part: str) -> None:
        """Know what a part of an earlier process holds; a damaged one is removed."""
        try:
            with pq.ParquetFile(self.files.path(part), filesystem=self.files.system) as source:
                held = source.read(["reference_id", "name"])
                ids, names = held["reference_id"].to_pylist(), held["name"].to_pylist()
        except (OSError, pa.ArrowException) as error:
            log.warning("%s/%s is damaged and made again (%s)", self.files, part, str(error)[:100])
            self.files.remove(part)
            return
        self.parts.append(part)
        self.known |= {bytes.fromhex(one) for one in ids}
        self.named |= dict(zip(names, ids, strict=True))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep rows, within a few seconds on the storage."""
        for row in rows:
            self._rows.append(row)
            self.known.add(bytes.fromhex(row["reference_id"]))
        if len(self._rows) >= ROWS or (self._rows and time.monotonic() - self._since > SECONDS):
            self.flush()

    def flush(self) -> None:
        """Write what is in memory."""
        if self._rows:
            part = f"{self.folder}/{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"
            table = pa.Table.from_pylist(storable_values(self._rows), schema=REFERENCES)
            with self.files.writing(part) as file:
                pq.write_table(table, file, compression="zstd")
            self.parts.append(part)
        self._rows, self._since = [], time.monotonic()

    def rows(self, names: dict[bytes, tuple[str, str | None]], same: dict[str, Any]) -> Iterator[pa.Table]:
        """The rows of the pictures ``names``, (name, metadata) by the SHA256 of the file, each once, in tables of some
        GROUP_BYTES; columns ``same`` of all. Raises ReferenceSetError where one is missing.
        """
        self.flush()
        left = set(names)
        held: list[pa.Table] = []
        for part in self.parts:
            for table in self._groups(part):
                held.append(_chosen(table, names, left, same))
                if sum(one.num_rows for one in held) >= GROUP_ROWS or sum(one.nbytes for one in held) >= GROUP_BYTES:
                    yield pa.concat_tables(held)
                    held = []
        if left:
            raise ReferenceSetError(
                f"{len(left)} of the pictures that were described are not in {self.files}/{self.folder} any more, as "
                "where the same set is added by two at once: run the same command again"
            )
        if held:
            yield pa.concat_tables(held)

    def _groups(self, part: str) -> Iterator[pa.Table]:
        try:
            with pq.ParquetFile(self.files.path(part), filesystem=self.files.system) as source:
                for batch in source.iter_batches(batch_size=ROWS):
                    yield pa.Table.from_batches([batch])
        except FileNotFoundError:
            return  # its pictures are missed
        except (OSError, pa.ArrowException) as error:
            self.files.remove(part)
            raise ReferenceSetError(
                f"{self.files}/{part} was damaged and is removed ({str(error)[:100]}): run the same command again"
            ) from error

    def discard(self) -> None:
        """Remove it, and what was kept of the set under other conditions."""
        forget(self.files, lambda key: key == self.key)


def unfinished(files: Files) -> set[str]:
    """The keys of sets that are half added."""
    return {entry.key.split("/")[1] for entry in files.list(FOLDER, recursive=True)}


def forget(files: Files, of: Callable[[str], bool]) -> bool:
    """Remove what is kept of unfinished sets whose key ``of`` accepts; whether there was any."""
    gone = [key for key in unfinished(files) if of(key)]
    for key in gone:
        files.remove_folder(f"{FOLDER}/{key}")
    return bool(gone)


def _chosen(
    table: pa.Table, names: dict[bytes, tuple[str, str | None]], left: set[bytes], same: dict[str, Any]
) -> pa.Table:
    ids = [bytes.fromhex(one) for one in table["reference_id"].to_pylist()]
    wanted = []
    for one in ids:
        wanted.append(one in left)
        left.discard(one)
    table = table.filter(pa.array(wanted, pa.bool_()))
    told = [names[bytes.fromhex(one)] for one in table["reference_id"].to_pylist()]
    columns: dict[str, Any] = {
        "name": pa.array(storable_values([name for name, _ in told]), pa.string()),
        "metadata": pa.array([about for _, about in told], pa.string()),
    }
    columns |= {
        name: pa.repeat(pa.scalar(value, REFERENCES.field(name).type), table.num_rows) for name, value in same.items()
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), REFERENCES.field(name), column)
    return table
