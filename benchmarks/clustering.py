"""The paper's clustering and the default, side by side on real descriptors of generated images.

    python -m benchmarks.clustering [--json FILE]
    python -m benchmarks.clustering --base BASE --checkpoints DIR --sizes 500 --sizes 5000

The images are those that audits of the testbed's checkpoints generate (model guidance, 50 x N0 each), taken from as
many checkpoints as the size needs; the training images to recover are all of theirs. The paper's search has 30 s a
threshold, as published, and ``--give-up`` seconds in all: where it has not ended by then it has no result. The paper
counts every clique as an extraction, so the default is asked for as many clusters; ``as_n0`` is the AS of the first N0.
SSCD's figures are beside nano's where its package is installed (benchmarks/judge.py).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from audit.config import Clustering, Settings, Solver
from audit.demo import ASSETS, load_set
from audit.descriptors import load_descriptor
from audit.evidence import greedy_cliques, score
from audit.models.base import load_vae, locate_base
from audit.models.codec import Codec
from audit.sampling.spooled import vectors_of
from audit.workspace import Workspace
from benchmarks import judge
from benchmarks.grid import SHIPPED, Job, available, exactly, kept_pictures, run_all
from benchmarks.judge import Asked, JudgeName
from testbed.controls import controls, near_misses
from testbed.finetune import Recipe


@dataclass(frozen=True)
class Generated:
    """What is clustered: the images as PNGs and as vectors [size, D], and the pictures behind them by their part."""

    pngs: list[bytes | None]
    vectors: np.ndarray
    pictures: dict[str, np.ndarray]


def generated(size: int, settings: Settings, base: Path, checkpoints: Path, workspace: Path, workers: int) -> Generated:
    """``size`` generated images, and the training images, controls and near-misses of their sets.

    Whole audits, one a set and as many as needed; the last one in part. More images a training image where there are
    too few sets.
    """
    first: dict[str, Recipe] = {}
    for recipe in available(checkpoints):
        first.setdefault(recipe.few_shot, recipe)
    recipes = list(first.values())
    sets = {recipe.few_shot: len(load_set(recipe.few_shot, "train")) for recipe in recipes}
    per_image = max(settings.images_per_training_image, -(-size // sum(sets.values())))
    chosen, total = [], 0
    for recipe in recipes:
        if total < size:
            chosen.append(recipe)
            total += per_image * sets[recipe.few_shot]
    settings = kept_pictures(replace(settings, images_per_training_image=per_image), tuple(Clustering))
    jobs = [Job(recipe, (settings,), checkpoints, base, workspace, (Clustering.peaks,)) for recipe in chosen]
    order = {recipe.few_shot: number for number, recipe in enumerate(chosen)}
    rows = sorted((row for done in run_all(jobs, workers) for row in done), key=lambda row: order[row["set"]])
    opened = Workspace(workspace)
    query = 'SELECT descriptor, image FROM generations WHERE audit_id = ? ORDER BY "index"'
    tables = [opened.select(query, [row["audit_id"]]) for row in rows]
    parts = {"train": lambda name: load_set(name, "train"), "control": controls, "near": near_misses}
    return Generated(
        [png for table in tables for png in table["image"].to_pylist()][:size],
        np.concatenate([vectors_of(table) for table in tables])[:size],
        {part: np.concatenate([load(row["set"]) for row in rows]) for part, load in parts.items()},
    )


def measure(
    algorithm: str,
    images: Generated,
    known: np.ndarray,
    extractions: int,
    reach: float,
    give_up: float,
    codec: Codec | None,
) -> dict[str, Any]:
    """One row: the time and the result of one algorithm; the default is asked for ``extractions`` clusters.

    ``known`` are nano's vectors of the training images. The judge speaks where ``codec``, the base's, is given.
    """
    vectors = images.vectors
    started = time.perf_counter()
    timed_out = False
    clusters = None
    if algorithm == "default":
        clusters = exactly(vectors, extractions, reach)
    else:
        clusters, _, timed_out = greedy_cliques(vectors, len(known), give_up=give_up)
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {
        "n": len(vectors), "n0": len(known), "algorithm": algorithm, "seconds": seconds,
        "clusters": None, "as": None, "a_esr_07": None, "as_n0": None, "timed_out": timed_out,
    }  # fmt: skip
    if clusters:
        found = score(vectors[[cluster.representative for cluster in clusters]], known)
        first = score(vectors[[cluster.representative for cluster in clusters[: len(known)]]], known)
        row |= {"clusters": len(clusters), "as": found.average_similarity, "a_esr_07": found.extraction_rate_07}
        row["as_n0"] = first.average_similarity
    if codec is not None:
        seen = judge.opened(images.pngs[cluster.representative] for cluster in clusters or [])
        row |= judge.figures(seen if clusters else None, images.pictures, codec.reconstruct(images.pictures["train"]))
    return row


def main(
    sizes: Annotated[list[int] | None, typer.Option(help="Numbers of images. [default: 500, 5000]")] = None,
    give_up: Annotated[float, typer.Option(help="Seconds in all after which the paper's search is stopped.")] = 300.0,
    images_per_training_image: Annotated[
        int, typer.Option(help="Images a training image, at least.")
    ] = Settings.images_per_training_image,
    solver: Annotated[Solver, typer.Option(help="ODE solver.")] = Settings.solver,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = Settings.steps,
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    checkpoints: Annotated[Path, typer.Option(help="Folder of the testbed's checkpoints.")] = SHIPPED,
    workers: Annotated[int, typer.Option(help="Processes to generate with.")] = 1,
    asked: Asked = JudgeName.auto,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where generated images are kept.")] = Path(
        "lora-audit-workspace-benchmark"
    ),
) -> None:
    """Generate what is missing, cluster it both ways, print and compare."""
    speaks = judge.settled(asked)
    codec = Codec(load_vae(locate_base(str(base)))) if speaks is JudgeName.sscd else None
    rows = []
    settings = Settings(images_per_training_image=images_per_training_image, solver=solver, steps=steps)
    print(
        f"{'n':>6} {'N0':>4} {'algorithm':10}{'seconds':>10}{'clusters':>10}{'AS':>8}{'ESR.7':>8}  timed out",
        flush=True,
    )
    for size in sizes or [500, 5000]:
        images = generated(size, settings, base, checkpoints, workspace, workers)
        nano = load_descriptor("nano")
        known, reach = nano.describe(images.pictures["train"]), nano.threshold
        paper = measure("paper", images, known, 0, reach, give_up, codec)
        pair = [measure("default", images, known, paper["clusters"] or len(known), reach, give_up, codec), paper]
        pair = [row if codec else row | judge.absent(speaks) for row in pair]
        rows += pair
        for row in pair:
            result = [f"{row[name]:.3f}" if row[name] is not None else "none" for name in ("as", "a_esr_07")]
            print(
                f"{row['n']:>6} {row['n0']:>4} {row['algorithm']:10}{row['seconds']:10.2f}"
                f"{row['clusters'] or 'none':>10}{result[0]:>8}{result[1]:>8}  {'yes' if row['timed_out'] else 'no'}",
                *judge.lines(row, 12 * " "),
                sep="\n",
                flush=True,
            )
        bound = "at least " if pair[1]["clusters"] is None else ""
        print(f"       the default is {bound}{pair[1]['seconds'] / pair[0]['seconds']:.0f} times faster", flush=True)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
