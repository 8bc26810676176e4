"""What the defaults are chosen by: AS and A-ESR against solver steps, and against the guidance weight.

    python -m benchmarks.settings steps   [--json FILE]     # DDIM and DPM-Solver++, 10 to 50 steps
    python -m benchmarks.settings weights [--json FILE]     # fixed weights, and auto; --method cfg for CFG's own

Both on every checkpoint of medium strength in --checkpoints; the sets marked holdout are shown apart and nothing is
chosen by them. SSCD's figures are below nano's where its package is installed (benchmarks/judge.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.config import Method, Settings, Solver
from audit.demo import ASSETS
from benchmarks import judge
from benchmarks.grid import SHIPPED, Job, available, interval, run_all, split_settings
from benchmarks.judge import Asked, JudgeName
from testbed.finetune import Defence, Strength, Tuning

STEPS = (10, 15, 20, 25, 50)
WEIGHTS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)

app = typer.Typer(no_args_is_help=True, help=__doc__)

Only = Annotated[list[str] | None, typer.Option(help="Only these checkpoints, by folder name.")]
PerImage = Annotated[int, typer.Option(help="Images a training image.")]
Base = Annotated[Path, typer.Option(help="The base model.")]
Checkpoints = Annotated[Path, typer.Option(help="Folder of the testbed's checkpoints.")]
Workers = Annotated[int, typer.Option(help="Processes, each of its share of the cores.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")]
WorkspaceOption = Annotated[Path, typer.Option(help="Where results are kept.")]
WORKSPACE = Path("lora-audit-workspace-benchmark")


def measure(
    settings: Sequence[Settings],
    only: list[str] | None,
    base: Path,
    checkpoints: Path,
    workers: int,
    json_file: Path | None,
    workspace: Path,
    asked: JudgeName,
) -> list[dict[str, Any]]:
    """The rows of every plain checkpoint under every one of ``settings``."""
    speaks = judge.settled(asked)
    recipes = [
        recipe
        for recipe in available(checkpoints, only)
        if recipe.strength is Strength.medium
        and recipe.defence is Defence.none
        and recipe.tuning is not Tuning.lora_peft
    ]
    jobs = [
        part
        for recipe in recipes
        for part in split_settings(Job(recipe, tuple(settings), checkpoints, base, workspace, judge=speaks))
    ]
    rows: list[dict[str, Any]] = []
    for done in run_all(jobs, workers):
        rows += done
        for row in done:
            print(
                f"{row['checkpoint']:34} {row['solver']:6} {row['steps']:3} steps  w {row['w'] or 'auto'!s:5}"
                f"AS {row['as']:.3f}  A-ESR {row['a_esr_07']:.2f}  {row['seconds']:.0f} s",
                *judge.lines(row, 34 * " "),
                sep="\n",
                flush=True,
            )
        if json_file:
            json_file.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def compare(rows: list[dict[str, Any]], key: tuple[str, ...], best: dict[str, float], holdout: bool) -> None:
    """Print nano's means of each value of ``key``, and their difference to ``best`` (AS by checkpoint) as an interval.

    Below them are the judge's means, where it was asked.
    """
    mine = [row for row in rows if row["holdout"] is holdout]
    for value in dict.fromkeys(tuple(row[name] for name in key) for row in mine):
        group = [row for row in mine if tuple(row[name] for name in key) == value]
        mean, rate = (sum(row[name] for row in group) / len(group) for name in ("as", "a_esr_07"))
        change = interval([row["as"] - best[row["checkpoint"]] for row in group])
        label = " ".join("auto" if part is None else str(part) for part in value)
        print(
            f"{'holdout' if holdout else 'tuning':8}{label:12} AS {mean:.3f}  A-ESR {rate:.3f}  "
            f"AS to the reference {change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}], {len(group)} checkpoints"
        )
        for view in judge.VIEWS if group[0].get("judge", judge.NOT_ASKED) != judge.NOT_ASKED else ():
            seen = [[row.get(judge.key(view, name)) for row in group] for name in ("as", "a_esr")]
            means = [None if None in values else sum(values) / len(values) for values in seen]
            print(f"{20 * ' '}by SSCD {view:7}AS {judge.shown(means[0], 3)}  A-ESR {judge.shown(means[1], 3)}")


@app.command()
def steps(
    only: Only = None,
    images_per_training_image: PerImage = 25,
    base: Base = ASSETS / "base",
    checkpoints: Checkpoints = SHIPPED,
    workers: Workers = 1,
    asked: Asked = JudgeName.auto,
    json_file: JsonFile = None,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """AS against solver steps; the reference is DDIM with 50 steps, as in the paper."""
    settings = [
        Settings(solver=solver, steps=count, images_per_training_image=images_per_training_image)
        for count in STEPS
        for solver in Solver
    ]
    rows = measure(settings, only, base, checkpoints, workers, json_file, workspace, asked)
    reference = {row["checkpoint"]: row["as"] for row in rows if (row["solver"], row["steps"]) == ("ddim", 50)}
    for holdout in (False, True):
        compare(rows, ("solver", "steps"), reference, holdout)


@app.command()
def weights(
    only: Only = None,
    images_per_training_image: PerImage = 25,
    solver: Annotated[Solver, typer.Option(help="ODE solver.")] = Settings.solver,
    count: Annotated[int, typer.Option("--steps", help="Solver steps.")] = Settings.steps,
    method: Annotated[Method, typer.Option(help="model-guidance or cfg.")] = Method.model_guidance,
    base: Base = ASSETS / "base",
    checkpoints: Checkpoints = SHIPPED,
    workers: Workers = 1,
    asked: Asked = JudgeName.auto,
    json_file: JsonFile = None,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """AS against the guidance weight; the reference is the best fixed weight of each checkpoint, which nobody knows."""
    settings = [
        Settings(method=method, w=w, solver=solver, steps=count, images_per_training_image=images_per_training_image)
        for w in (*WEIGHTS, *((None,) if method is Method.model_guidance else ()))
    ]
    rows = measure(settings, only, base, checkpoints, workers, json_file, workspace, asked)
    best: dict[str, float] = {}
    for row in rows:
        if row["w"] is not None:
            best[row["checkpoint"]] = max(best.get(row["checkpoint"], 0.0), row["as"])
    for holdout in (False, True):
        compare(rows, ("w",), best, holdout)


if __name__ == "__main__":
    app()
