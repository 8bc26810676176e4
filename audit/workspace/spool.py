"""The spool: sampled images of audits that are not finished."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audit.files import Files


class Spool:
    """Sampled images of an unfinished audit, a whole Parquet file a batch, so that a run can go on where it stopped."""

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.folder = files, folder

    def add(self, first: int, rows: pa.Table) -> None:
        """Keep one batch; ``first`` is the number of its first image."""
        with self.files.writing(f"{self.folder}/{first:08d}.parquet") as file:
            pq.write_table(rows, file, compression="zstd")

    def read(self) -> pa.Table | None:
        """Everything kept so far, or None."""
        paths = [self.files.path(e.key) for e in self.files.list(self.folder) if e.key.endswith(".parquet")]
        tables = [pq.ParquetFile(path, filesystem=self.files.system).read() for path in paths]
        return pa.concat_tables(tables) if tables else None

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
        """The facts that ``finish`` was given, None where it was not called."""
        content = self.files.read(f"{self.folder}/finished.json")
        return json.loads(content) if content else None

    def discard(self) -> None:
        """Remove it."""
        self.files.remove_folder(self.folder)
