"""How much of the training images each method recovers, on the shipped checkpoints of the embedded model.

    python -m benchmarks.extraction [--quick] [--json FILE]

For every checkpoint: direct sampling, classifier-free guidance and model guidance, each with the default clustering
and the same number of generated images; AS and A-ESR against the training images and against the control images,
which nothing was trained on, and the ceiling that the codec sets. The workspace keeps what is done: a stopped run
goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.cli.demo import ASSETS, CFG_WEIGHT, SHIPPED, STEPS, Checkpoint
from audit.config import Clustering, Method, Settings, Solver
from audit.engine.local import LocalEngine
from audit.engine.plan import Request, make_plan
from audit.matching.references import known_pictures
from audit.storage import Workspace


@dataclass(frozen=True)
class Case:
    """One checkpoint sampled one way."""

    checkpoint: Checkpoint
    settings: Settings


def run_case(case: Case, workspace: Workspace) -> dict[str, Any]:
    """Audit and score one case; the row of the table."""
    shipped = SHIPPED[case.checkpoint]
    pictures = ASSETS / "sets" / shipped.few_shot
    known = {kind: pictures / folder for kind, folder in (("training", "train"), ("control", "control"))}
    request = Request(
        ASSETS / "checkpoints" / shipped.path,
        str(ASSETS / "base"),
        captions=[shipped.caption],
        n0=len(list(known["training"].glob("*.png"))),
        settings=case.settings,
    )
    plan = make_plan(request, "nano")
    engine = LocalEngine(workspace)
    engine.audit(plan)
    for kind, folder in known.items():
        engine.evaluate(plan, kind, known_pictures(folder))
    rows = workspace.rows("SELECT * FROM evaluations WHERE audit_id = ?", [plan.audit_id])
    scores = {row["kind"]: row for row in rows}
    (row,) = workspace.rows("SELECT evaluations, seconds_sampling FROM audits WHERE audit_id = ?", [plan.audit_id])
    return {
        "set": shipped.few_shot,
        "tuning": str(case.checkpoint),
        "method": str(case.settings.method),
        "w": None if case.settings.method is Method.direct else case.settings.w,
        "k": case.settings.k,
        "clustering": str(case.settings.clustering),
        "solver": str(case.settings.solver),
        "steps": case.settings.steps,
        "images": plan.images,
        "evaluations": row["evaluations"],
        "as": scores["training"]["average_similarity"],
        "a_esr_07": scores["training"]["extraction_rate_07"],
        "a_esr_06": scores["training"]["extraction_rate_06"],
        "control_as": scores["control"]["average_similarity"],
        "control_a_esr_07": scores["control"]["extraction_rate_07"],
        "ceiling": scores["training"]["ceiling"],
        "seconds": row["seconds_sampling"],
    }


def main(
    quick: Annotated[bool, typer.Option(help="A fifth of the images.")] = False,
    w: Annotated[list[float] | None, typer.Option(help="Weights of model guidance. [default: 1.5, 2, 3]")] = None,
    checkpoint: Annotated[list[Checkpoint] | None, typer.Option(help="Only these checkpoints.")] = None,
    solver: Annotated[Solver, typer.Option(help="ODE solver.")] = Solver.ddim,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = STEPS,
    clustering: Annotated[Clustering, typer.Option(help="linkage, or the paper's cliques.")] = Clustering.linkage,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Run the table and print it row by row."""
    per_image = 10 if quick else 50
    opened = Workspace(workspace)
    rows = []
    print(
        f"{'checkpoint':26}{'method':16}{'w':>5}{'AS':>8}{'ESR.7':>7}{'ESR.6':>7}{'control':>9}{'ESR.7':>7}"
        f"{'ceiling':>9}{'s':>7}",
        flush=True,
    )
    weights = w or [1.5, 2.0, 3.0]
    ways = [(Method.direct, 1.0), (Method.cfg, CFG_WEIGHT), *((Method.model_guidance, value) for value in weights)]
    for one in checkpoint or list(Checkpoint):
        for method, value in ways:
            settings = Settings(
                method=method,
                w=value,
                solver=solver,
                steps=steps,
                images_per_training_image=per_image,
                clustering=clustering,
            )
            row = run_case(Case(one, settings), opened)
            rows.append(row)
            print(
                f"{row['set'] + ' ' + row['tuning']:26.26}{row['method']:16}{row['w'] or '':>5}{row['as']:8.3f}"
                f"{row['a_esr_07']:7.2f}{row['a_esr_06']:7.2f}{row['control_as']:9.3f}{row['control_a_esr_07']:7.2f}"
                f"{row['ceiling']:9.3f}{row['seconds']:7.0f}",
                flush=True,
            )
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
