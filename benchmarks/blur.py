"""Why the judge's figures are what they are: what the codec, the choice of the representatives and blur take.

    python -m benchmarks.blur extraction.json --workspace DIR        # of a finished benchmarks.extraction

For every row of the default clustering and both views of SSCD: AS of the extractions; of all sampled images, which no
choice of representatives can pass; of the extractions after an unsharp mask; and of the extractions against the
training images as the codec gives them back. Sharpness is the standard deviation of the Laplacian, in levels of 255, of
the training images, of these through the codec, and of the extraction that is nearest to each.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageFilter

from audit.demo import ASSETS, load_set
from audit.models.base import load_vae, locate_base
from audit.models.codec import Codec
from audit.workspace import Workspace
from benchmarks.judge import best_of, views

MASK = ImageFilter.UnsharpMask(radius=1, percent=150, threshold=0)
EXTRACTIONS = "SELECT image FROM extractions WHERE audit_id = ? ORDER BY rank"
GENERATIONS = 'SELECT image FROM generations WHERE audit_id = ? ORDER BY "index"'


def pictures(workspace: Workspace, query: str, audit_id: str) -> np.ndarray:
    """uint8 [N, H, W, 3] of an audit. Raises typer.BadParameter where they were not kept."""
    pngs = workspace.select(query, [audit_id])["image"].to_pylist()
    if not pngs or None in pngs:
        raise typer.BadParameter(f"not all images of audit {audit_id} were kept: run benchmarks.extraction in full")
    return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in pngs])


def sharpness(images: np.ndarray) -> float:
    """The mean over uint8 [N, H, W, 3] of the standard deviation of the Laplacian of the grey picture."""
    grey = images.astype(np.float32).mean(axis=-1)
    beside = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float((4 * grey[:, 1:-1, 1:-1] - beside).std(axis=(1, 2)).mean())


def figures(row: dict[str, Any], workspace: Workspace, codec: Codec) -> dict[str, float]:
    """What is printed of one row."""
    training = load_set(row["set"], "train")
    through = codec.reconstruct(training)
    extracted = pictures(workspace, EXTRACTIONS, row["audit_id"])
    sampled = pictures(workspace, GENERATIONS, row["audit_id"])
    sharpened = [Image.fromarray(one).filter(MASK) for one in extracted]
    found: dict[str, float] = {}
    for view in views():
        known, vectors = view.descriptor.describe(training), view.descriptor.describe(extracted)
        best, of_all = best_of(known, vectors), best_of(known, view.descriptor.describe(sampled))
        if view.name == "native":
            nearest = extracted[(known @ vectors.T).argmax(axis=1)]
        found |= {
            f"{view.name} AS": float(best.mean()),
            f"{view.name} A-ESR": float((best > view.threshold).mean()),
            f"{view.name} all AS": float(of_all.mean()),
            f"{view.name} all A-ESR": float((of_all > view.threshold).mean()),
            f"{view.name} sharpened AS": float(best_of(known, view.descriptor.describe(sharpened)).mean()),
            f"{view.name} AS to codec": float(best_of(view.descriptor.describe(through), vectors).mean()),
        }
    parts = {"training": training, "codec": through, "extraction": nearest}
    return found | {f"sharpness {name}": sharpness(images) for name, images in parts.items()}


def main(
    rows: Annotated[Path, typer.Argument(help="JSON file of benchmarks.extraction.")],
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    workspace: Annotated[Path, typer.Option(help="Its workspace.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Print a Markdown table, a row a checkpoint and method."""
    from benchmarks.tables import table

    torch.set_num_threads(1)
    codec, opened = Codec(load_vae(locate_base(str(base)))), Workspace(workspace)
    mine = [row for row in json.loads(rows.read_text()) if row["clustering"] == "default"]
    found = [figures(row, opened, codec) for row in mine]
    head = ("checkpoint", "method", *found[0])
    lines = [
        (
            row["checkpoint"],
            row["method"].replace("_", " "),
            *(f"{value:.{1 if name.startswith('sharpness') else 3}f}" for name, value in one.items()),
        )
        for row, one in zip(mine, found, strict=True)
    ]
    print(table(head, lines))


if __name__ == "__main__":
    typer.run(main)
