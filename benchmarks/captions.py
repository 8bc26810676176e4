"""Whether captions that nobody told are found: the trigger's rank by each method, and what recovered ones are worth.

    python -m testbed.captioned                     # trains the fine-tunes in which the caption matters
    python -m benchmarks.captions [--quick] [--json FILE]

For every fine-tune (those of testbed/captioned.py that are there, and the three shipped ones, in which the caption
matters little): the rank of the trigger among all candidate words by cross attention alone, with predictions, and by
the paper's gradient, with evaluations and seconds; then AS and A-ESR of scans with the recovered captions, the soft
prompts of the gradient, the true captions, the empty one, and a wrong one. Those of HOLDOUT had no part in settling the
methods. ``--gradients`` and ``--scans`` say of how many fine-tunes, evenly drawn, the dear parts are measured. Rows
that the JSON file has are kept: a stopped run goes on. ``--quick``: two fine-tunes, few iterations, no scans.
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
from testbed.captioned import CAPTIONED, HOLDOUT, TRAINED

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
    """A fine-tune with what is known of it: whether captions were made to matter, and those of its pictures.

    ``group``: "tuned on", "holdout", or "shipped".
    """

    name: str
    path: Path
    few_shot: str
    trigger: str
    captions: tuple[str, ...]
    matters: bool
    group: str


def subjects(folder: Path) -> list[Subject]:
    """The trained fine-tunes in ``folder``, and the shipped ones."""
    found = [
        Subject(one.name, one.file(folder), one.few_shot, one.trigger, tuple(dict.fromkeys(one.captions)), True, group)
        for group, those in (("holdout", HOLDOUT), ("tuned on", CAPTIONED))
        for one in those
        if one.file(folder).is_file()
    ]
    shipped = FINE_TUNES.items()
    return found + [
        Subject(name, one.path, one.few_shot, "sks", (one.caption,), False, "shipped") for name, one in shipped
    ]


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
    """AS and A-ESR at 0.6 of a scan with ``captions``, against the training pictures.

    Soft prompts are found in the workspace.
    """
    settings = Settings(images_per_training_image=images, steps=10)
    train = set_folder(one.few_shot, "train")
    n0 = len(list(train.glob("*.png")))
    request = Request(one.path, str(BASE), captions=list(captions), n0=n0, settings=settings)
    result = api.scan(request, descriptor="nano", workspace=workspace, training_images=train, bench=bench, rule="fixed")
    [score] = [row for row in result.facts.evaluations if row["kind"] == "training"]
    return {"as": score["average_similarity"], "a_esr_06": score["extraction_rate_06"]}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By group: shares of triggers among the first words by each method, and mean scores of the scans."""
    found = []
    for group in ("holdout", "tuned on", "shipped"):
        those = [row for row in rows if row["group"] == group]
        if not those:
            continue
        ranked: dict[str, list[bool]] = {}
        scores: dict[str, list[dict[str, float]]] = {}
        for row in those:
            for method, made in row["ranks"].items():
                ranked.setdefault(method, []).append((made["rank"] or 10**9) <= FIRST)
            for kind, score in row.get("scores", {}).items():
                scores.setdefault(kind, []).append(score)
        found.append(
            {
                "group": group,
                "fine_tunes": len(those),
                "among_first": {method: f"{sum(hits)} of {len(hits)}" for method, hits in ranked.items()},
                "scanned": {kind: len(some) for kind, some in scores.items()},
                "mean_as": {kind: sum(one["as"] for one in some) / len(some) for kind, some in scores.items()},
                "mean_a_esr_06": {
                    kind: sum(one["a_esr_06"] for one in some) / len(some) for kind, some in scores.items()
                },
            }
        )
    return found


def evenly(names: Sequence[str], count: int) -> set[str]:
    """So many of the names, evenly drawn."""
    return set(names[:: max(1, -(-len(names) // max(1, count)))][:count])


def kinds_of(one: Subject, found: dict[str, Any]) -> dict[str, Sequence[str]]:
    """The captions that a fine-tune is scanned with, by kind."""
    kinds = {
        "recovered": found["attention and predictions"]["captions"], "true": one.captions[:8], "empty": [""],
        "wrong": WRONG,
    }  # fmt: skip
    return kinds | ({"soft prompts": found["gradient"]["captions"]} if "gradient" in found else {})


def keep(file: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write what there is so far."""
    if file is not None:
        file.write_text(json.dumps({"rows": rows, "summary": summary(rows)}, indent=2) + "\n")


def main(
    quick: Annotated[bool, typer.Option(help="Two fine-tunes, few iterations, no scans.")] = False,
    checkpoints: Annotated[Path, typer.Option(help="Where testbed.captioned has left its fine-tunes.")] = TRAINED,
    iterations: Annotated[int, typer.Option(help="Iterations of the gradient.")] = 1000,
    images: Annotated[int, typer.Option(help="Images of a training image in the scans.")] = 6,
    scans: Annotated[int, typer.Option(help="Of how many fine-tunes scans are made, too.")] = 100,
    gradients: Annotated[int, typer.Option(help="Of how many fine-tunes the gradient is climbed.")] = 100,
    group: Annotated[str, typer.Option(help="Only one: holdout, tuned on, or shipped.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
) -> None:
    """Measure, and print a line a fine-tune."""
    torch.set_num_threads(1)
    chosen = [one for one in subjects(checkpoints) if group in ("", one.group)]
    chosen = [chosen[0], chosen[-1]] if quick else chosen
    methods = {name: settings for name, settings in METHODS.items() if name != "gradient"}
    gradient = CaptionSettings(method=Recovery.gradient, iterations=10 if quick else iterations)
    if quick:
        methods["attention and predictions"] = CaptionSettings(evaluations=900)
    names = [one.name for one in chosen if one.matters] or [one.name for one in chosen]
    climbed, sampled = evenly(names, gradients), set() if quick else evenly(names, scans)
    rows = json.loads(json_file.read_text())["rows"] if json_file and json_file.is_file() else []
    known = {row["name"] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        workspace, bench = Workspace(Path(folder) / "workspace"), Bench("cpu")
        for one in (one for one in chosen if one.name not in known):
            started = time.monotonic()
            asked = methods | ({"gradient": gradient} if one.name in climbed else {})
            found = ranks(one, asked, bench, workspace)
            rows.append({"name": one.name, "trigger": one.trigger, "group": one.group, "ranks": found})
            told = "  ".join(f"{name} {made['rank']}" for name, made in found.items())
            print(f"{one.name:28}{one.trigger:8}{told}  {time.monotonic() - started:.0f} s", flush=True)
            keep(json_file, rows)
        for one in (one for one in chosen if one.name in sampled):
            [row] = [row for row in rows if row["name"] == one.name]
            scores = row.setdefault("scores", {})
            for kind, captions in kinds_of(one, row["ranks"]).items():
                if kind not in scores and (kind != "soft prompts" or one.name not in known):
                    scores[kind] = scanned(one, captions, images, bench, workspace)
                    print(f"{one.name:28}{kind:14}{scores[kind]['as']:.3f}", flush=True)
                    keep(json_file, rows)
    for group in summary(rows):
        print(json.dumps(group))


if __name__ == "__main__":
    typer.run(main)
