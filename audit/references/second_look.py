"""A second look at pairs of pictures: do their local features agree in one geometry?

A global descriptor says how alike two pictures are as a whole. Here the points of a reference (SIFT, Lowe 2004) are
looked for in an extraction, by the ratio test, one to one, and those are counted that one similarity transform (turn,
size, place) puts where they are found, by RANSAC. The mirrored reference is looked at, too. The count is a further
piece of evidence beside a match; no verdict follows from it.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image

from audit.descriptors.pictures import open_image

log = logging.getLogger(__name__)
INSTALLED = importlib.util.find_spec("cv2") is not None
MOST_PAIRS = 24  # of an audit and set: those that are alike, then the nearest
NEAREST = 4  # that are looked at where none is alike
LEAST_SIDE, MOST_SIDE = 256, 512  # pixels: smaller pictures are enlarged, larger ones made smaller
FEATURES = 1000  # of a picture, the strongest
CONTRAST = 0.03
RATIO = 0.8  # of the distances to the nearest and the second nearest feature
REACH = 4.0  # pixels from where the transform puts a point
ROUNDS = 2000  # of RANSAC
SCALES = (0.2, 5.0)  # that a transform may have: others come of points that lie in one place


@dataclass(frozen=True)
class SecondLook:
    """How many points agree (``inliers``), the share of the reference's area that they span, and whether it was
    mirrored.
    """

    inliers: int
    coverage: float
    mirrored: bool


def looked_at_again(connection: duckdb.DuckDBPyConnection, matches: pa.Table, descriptor_name: str) -> pa.Table:
    """Rows of matches with what a second look finds of those that are alike, and of the nearest.

    Over a connection that sees extractions and references; of pictures that are not kept nothing is found. Without
    OpenCV the rows stay as they are.
    """
    chosen = chosen_pairs(matches) if INSTALLED else []
    if not chosen:
        return matches
    rows = matches.take(pa.array(chosen)).select(["audit_id", "rank", "reference_set", "reference_id"]).to_pylist()
    known = _thumbnails(connection, rows, descriptor_name)
    columns: dict[str, list[Any]] = {name: matches[name].to_pylist() for name in ("inliers", "coverage", "mirrored")}
    audit_id, drawn = "", {}
    for place, row in zip(chosen, rows, strict=True):
        if row["audit_id"] != audit_id:  # rows are by audit: the pictures of one are in memory at a time
            audit_id = row["audit_id"]
            drawn = _images(connection, audit_id, [one["rank"] for one in rows if one["audit_id"] == audit_id])
        first, second = known.get((row["reference_set"], row["reference_id"])), drawn.get(row["rank"])
        if first is None or second is None:
            continue
        try:
            found = look_again(open_image(first), open_image(second))
        except ValueError as error:
            log.warning("no second look at %s: %s", row["reference_id"], error)
            continue
        for name, values in columns.items():
            values[place] = getattr(found, name)
    for name, values in columns.items():
        at = matches.schema.get_field_index(name)
        matches = matches.set_column(at, matches.schema.field(name), pa.array(values, matches.schema.field(name).type))
    return matches


def chosen_pairs(matches: pa.Table) -> list[int]:
    """The numbers of the rows that are looked at: of each audit and set those that are alike, and the nearest."""
    of: dict[tuple[str, str], list[tuple[bool, float, int]]] = {}
    names = ("audit_id", "reference_set", "evidence", "similarity")
    for number, row in enumerate(matches.select(list(names)).to_pylist()):
        about = row["audit_id"], row["reference_set"]
        of.setdefault(about, []).append((row["evidence"] == "none", -row["similarity"], number))
    found: list[int] = []
    for some in of.values():
        alike = sum(not unlike for unlike, _, _ in some)
        found += [number for _, _, number in sorted(some)[: min(max(alike, NEAREST), MOST_PAIRS)]]
    return sorted(found)


def _images(connection: duckdb.DuckDBPyConnection, audit_id: str, ranks: list[int]) -> dict[int, bytes]:
    """The pictures of an audit's extractions that are kept, as files, by rank."""
    sql = """SELECT rank, image FROM extractions
    WHERE audit_id = ? AND list_contains(?::INTEGER[], rank) AND image IS NOT NULL"""
    return dict(connection.sql(sql, params=[audit_id, ranks]).fetchall())


