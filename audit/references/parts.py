"""References described in parts, too: crops at fixed places, to which an extraction is near that shows a crop of one.

The similarity of such a reference is the highest of its whole and its parts. The highest of six is higher by chance
than one: so decoys and control generations are compared in the same way, and a set is weighed with decoys alone that
are described in the same parts. What the descriptor's fixed threshold calls a match follows from wholes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from audit.errors import ReferenceSetError
from audit.references.index import Bank
from audit.references.index.bank import UNKNOWN, unit_vectors
from audit.sampling.spooled import vectors_of

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the width and height
FIVE = "five-70"
_SIDE = 0.7**0.5  # of a part, as a share of the picture's: 70 % of the area
_REST = 1 - _SIDE
PLACES: dict[str, Box] = {
    "the centre": (_REST / 2, _REST / 2, 1 - _REST / 2, 1 - _REST / 2),
    "the top left": (0.0, 0.0, _SIDE, _SIDE),
    "the top right": (_REST, 0.0, 1.0, _SIDE),
    "the bottom left": (0.0, _REST, _SIDE, 1.0),
    "the bottom right": (_REST, _REST, 1.0, 1.0),
}
LAYOUTS: dict[str, list[Box]] = {FIVE: list(PLACES.values())}
MOST = 20_000  # references of a set with parts, whose vectors are in memory: 200 MiB at 512 numbers each
BLOCK = 1024  # pictures, or pairs, at a time
_LAYOUTS = """SELECT DISTINCT coalesce(parts_layout, '') AS layout FROM "references"
WHERE reference_set = ? AND descriptor_name = ?"""
_PARTS = 'SELECT reference_id, parts FROM "references" WHERE reference_set = ? AND descriptor_name = ?'


def crops(picture: Image.Image, layout: str | None) -> list[Image.Image]:
    """The parts of ``picture``; none without a layout."""
    sides = np.array([picture.width, picture.height] * 2)
    boxes = [np.rint(np.array(box) * sides).astype(int).tolist() for box in LAYOUTS[layout]] if layout else []
    return [picture.crop(tuple(box)) for box in boxes]


def place_of(part: Sequence[float]) -> str:
    """A part in words, of its box."""
    near = {name: float(np.abs(np.array(box) - np.array(part)).max()) for name, box in PLACES.items()}
    return min(near, key=lambda name: near[name])


def frame_of(part: Sequence[float] | None, width: int | None, height: int | None) -> str | None:
    """CSS of a frame around ``part`` of a picture that is shown whole in the middle of a square."""
    if not part or not width or not height:
        return None
    sides = np.array([width, height]) / max(width, height)
    start = (1 - sides) / 2 + sides * np.array(part[:2])
    values = (*start, *(sides * (np.array(part[2:]) - np.array(part[:2]))))
    names = ("left", "top", "width", "height")
    return "; ".join(f"{name}: {100 * value:.2f}%" for name, value in zip(names, values, strict=True))


@dataclass(frozen=True)
class Parts:
    """The P parts of the N references of a bank, in its order: unit ``vectors`` float32 [N, P, D]."""

    layout: str
    vectors: np.ndarray

    @property
    def boxes(self) -> list[Box]:
        """Where they are."""
        return LAYOUTS[self.layout]

    @cached_property
    def bank(self) -> Bank:
        """All parts as references of their own: those of a reference follow each other."""
        number, each, width = self.vectors.shape
        rows = number * each
        return Bank(
            pa.array(np.arange(rows)).cast(pa.string()), self.vectors.reshape(rows, width),
            np.zeros((rows, 4), np.uint64), np.full(rows, UNKNOWN, np.int16), np.full(rows, UNKNOWN, np.int32),
        )  # fmt: skip

    def nearest(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """(query, row), int64 [K] each: among them are the ``top`` references whose best parts are nearest."""
        each = self.vectors.shape[1]
        near = self.bank.nearest(queries, top * each)  # of one reference there are no more than ``each`` before it
        return near.query, near.row // each

    def cosines(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of unit ``queries`` float32 [K, D] to the parts of ``rows`` [K], pair by pair: float64 [K, P]."""
        found = [np.empty((0, self.vectors.shape[1]))]
        for start in range(0, len(rows), BLOCK):
            some = slice(start, start + BLOCK)
            found.append(
                np.einsum("kd,kpd->kp", queries[some].astype(np.float64), self.vectors[rows[some]].astype(np.float64))
            )
        return np.clip(np.concatenate(found), -1, 1)

    def best(self, queries: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Of each of ``rows`` (of all) the highest cosine of a part to one of ``queries``, unit float32 [Q, D]; NaN
        without any.
        """
        rows = np.arange(len(self.vectors)) if rows is None else rows
        if not len(queries):
            return np.full(len(rows), np.nan, np.float32)
        found = [np.empty(0, np.float32)]
        for start in range(0, len(rows), BLOCK):
            found.append((self.vectors[rows[start : start + BLOCK]] @ queries.T).max(axis=(1, 2)))
        return np.concatenate(found)


def open_parts(connection: duckdb.DuckDBPyConnection, bank: Bank, name: str, descriptor_name: str) -> Parts | None:
    """The parts of the references ``bank`` of the set ``name``; None where it has none.

    ``connection`` sees the table of references. Raises ReferenceSetError where some references have parts and others
    not, or the parts are none of this version's, and for a set of more than MOST.
    """
    about = [name, descriptor_name]
    layouts = [row[0] for row in connection.sql(_LAYOUTS, params=about).fetchall()]
    if layouts in ([], [""]):
        return None
    if len(layouts) > 1 or layouts[0] not in LAYOUTS:
        told = "some of its pictures are described in parts, and others not, or in others"
        if len(layouts) == 1:
            told = f"its pictures are described in parts that this version does not know ({layouts[0][:40]!r})"
        raise ReferenceSetError(f"the reference set {name!r} cannot be compared: {told}; add it again")
    require_few(len(bank), name)
    rows = connection.sql(_PARTS, params=about).to_arrow_table()
    each, width = len(LAYOUTS[layouts[0]]), bank.vectors.shape[1]
    lengths = pc.list_value_length(rows["parts"]).fill_null(0)
    if pc.unique(lengths).to_pylist() != [each * width]:
        raise ReferenceSetError(f"the reference set {name!r} has not {each} parts of every picture: add it again")
    place = pc.index_in(bank.ids, value_set=rows["reference_id"])
    flat = rows["parts"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    unit = unit_vectors(flat, [f"a part of {one}" for one in rows["reference_id"].to_pylist() for _ in range(each)])
    return Parts(layouts[0], unit.reshape(-1, each, width)[place.to_numpy(zero_copy_only=False)])


def require_few(pictures: int, name: str) -> None:
    """Raise ReferenceSetError for a set that is too large to be described in parts."""
    if pictures > MOST:
        raise ReferenceSetError(
            f"{name}: sets described in parts have {MOST} pictures at most, as their vectors are held in memory: add "
            "it without --parts, or as several sets"
        )


def parts_of(table: pa.Table) -> np.ndarray:
    """The parts of rows of references [N], each unit float32 [P, D], or None. Raises ReferenceSetError for parts that
    are none of this version's.
    """
    found = np.empty(table.num_rows, object)
    described = np.flatnonzero(table["parts"].is_valid().to_numpy())
    width = vectors_of(table).shape[1] if len(described) else 0
    layouts = layouts_of(table)
    for number in described.tolist():
        flat = table["parts"][number].values.to_numpy(zero_copy_only=False)
        if layouts[number] not in LAYOUTS or len(flat) != width * len(LAYOUTS[layouts[number]]):
            raise ReferenceSetError(
                f"the background {table['reference_set'][number].as_py()!r} is described in parts that this version "
                "does not know: add it again"
            )
        found[number] = flat.reshape(-1, width).astype(np.float32)
    return found


def layouts_of(table: pa.Table) -> np.ndarray:
    """In what parts rows of references are described [N]; an empty text for none."""
    return np.array(table["parts_layout"].fill_null("").to_pylist(), object)


def best_of(vectors: np.ndarray, parts: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Of pictures, unit ``vectors`` [N, D] with ``parts`` [N] as ``parts_of`` has them, the highest cosine of the whole
    or a part to one of ``queries`` [Q, D]: [N]; NaN without any.
    """
    if not len(queries) or not len(vectors):
        return np.full(len(vectors), np.nan)
    blocks = [vectors[start : start + BLOCK] @ queries.T for start in range(0, len(vectors), BLOCK)]
    found = np.concatenate([block.max(axis=1) for block in blocks])
    for number, one in enumerate(parts):
        if one is not None:
            found[number] = max(found[number], (one @ queries.T).max())
    return found
