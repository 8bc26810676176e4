"""Parquet files: pictures within them, as data sets of the hub have them, and vectors that others have computed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from audit.descriptors.pictures import MAX_FILE_BYTES
from audit.errors import ReferenceSetError
from audit.locations import shown_url
from audit.references.folder import SkippedImage
from audit.references.inputs.given import Given, Pictures
from audit.references.inputs.metadata import metadata_text
from audit.schemas import REFERENCES
from audit.states import SetKind
from audit.storable import path_as_text, storable_values
from audit.untrusted.pool import RefusedError, pool

MOST_ROWS = 10_000_000
MOST_BESIDE = 40  # columns that are kept as metadata
ROWS_AT_ONCE, FILES_AT_ONCE = 1024, 8
MOST_BYTES = 400 << 20  # that an answer holds
VECTORS = ("embedding", "embeddings", "vector", "vectors", "descriptor", "features")
NAMES = ("name", "id", "key", "url", "image_path", "path", "file_name", "filename")
HASH = re.compile(r"[0-9a-f]{64}")


def is_parquet(path: Path) -> bool:
    """Whether ``path`` is a Parquet file by its ending."""
    return path.suffix.lower() == ".parquet" and path.is_file()


@dataclass(frozen=True)
class Columns:
    """What a Parquet file has: its rows, and the names of its columns by kind."""

    rows: int
    kinds: dict[str, str]

    def of(self, *kinds: str) -> list[str]:
        """The columns of one of these kinds."""
        return [name for name, kind in self.kinds.items() if kind in kinds]

    @property
    def pictures(self) -> str | None:
        """The column of pictures: a struct of bytes, as the hub has it, or bytes called after a format."""
        named = [one for one in self.of("binary") if one.lower() in ("image", "jpg", "jpeg", "png", "webp", "bytes")]
        return next(iter(self.of("picture") + named), None)

    @property
    def vectors(self) -> str | None:
        """The column of vectors: the one so called, or the only one."""
        found = self.of("vector")
        called = [one for one in found if one.lower() in VECTORS]
        return called[0] if called else found[0] if len(found) == 1 else None

    @property
    def beside(self) -> list[str]:
        """The columns that are names and metadata."""
        return self.of("text", "number")[:MOST_BESIDE]


def columns_of(path: Path) -> Columns:
    """What the file has. Raises ReferenceSetError where it is no Parquet file."""
    answer = _asked("parquet", path, {}, 0)[0]
    try:
        return Columns(int(answer["rows"]), {str(name): str(kind) for name, kind in answer["columns"]})
    except (KeyError, TypeError, ValueError) as error:
        raise ReferenceSetError(f"{path} is read by a process that answers nonsense ({error})") from error


def parquet_pictures(path: Path, columns: Columns | None = None, prefix: str = "") -> Pictures:
    """The pictures of a Parquet file. Raises ReferenceSetError where it has no column of pictures."""
    known = columns or columns_of(path)
    if known.pictures is None:
        raise ReferenceSetError(f"{path} has no column of pictures: an image with bytes, or bytes called image or jpg")
    return Pictures(str(path), _pictures(path, known, known.pictures, prefix), known.rows)


def _pictures(path: Path, known: Columns, column: str, prefix: str) -> Iterator[Given]:
    start = 0
    label = f"{prefix}{path_as_text(path.name)}"
    while start < known.rows:
        said = {"column": column, "beside": known.beside, "count": FILES_AT_ONCE, "each": MAX_FILE_BYTES}
        answer, data = _asked("parquet-pictures", path, {**said, "start": start}, MOST_BYTES)
        place, rows = 0, _count(answer, path, "sizes", "paths")
        if sum(size or 0 for size in answer["sizes"]) != len(data):
            raise ReferenceSetError(f"{path} is read by a process that answers other pictures than it says")
        for number in range(rows):
            size = answer["sizes"][number]
            about = {name: values[number] for name, values in answer["beside"].items() if values[number] is not None}
            named = answer["paths"][number] or next((about[one] for one in NAMES if one in about), None)
            name = f"{label}/{start + number}" + (f" {path_as_text(shown_url(str(named)))[:200]}" if named else "")
            if size is None:
                yield Given(name, refused=f"it has no picture, or one larger than {MAX_FILE_BYTES // 1_000_000} MB")
                continue
            content, place = bytes(data[place : place + size]), place + size
            try:
                yield Given(name, content, metadata_text(about))
            except ValueError as error:
                yield Given(name, refused=str(error))
        start += rows


@dataclass
class Embeddings:
    """Vectors of Parquet files, as rows of the table of references, a part at a time; what was passed over so far."""

    name: str
    files: Sequence[Path]
    described_by: str
    width: int
    passed: list[SkippedImage] = field(default_factory=list)
    rows: int = 0

    def parts(self) -> Iterator[pa.Table]:
        """Tables of rows. Raises ReferenceSetError for a file without vectors, and where there are too many."""
        seen: set[bytes] = set()
        now = datetime.now(UTC)
        for path in self.files:
            known = columns_of(path)
            column = known.vectors
            if column is None:
                there = ", ".join(known.of("vector")) or "none"
                raise ReferenceSetError(
                    f"{path} has no column of vectors called {', '.join(VECTORS)}, nor a single one (columns of "
                    f"vectors: {there})"
                )
            if self.rows + known.rows > MOST_ROWS:
                raise ReferenceSetError(f"{self.name}: more than {MOST_ROWS} vectors; add them as several sets")
            start = 0
            while start < known.rows:
                said = {"column": column, "beside": known.beside + known.of("binary")[:2], "count": ROWS_AT_ONCE}
                answer, data = _asked(
                    "parquet-vectors", path, {**said, "start": start, "width": self.width}, MOST_BYTES
                )
                rows = _count(answer, path, "widths")
                found = self._rows(path, start, rows, answer, data, seen)
                if found:
                    same = {"reference_set": self.name, "descriptor_name": self.described_by, "added_at": now,
                            "kind": SetKind.reference}  # fmt: skip
                    yield pa.Table.from_pylist(storable_values([one | same for one in found]), schema=REFERENCES)
                self.rows += len(found)
                start += rows
        if not self.rows:
            why = "; ".join(f"{one.name}: {one.reason}" for one in self.passed[:3]) or "they have no rows"
            raise ReferenceSetError(f"{self.name}: no vector of {len(self.files)} files can be used ({why})")

    def _rows(
        self, path: Path, start: int, number: int, answer: dict[str, Any], data: bytearray, seen: set[bytes]
    ) -> list[dict[str, Any]]:
        widths = answer["widths"]
        right = sum(one == self.width for one in widths)
        if len(data) != 4 * self.width * right:
            raise ReferenceSetError(f"{path} is read by a process that answers other rows than it says")
        vectors = np.frombuffer(data, np.float32).reshape(right, self.width)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        found, place = [], 0
        for row in range(number):
            label = f"{path_as_text(path.name)}, row {start + row}"
            try:
                if widths[row] != self.width:
                    told = "no vector" if widths[row] is None else f"a vector of {widths[row]} numbers"
                    raise ValueError(f"{told}: {self.described_by} has {self.width}")
                place += 1
                about = {name: values[row] for name, values in answer["beside"].items() if values[row] is not None}
                made = _row(vectors[place - 1], float(lengths[place - 1]), about, f"row {start + row}")
                digest = bytes.fromhex(made["reference_id"])
                if digest in seen:
                    raise ValueError("its id, or its name and vector, are those of a row before")
                seen.add(digest)
                found.append(made)
            except ValueError as error:
                self.passed.append(SkippedImage(label, str(error)))
        return found


def _row(vector: np.ndarray, length: float, about: dict[str, Any], otherwise: str) -> dict[str, Any]:
    """Raises ValueError for a vector that is no direction, and metadata that is too large."""
    if not np.isfinite(length):
        raise ValueError("its vector is not finite")
    if length <= 1e-6:
        raise ValueError("its vector is zero, and near to nothing")
    lower = {name.lower(): value for name, value in about.items()}
    name = path_as_text(
        shown_url(str(next((lower[one] for one in NAMES if lower.get(one) not in (None, "")), otherwise)))
    )[:200]
    told = lower.get("sha256")
    digest = told.lower() if isinstance(told, str) and HASH.fullmatch(told.lower()) else None
    made = hashlib.sha256(b"vector " + name.encode("utf-8", "replace") + vector.tobytes()).hexdigest()
    row: dict[str, Any] = {
        "reference_id": digest or made,
        "name": name, "descriptor": (vector / length).astype(np.float32),
        "width": _side(lower.get("width")), "height": _side(lower.get("height")),
        "metadata": metadata_text({one: value for one, value in about.items() if one.lower() not in ("pdq", "sha256")}),
    }  # fmt: skip
    packed = lower.get("pdq") or lower.get("pdq_hash")
    if isinstance(packed, str) and HASH.fullmatch(packed.lower()):
        quality = lower.get("pdq_quality", 100)
        row |= {"pdq": bytes.fromhex(packed), "pdq_quality": int(quality) if isinstance(quality, int) else 0}
    return row


def _side(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < 1 << 20 else None


def _count(answer: dict[str, Any], path: Path, *lists: str) -> int:
    """How many rows are answered, with so many values in each of ``lists`` and in all that stands beside."""
    rows, beside = answer.get("rows"), answer.get("beside")
    if type(rows) is not int or rows < 1 or not isinstance(beside, dict):
        raise ReferenceSetError(f"{path} is read by a process that answers no rows")
    columns = [*(answer.get(name) for name in lists), *beside.values()]
    if not all(isinstance(one, list) and len(one) == rows for one in columns):
        raise ReferenceSetError(f"{path} is read by a process that answers other rows than it says")
    sizes = [one for name in lists if name != "paths" for one in answer[name] if one is not None]
    if not all(type(one) is int and one >= 0 for one in sizes):
        raise ReferenceSetError(f"{path} is read by a process that answers no sizes")
    return rows


def _asked(parser: str, path: Path, said: dict[str, Any], most: int) -> tuple[dict[str, Any], bytearray]:
    file: IO[bytes]
    try:
        with path.open("rb") as file:
            key = (
                f"{path.resolve()} {path.stat().st_mtime_ns} {sorted(one for one in said.items() if one[0] != 'start')}"
            )
            reply = pool().ask(parser, {**said, "key": key}, b"", [file], most)
    except OSError as error:
        raise ReferenceSetError(f"{path} cannot be read: {error.strerror}") from error
    except RefusedError as error:
        raise ReferenceSetError(f"{path}: {error}") from error
    if not isinstance(reply.answer, dict):
        raise ReferenceSetError(f"{path} is read by a process that answers nonsense")
    return reply.answer, reply.data
