"""What membership and control generations cost beside extraction: evaluations and processor seconds, in one run.

    python -m benchmarks.membership_cost [--quick] [--json FILE]

An audit of the shipped kohya LoRA at the defaults, with 100 references; then a second checkpoint of the same base,
whose base losses are kept; then the same references again at a budget that looks at each once. Exit code 1 where
membership takes more than a fifth of extraction's evaluations.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from audit import api
from audit.bench import Bench
from audit.config import Settings
from audit.demo import ASSETS, BASE, FINE_TUNES
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.job import Job, Request, resolve
from audit.stages import Control, Controlled, Membership, Remembered, Sample, Sampled
from audit.workspace import Workspace

REFERENCES = 100
MOST = 0.2  # of extraction's evaluations


def references(folder: Path) -> Path:
    """A folder with the first REFERENCES shipped pictures: those of the audited set, then others."""
    own, *others = sorted(ASSETS.glob("sets/*"), key=lambda one: one.name != FINE_TUNES["lora-kohya"].few_shot)
    pictures = [picture for one in (own, *others) for picture in sorted(one.glob("*/*.png"))]
    folder.mkdir()
    for number, picture in enumerate(pictures[:REFERENCES]):
        shutil.copy(picture, folder / f"{number:03d}-{picture.name}")
    return folder


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and seconds of a processor it took."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


def main(
    quick: Annotated[bool, typer.Option(help="A twentieth of the images.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
) -> None:
    """Measure, and print a row a stage."""
    torch.set_num_threads(1)
    images = 2 if quick else Settings.images_per_training_image
    with tempfile.TemporaryDirectory() as name:
        workspace, bench = Workspace(Path(name) / "workspace"), Bench("cpu")
        folder = references(Path(name) / "references")
        added = {"descriptor": "nano", "workspace": workspace, "bench": bench}
        _, encoding = timed(lambda: api.add_references("all", folder, bases=[str(BASE)], **added))

        def job(which: str, **settings: Any) -> Job:
            told = FINE_TUNES[which]
            wanted = Settings(images_per_training_image=images, **settings)
            request = Request(told.path, str(BASE), captions=[told.caption], n0=10, settings=wanted)
            found = resolve(request, "nano", bench)
            bench.pair(found, workspace)  # loading is no part of what is compared
            return found

        def row(what: str, stage: Any, job: Job) -> dict[str, Any]:
            [record], seconds = timed(lambda: run_stages([stage], job, Place(workspace, bench)))
            assert isinstance(record, Sampled | Controlled | Remembered)
            return {"what": what, "evaluations": record.evaluations, "seconds": seconds}

        first = job("lora-kohya")
        rows = [
            {"what": "describing and encoding 100 references", "evaluations": 0, "seconds": encoding},
            row(f"extraction: {first.images} images", Sample(), first),
            row(f"control generations: {first.control_images}", Control(), first),
            row("membership of 100 references", Membership(["all"]), first),
            row("membership, the base's losses kept", Membership(["all"]), job("dreambooth")),
            row("membership, one look at each", Membership(["all"]), job("lora-peft", membership_evaluations=1800)),
        ]
    extraction = rows[1]
    share = rows[3]["evaluations"] / extraction["evaluations"] * (images / Settings.images_per_training_image)
    for one in rows:
        part = one["seconds"] / extraction["seconds"]
        print(f"{one['what']:45}{one['evaluations']:8} evaluations{one['seconds']:8.1f} s{part:8.1%} of extraction's")
    print(f"{share:.1%} of the evaluations of an audit's extraction at the defaults")
    if json_file:
        json_file.write_text(json.dumps({"rows": rows, "share_of_evaluations": share}, indent=2) + "\n")
    if share > MOST:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
