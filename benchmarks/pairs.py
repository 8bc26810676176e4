"""What a second look finds: points in common of pictures and their copies, against different pictures of one kind.

    python -m benchmarks.pairs [--workspace DIR] [--json FILE]

Over the testbed's sets, whose pictures have 64 pixels: each picture against what was made of it (JPEG, crops, its
mirror image, blurred), and against others of its set. With a workspace also the extractions of its audits that reach
the threshold, against the others. Exit code 1 where a different picture has as many points as half of the copies.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from audit.demo import ASSETS, set_folder
from audit.references.second_look import SecondLook, look_again
from audit.workspace import Workspace
from benchmarks.tables import table

EVERY = 4  # of the pictures
OTHERS = 9  # of the pairs
MOST_CHANCE = 5  # points that are said to come about by chance
COLUMNS = ["pairs", "5 %", "median", "95 %", "most", "more than 5", "seconds a pair"]


def jpeg(picture: Image.Image) -> Image.Image:
    """At quality 60."""
    with io.BytesIO() as file:
        picture.save(file, "JPEG", quality=60)
        return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def crop(picture: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """A part of so much of the area, somewhere."""
    width, height = (int(side * share**0.5) for side in picture.size)
    left, top = (
        int(rng.integers(0, all_ - some + 1)) for all_, some in zip(picture.size, (width, height), strict=True)
    )
    return picture.crop((left, top, left + width, top + height))


def blurred(picture: Image.Image) -> Image.Image:
    """Of half the size, and enlarged again: what small models' codecs leave."""
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def made(rng: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """What is made of pictures."""
    return {
        "JPEG": jpeg,
        "70 % crop": lambda one: crop(one, 0.7, rng),
        "50 % crop": lambda one: crop(one, 0.5, rng),
        "30 % crop": lambda one: crop(one, 0.3, rng),
        "mirrored, JPEG": lambda one: jpeg(one.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "blurred": blurred,
    }


def row_of(what: str, points: list[int], seconds: float) -> dict[str, Any]:
    """Of some pairs the points in common."""
    low, middle, high = np.quantile(points, [0.05, 0.5, 0.95])
    return {
        "of": what, "pairs": len(points), "5 %": float(low), "median": float(middle), "95 %": float(high),
        "most": max(points), "more than 5": float(np.mean(np.array(points) > MOST_CHANCE)),
        "seconds a pair": seconds / len(points),
    }  # fmt: skip


def measured(what: str, pairs: list[tuple[Image.Image, Image.Image]]) -> dict[str, Any]:
    """Look at pairs of a reference and another picture."""
    started = time.perf_counter()
    found: list[SecondLook] = [look_again(*pair) for pair in pairs]
    return row_of(what, [one.inliers for one in found], time.perf_counter() - started)


def of_testbed() -> list[dict[str, Any]]:
    """A row a kind of copy, and one of different pictures."""
    rng, sets = np.random.default_rng(0), []
    for name in sorted(one.name for one in (ASSETS / "sets").iterdir()):
        files = [one for part in ("train", "control") for one in sorted(set_folder(name, part).glob("*.png"))]
        sets.append([Image.open(one).convert("RGB") for one in files])
    chosen = [one for pictures in sets for one in pictures[::EVERY]]
    rows = [measured(name, [(one, change(one)) for one in chosen]) for name, change in made(rng).items()]
    others = [pair for pictures in sets for pair in list(itertools.combinations(pictures, 2))[::OTHERS]]
    return [*rows, measured("different pictures of one kind", others)]


def of_workspace(workspace: Workspace) -> list[dict[str, Any]]:
    """Of extractions that were matched: by whether they reach the threshold."""
    rows = workspace.rows(
        "SELECT similarity >= threshold AS alike, inliers FROM matches JOIN audits USING (audit_id) "
        "WHERE inliers IS NOT NULL AND position = 1"
    )
    names = {True: "extractions that reach the threshold", False: "extractions below it"}
    points = {alike: [row["inliers"] for row in rows if row["alike"] == alike] for alike in names}
    return [row_of(names[alike], some, float("nan")) for alike, some in points.items() if some]


def main(
    workspace: Annotated[Path | None, typer.Option(help="With finished and matched audits.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Print how many points pairs of pictures have in common."""
    rows = of_testbed()
    if workspace:
        rows += of_workspace(Workspace(workspace, reading=True, create=False))
    texts = [[str(row["of"]), *(f"{row[name]:.3g}" for name in COLUMNS)] for row in rows]
    print(table(["", *COLUMNS], texts))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")
    if rows[6]["most"] >= rows[0]["median"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
