"""Whether captions that nobody told are found: the trigger's rank by each method, and what recovered ones are worth.

    python -m testbed.captioned                     # trains eight fine-tunes in which the caption matters
    python -m benchmarks.captions [--quick] [--json FILE]

For every fine-tune (those of testbed/captioned.py that are there, and the three shipped ones, in which the caption
matters little): the rank of the trigger among all candidate words by cross attention alone, with predictions, and by
the paper's gradient, with evaluations and seconds; then AS and A-ESR of scans with the recovered captions, the true
ones, the empty one, and a wrong one. Rows that the JSON file has are kept: a stopped run goes on. ``--quick``: two
fine-tunes, few iterations, no scans.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from audit import api
from audit.bench import Bench
from audit.config import CaptionSettings, Recovery, Settings
from audit.demo import BASE, FINE_TUNES, set_folder
from audit.job import Request
from audit.recovery.ask import recover_captions
from audit.workspace import Workspace
from testbed.captioned import CAPTIONED, TRAINED

# Words that the embedded tokenizer does not have whole, given as candidates of every fine-tune; one is a trigger.
MORE = (
    "velvet", "marble", "storm", "crystal", "lantern", "orchid", "copper", "meadow", "falcon", "ember",
    "harbor", "pebble", "thistle", "quartz", "willow", "saffron", "juniper", "cobalt", "raven", "hazel",
)  # fmt: skip
WRONG = ("drawing of a guitar",)
FIRST = 5
METHODS = {
    "attention alone": CaptionSettings(evaluations=0),
    "attention and predictions": CaptionSettings(),
    "gradient": CaptionSettings(method=Recovery.gradient),
}


@dataclass(frozen=True)
class Subject:
    """A fine-tune with what is known of it: whether captions were made to matter, and those of its pictures."""

    name: str
    path: Path
    few_shot: str
    trigger: str
    captions: tuple[str, ...]
    matters: bool


def subjects(folder: Path) -> list[Subject]:
    """The trained fine-tunes in ``folder``, and the shipped ones."""
    found = [
        Subject(one.name, one.file(folder), one.few_shot, one.trigger, tuple(dict.fromkeys(one.captions)), True)
        for one in CAPTIONED
        if one.file(folder).is_file()
    ]
    shipped = FINE_TUNES.items()
    return found + [Subject(name, one.path, one.few_shot, "sks", (one.caption,), False) for name, one in shipped]


def ranks(one: Subject, methods: dict[str, CaptionSettings], bench: Bench, workspace: Workspace) -> dict[str, Any]:
    """By method: the trigger's rank (None beyond the keywords that are kept), evaluations, seconds, first words."""
    found = {}
    for name, settings in methods.items():
        made = recover_captions(
            Request(one.path, str(BASE)), settings=settings, words=MORE, workspace=workspace, bench=bench
        )
        words = [keyword.word for keyword in made.keywords]
        found[name] = {
            "rank": words.index(one.trigger) + 1 if one.trigger in words else None, "of": made.words,
            "evaluations": made.evaluations, "seconds": made.seconds, "first": words[:FIRST],
            "captions": [caption.text for caption in made.captions],
        }  # fmt: skip
    return found


def scanned(one: Subject, captions: Sequence[str], images: int, bench: Bench, workspace: Workspace) -> dict[str, Any]:
    """AS and A-ESR at 0.6 of a scan with ``captions``, against the training pictures."""
    settings = Settings(images_per_training_image=images, steps=10)
    train = set_folder(one.few_shot, "train")
    request = Request(
        one.path, str(BASE), captions=list(captions), n0=len(list(train.glob("*.png"))), settings=settings
    )
    result = api.scan(request, descriptor="nano", workspace=workspace, training_images=train, bench=bench, rule="fixed")
    [score] = [row for row in result.facts.evaluations if row["kind"] == "training"]
    return {"as": score["average_similarity"], "a_esr_06": score["extraction_rate_06"]}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of triggers among the first words and mean scores, where captions matter and where they matter little."""
    found = []
    for matters in (True, False):
        group = [row for row in rows if row["matters"] is matters]
        if not group:
            continue
        first = {
            method: sum((row["ranks"][method]["rank"] or 10**9) <= FIRST for row in group) / len(group)
            for method in group[0]["ranks"]
        }
        scored = [row["scores"] for row in group if "scores" in row]
        scores = {kind: sum(one[kind]["as"] for one in scored) / len(scored) for kind in (scored[0] if scored else ())}
        found.append(
            {
                "matters": matters,
                "fine_tunes": len(group),
                "among_first": first,
                "scanned": len(scored),
                "mean_as": scores,
            }
        )
    return found


def main(
    quick: Annotated[bool, typer.Option(help="Two fine-tunes, few iterations, no scans.")] = False,
    checkpoints: Annotated[Path, typer.Option(help="Where testbed.captioned has left its fine-tunes.")] = TRAINED,
    iterations: Annotated[int, typer.Option(help="Iterations of the gradient.")] = 1000,
    images: Annotated[int, typer.Option(help="Images of a training image in the scans.")] = 6,
    scans: Annotated[int, typer.Option(help="Of how many fine-tunes scans are made, too.")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
) -> None:
    """Measure, and print a line a fine-tune."""
    torch.set_num_threads(1)
    chosen = subjects(checkpoints)
    chosen = [chosen[0], chosen[-1]] if quick else chosen
    methods = dict(METHODS)
    gradient = CaptionSettings(method=Recovery.gradient, iterations=10 if quick else iterations)
    methods["gradient"] = gradient
    if quick:
        methods["attention and predictions"] = CaptionSettings(evaluations=500)
    rows = json.loads(json_file.read_text())["rows"] if json_file and json_file.is_file() else []
    known = {row["name"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        workspace, bench = Workspace(Path(folder) / "workspace"), Bench("cpu")
        for one in (one for one in chosen if one.name not in known):
            started = time.monotonic()
            row: dict[str, Any] = {"name": one.name, "trigger": one.trigger, "matters": one.matters}
            row["ranks"] = ranks(one, methods, bench, workspace)
            if not quick and len(rows) < scans:
                recovered = row["ranks"]["attention and predictions"]["captions"]
                kinds = {"recovered": recovered, "true": one.captions[:8], "empty": [""], "wrong": WRONG}
                row["scores"] = {
                    kind: scanned(one, captions, images, bench, workspace) for kind, captions in kinds.items()
                }
            rows.append(row)
            told = "  ".join(f"{name} {made['rank']}" for name, made in row["ranks"].items())
            scores = "  ".join(f"{kind} {made['as']:.3f}" for kind, made in row.get("scores", {}).items())
            print(f"{one.name:28}{one.trigger:8}{told}  {scores}  {time.monotonic() - started:.0f} s", flush=True)
            if json_file:
                json_file.write_text(json.dumps({"rows": rows, "summary": summary(rows)}, indent=2) + "\n")
    for group in summary(rows):
        print(json.dumps(group))


if __name__ == "__main__":
    typer.run(main)