def _thumbnails(
    connection: duckdb.DuckDBPyConnection, rows: list[dict[str, Any]], descriptor_name: str
) -> dict[tuple[str, str], bytes]:
    """The pictures of references that are kept, as files, by set and id."""
    sql = """SELECT reference_set, reference_id, thumbnail FROM "references" WHERE descriptor_name = ?
    AND list_contains(?::VARCHAR[], reference_set) AND list_contains(?::VARCHAR[], reference_id)
    AND thumbnail IS NOT NULL"""
    sets, ids = (sorted({row[name] for row in rows}) for name in ("reference_set", "reference_id"))
    found = connection.sql(sql, params=[descriptor_name, sets, ids]).fetchall()
    return {(name, one): thumbnail for name, one, thumbnail in found}


def look_again(reference: Image.Image, extraction: Image.Image) -> SecondLook:
    """Look for the points of ``reference`` in ``extraction``; the same pictures have the same answer."""
    first, second = _grey(reference), _features(_grey(extraction))
    plain = _agreeing(first, second, False)
    mirrored = _agreeing(np.ascontiguousarray(first[:, ::-1]), second, True)
    return mirrored if mirrored.inliers > plain.inliers else plain


def _grey(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W], its shorter side of LEAST_SIDE pixels or more, its longer one of MOST_SIDE at most."""
    short, long = sorted(picture.size)
    factor = min(max(LEAST_SIDE / short, 1.0), MOST_SIDE / long)
    if factor != 1.0:
        width, height = (max(round(side * factor), 1) for side in picture.size)
        how = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
        picture = picture.convert("RGB").resize((width, height), how)
    return np.asarray(picture.convert("L"))


Features = tuple[np.ndarray, np.ndarray]  # places [F, 2] and descriptors [F, 128], float32


def _features(grey: np.ndarray) -> Features:
    import cv2

    cv2.setNumThreads(1)  # several find the same points in another order
    points, described = cv2.SIFT.create(nfeatures=FEATURES, contrastThreshold=CONTRAST).detectAndCompute(grey, None)
    if described is None:
        return np.empty((0, 2), np.float32), np.empty((0, 128), np.float32)
    return np.array([point.pt for point in points], np.float32), described


def _agreeing(grey: np.ndarray, there: Features, mirrored: bool) -> SecondLook:
    """What of a reference is found again in ``there``."""
    import cv2

    nothing = SecondLook(0, 0.0, mirrored)
    here = _features(grey)
    if min(len(here[0]), len(there[0])) < 4:
        return nothing
    pairs = _paired(here[1], there[1])
    if len(pairs) < 4:
        return nothing
    source, target = here[0][pairs[:, 0]], there[0][pairs[:, 1]]
    cv2.setRNGSeed(0)
    transform, agrees = cv2.estimateAffinePartial2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=REACH, maxIters=ROUNDS, confidence=0.995
    )
    if transform is None or not SCALES[0] <= float(np.hypot(transform[0, 0], transform[1, 0])) <= SCALES[1]:
        return nothing
    places = np.unique(np.round(source[agrees.ravel() > 0] / 2), axis=0)  # several features of a place are one point
    spanned = float(cv2.contourArea(cv2.convexHull(2 * places))) if len(places) > 2 else 0.0
    return SecondLook(len(places), round(min(spanned / grey.size, 1.0), 4), mirrored)


def _paired(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Numbers of features [P, 2] that are each other's: by the ratio test, and of several to one the nearest."""
    squared = (here**2).sum(1)[:, None] + (there**2).sum(1)[None] - 2 * (here @ there.T)
    two = np.argpartition(squared, 1, axis=1)[:, :2]
    distances = np.sqrt(np.maximum(np.take_along_axis(squared, two, axis=1), 0))
    order = distances.argsort(axis=1, kind="stable")
    nearest = np.take_along_axis(two, order[:, :1], axis=1)[:, 0]
    distances = np.take_along_axis(distances, order, axis=1)
    passed = np.flatnonzero(distances[:, 0] < RATIO * distances[:, 1])
    passed = passed[np.lexsort((passed, distances[passed, 0]))]
    once = np.sort(np.unique(nearest[passed], return_index=True)[1])
    return np.stack([passed[once], nearest[passed[once]]], axis=1)
