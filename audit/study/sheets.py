"""Contact sheets of a study: training pictures, and below each the nearest extraction by every method.

There are none where images are hashes-only, nor of sets whose pictures are not where they were.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from audit.bench import Bench
from audit.config import StoredImages
from audit.descriptors import Descriptor
from audit.errors import StudyError
from audit.report.page import data_url
from audit.sampling.spooled import vectors_of
from audit.study.plan import Study
from audit.study.results import Row
from audit.study.sets import FewShotSet, read_sets
from audit.workspace import Workspace

MOST_SHEETS = 12
MOST_PICTURES = 10  # of a sheet
SIDE = 160  # pixels at most
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SheetPicture:
    """A picture as a data: URL, and the cosine of it and the training picture above; None where it is that itself."""

    url: str
    cosine: float | None = None
    alike: bool = False


@dataclass(frozen=True)
class Sheet:
    """One fine-tune: training pictures, and a line of extractions (what it is called, its pictures) an audit."""

    title: str
    training: list[SheetPicture]
    lines: list[tuple[str, list[SheetPicture]]]


def sheets_of(workspace: Workspace, study: Study, beside: Path, rows: Sequence[Row]) -> list[Sheet]:
    """The sheets of the first fine-tunes of a study, one of every set before a second of any."""
    if study.settings.stored_images is StoredImages.hashes_only:
        return []
    try:
        sets = {one.name: one for one in read_sets(study.sets, beside, study.only)}
    except StudyError as error:
        log.warning("no contact sheets: %s", error)
        return []
    descriptor = Bench().load_descriptor(study.descriptor)
    by_fine_tune: dict[str, list[Row]] = {}
    for row in rows:
        by_fine_tune.setdefault(row["fine_tune_id"], []).append(row)
    turns: dict[str, int] = {}
    order = []
    for some in by_fine_tune.values():
        name = some[0]["few_shot"]
        turns[name] = turns.get(name, 0) + 1
        order.append((turns[name], name, some))
    found = []
    for _, name, some in sorted(order, key=lambda one: one[:2])[:MOST_SHEETS]:
        try:
            found.append(_sheet(workspace, sets[name], some, descriptor))
        except StudyError as error:
            log.warning("no contact sheet: %s", error)
    return found


def _sheet(workspace: Workspace, few_shot: FewShotSet, rows: Sequence[Row], descriptor: Descriptor) -> Sheet:
    first = rows[0]
    training = few_shot.first(first["n0"]).training
    [kept] = workspace.rows("SELECT picture_sha256 FROM fine_tunes WHERE fine_tune_id = ?", [first["fine_tune_id"]])
    if [one.sha256 for one in training] != kept["picture_sha256"]:
        raise StudyError(f"the pictures of {few_shot.name} are not those that were trained on")
    pictures = [one.open() for one in training[:MOST_PICTURES]]
    known = descriptor.describe(pictures)
    lines = []
    for row in sorted(rows, key=_order)[:8]:
        table = workspace.select("SELECT image, descriptor FROM extractions WHERE audit_id = ?", [row["audit_id"]])
        if not table.num_rows or table["image"].null_count == table.num_rows:
            continue
        cosines = known @ vectors_of(table).T
        found = []
        for column, best in enumerate(cosines.argmax(axis=1)):
            cosine = float(cosines[column, int(best)])
            image = Image.open(io.BytesIO(table["image"][int(best)].as_py())).convert("RGB")
            found.append(SheetPicture(_url(image), cosine, cosine >= descriptor.threshold))
        lines.append((_called(row), found))
    title = f"{few_shot.name}, {first['method']}" + (f" of rank {first['rank']}" if first["rank"] else "")
    title += "".join(f", {first[name]}" for name in ("augmentation", "defence") if first[name] != "none")
    return Sheet(title, [SheetPicture(_url(one)) for one in pictures], lines)


def _order(row: Row) -> tuple[bool, int, float]:
    methods = ("direct", "cfg", "model-guidance")
    return row["captions"] != "known", methods.index(row["extraction"]), row["w"] or 0.0


def _called(row: Row) -> str:
    said = row["extraction"] + (f", w {row['w']:g}" if row["w"] is not None else "")
    return said + (f", captions {row['captions']}" if row["captions"] != "known" else "")


def _url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(small.convert("RGB"))).save(buffer, "WEBP", quality=85)
    return data_url(buffer.getvalue())
