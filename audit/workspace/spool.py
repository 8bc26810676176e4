"""The spool: sampled images of audits that are not finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import Files
from audit.workspace.table import check_file, log

BATCH = "raw-"  # how the names of batches begin; those of older versions, which held PNGs, are sampled again


class Spool:
    """Sampled images of an unfinished audit, a whole Parquet file a batch, so that a run can go on where it stopped.

    ``batch`` is how the names of its batches begin: losses are kept beside the images under another one.

    Pixels are kept as they are: most are thrown away before long, and compressing them would take longer than writing.
    """

    def __init__(self, files: Files, folder: str, batch: str = BATCH) -> None:
        self.files, self.folder, self.batch = files, folder, batch

    def add(self, first: int, rows: pa.Table) -> None:
        """Keep one batch; ``first`` is the number of its first image, or of the batch."""
        plain = [name for name in rows.schema.names if name != "image"]
        packed = {name: "none" if name == "image" else "zstd" for name in rows.schema.names}
        with self.files.writing(f"{self.folder}/{self.batch}{first:08d}.parquet") as file:
            pq.write_table(rows, file, compression=packed, use_dictionary=plain, write_statistics=plain)

    def read(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """What is kept so far, a batch at a time, of all columns or of some.

        A damaged batch is removed: its images are sampled again. Raises WorkspaceError where all images were said to be
        there.
        """
        for key in self._batches():
            table = self._batch(key, columns)
            if table is not None:
                yield table
            elif self.batch == BATCH and self.finished() is not None:
                self.files.remove(f"{self.folder}/extracted.json")
                raise WorkspaceError(
                    f"a batch in {self.files}/{self.folder} was damaged and is removed: run the audit again"
                )

    def forget(self, column: str, values: pa.Array) -> None:
        """Remove the batches that have one of ``values`` in ``column``, and damaged ones: they are made again."""
        for key in self._batches():
            table = self._batch(key, [column])
            if table is not None and pc.any(pc.is_in(table[column], values)).as_py():
                self.files.remove(key)

    def indices(self) -> set[int]:
        """The numbers of the images that are kept."""
        return {index for rows in self.read(["index"]) for index in rows["index"].to_pylist()}

    def _batches(self) -> list[str]:
        keys = [entry.key for entry in self.files.list(self.folder)]
        return sorted(key for key in keys if key.rpartition("/")[2].startswith(self.batch))

    def _batch(self, key: str, columns: list[str] | None) -> pa.Table | None:
        try:
            with pq.ParquetFile(self.files.path(key), filesystem=self.files.system) as source:
                return source.read(columns)
        except (OSError, pa.ArrowException):
            problem = check_file(self.files, key, deep=True)
            if problem is None:
                raise
            log.warning("%s/%s is damaged (%s): its images are sampled again", self.files, key, problem)
            self.files.remove(key)
            return None

    def clear(self) -> None:
        """Remove the batches, and nothing else."""
        for key in self._batches():
            self.files.remove(key)

    def begin(self) -> None:
        """Say that a worker begins; it is remembered until ``take_begun``."""
        self.files.write(f"{self.folder}/begun.json", b"{}")

    def take_begun(self) -> bool:
        """Whether a worker has begun since the last call."""
        begun = self.files.exists(f"{self.folder}/begun.json")
        self.files.remove(f"{self.folder}/begun.json")
        return begun

    def exists(self) -> bool:
        """Whether there is anything of it."""
        return bool(self.files.names(self.folder))

    def batches(self) -> int:
        """How many batches are kept."""
        return len(self._batches())

    def keep_precision(self, precision: str) -> None:
        """Remember what is sampled in, so that all images of an audit are of one precision."""
        self.files.write(f"{self.folder}/precision.json", json.dumps(precision).encode())

    def precision(self) -> str | None:
        """What was sampled in so far, where it was kept."""
        try:
            found = json.loads(self.files.read(f"{self.folder}/precision.json") or b"null")
        except ValueError:
            return None
        return found if isinstance(found, str) else None

    def finish(self, facts: dict[str, Any]) -> None:
        """Say that everything is there, with ``facts`` about it."""
        self.files.write(f"{self.folder}/extracted.json", json.dumps(facts).encode())

    def finished(self) -> dict[str, Any] | None:
        """The facts that ``finish`` was given, None where it was not called or what it wrote is damaged."""
        try:
            facts = json.loads(self.files.read(f"{self.folder}/extracted.json") or b"null")
        except ValueError:
            return None
        return facts if isinstance(facts, dict) else None

    def discard(self) -> None:
        """Remove it."""
        self.files.remove_folder(self.folder)
