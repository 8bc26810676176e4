"""How near crops come to references that are described whole, and in parts; and how near different pictures come.

    python -m benchmarks.crops [--descriptor NAME] [--json FILE]

Over the testbed's sets, whose pictures have 64 pixels: a crop of every picture, somewhere, against the picture; and
every picture against all others. Exit code 1 where parts do not bring crops of 60 % nearer than wholes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from audit.demo import ASSETS, set_folder
from audit.descriptors import Descriptor, load_descriptor
from audit.references.parts import FIVE, crops
from benchmarks.pairs import crop
from benchmarks.tables import table

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
COLUMNS = ["least", "5 %", "mean", "reach the threshold"]


def pictures_of_testbed() -> tuple[list[Image.Image], np.ndarray]:
    """All pictures, and the number of the set of each."""
    pictures, numbers = [], []
    for number, name in enumerate(sorted(one.name for one in (ASSETS / "sets").iterdir())):
        files = [one for part in ("train", "control") for one in sorted(set_folder(name, part).glob("*.png"))]
        pictures += [Image.open(one).convert("RGB") for one in files]
        numbers += [number] * len(files)
    return pictures, np.array(numbers)


def row_of(what: str, cosines: np.ndarray, threshold: float) -> dict[str, Any]:
    """What is said of some cosines."""
    return {
        "of": what, "pairs": len(cosines), "least": float(cosines.min()), "5 %": float(np.quantile(cosines, 0.05)),
        "mean": float(cosines.mean()), "reach the threshold": float(np.mean(cosines >= threshold)),
    }  # fmt: skip


def apart(what: str, cosines: np.ndarray, sets: np.ndarray, threshold: float) -> dict[str, Any]:
    """What is said of different pictures, by their ``cosines`` [N, N]: an extraction's by row."""
    others = ~np.eye(len(sets), dtype=bool)
    alike = others & (sets[:, None] == sets[None])
    nearest = np.where(others, cosines, -1).max(axis=1)
    return {
        "of": what, "highest": float(cosines[others].max()),
        "99.9 % of pairs of one set": float(np.quantile(cosines[alike], 0.999)),
        "pairs that reach the threshold": int((cosines[others] >= threshold).sum()), "pairs": int(others.sum()),
        "nearest other, median": float(np.median(nearest)), "nearest other, 95 %": float(np.quantile(nearest, 0.95)),
        "pictures with another that reaches it": float(np.mean(nearest >= threshold)),
    }  # fmt: skip


def measured(by: Descriptor) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of crops, and of different pictures."""
    pictures, sets = pictures_of_testbed()
    rng = np.random.default_rng(0)
    whole = by.describe(pictures)
    parts = np.stack([by.describe(crops(one, FIVE)) for one in pictures])
    rows = []
    for share in SHARES:
        made = by.describe([crop(one, share, rng) for one in pictures])
        cosines = (made * whole).sum(axis=1)
        best = np.maximum(cosines, np.einsum("nd,npd->np", made, parts).max(axis=1))
        rows += [row_of(f"{share:.0%} crop, {how}", one, by.threshold) for how, one in
                 (("whole", cosines), ("parts", best))]  # fmt: skip
    cosines = whole @ whole.T
    best = np.maximum(cosines, np.stack([(whole @ one.T).max(axis=1) for one in parts], axis=1))
    return rows, [apart("whole", cosines, sets, by.threshold), apart("parts", best, sets, by.threshold)]


def main(
    descriptor: Annotated[str, typer.Option(help="By which they are described.")] = "nano",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Print how near crops and different pictures are."""
    near, others = measured(load_descriptor(descriptor, "cpu"))
    print(table(["", *COLUMNS], [[row["of"], *(f"{row[name]:.3f}" for name in COLUMNS)] for row in near]))
    names = [name for name in others[0] if name != "of"]
    print(table(["different pictures", *(row["of"] for row in others)],
                [[name, *(f"{row[name]:.4g}" for row in others)] for name in names]))  # fmt: skip
    if json_file:
        json_file.write_text(json.dumps({"crops": near, "different": others}, indent=1) + "\n")
    means = {row["of"]: row["mean"] for row in near}
    if means["60% crop, parts"] <= means["60% crop, whole"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
