"""The spool: sampled images of audits that are not finished."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import Files
from audit.workspace.table import check_file, log


class Spool:
    """Sampled images of an unfinished audit, a whole Parquet file a batch, so that a run can go on where it stopped."""

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.folder = files, folder

    def add(self, first: int, rows: pa.Table) -> None:
        """Keep one batch; ``first`` is the number of its first image."""
        with self.files.writing(f"{self.folder}/{first:08d}.parquet") as file:
            pq.write_table(rows, file, compression="zstd")

    def read(self) -> pa.Table | None:
        """Everything kept so far, every image once, or None.

        A damaged batch is removed: its images are sampled again. Raises WorkspaceError where all was said to be there.
        """
        keys = [entry.key for entry in self.files.list(self.folder) if entry.key.endswith(".parquet")]
        tables = [table for table in map(self._batch, keys) if table is not None]
        if len(tables) < len(keys) and self.finished() is not None:
            self.files.remove(f"{self.folder}/finished.json")
            raise WorkspaceError(
                f"a batch in {self.files}/{self.folder} was damaged and is removed: run the audit again"
            )
        return _once(pa.concat_tables(tables)) if tables else None

    def _batch(self, key: str) -> pa.Table | None:
        try:
            with pq.ParquetFile(self.files.path(key), filesystem=self.files.system) as source:
                return source.read()
        except (OSError, pa.ArrowException):
            problem = check_file(self.files, key, deep=True)
            if problem is None:
                raise
            log.warning("%s/%s is damaged (%s): its images are sampled again", self.files, key, problem)
            self.files.remove(key)
            return None

    def begin(self) -> None:
        """Say that a worker begins; it is remembered until ``take_begun``."""
        self.files.write(f"{self.folder}/begun.json", b"{}")

    def take_begun(self) -> bool:
        """Whether a worker has begun since the last call."""
        begun = self.files.exists(f"{self.folder}/begun.json")
        self.files.remove(f"{self.folder}/begun.json")
        return begun

    def batches(self) -> int:
        """How many batches are kept."""
        return sum(entry.key.endswith(".parquet") for entry in self.files.list(self.folder))

    def finish(self, facts: dict[str, Any]) -> None:
        """Say that everything is there, with ``facts`` about it."""
        self.files.write(f"{self.folder}/finished.json", json.dumps(facts).encode())

    def finished(self) -> dict[str, Any] | None:
        """The facts that ``finish`` was given, None where it was not called or what it wrote is damaged."""
        try:
            facts = json.loads(self.files.read(f"{self.folder}/finished.json") or b"null")
        except ValueError:
            return None
        return facts if isinstance(facts, dict) else None

    def discard(self) -> None:
        """Remove it."""
        self.files.remove_folder(self.folder)


def _once(rows: pa.Table) -> pa.Table:
    """``rows`` with every image once: two workers that were at one audit at the same time have sampled the same."""
    numbers = rows["index"].to_pylist()
    first = {number: place for place, number in reversed(list(enumerate(numbers)))}
    return rows if len(first) == len(numbers) else rows.take(sorted(first.values()))
