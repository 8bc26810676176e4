"""How much of the training images each method recovers, on the checkpoints of the testbed.

    python -m benchmarks.extraction [--quick] [--json FILE]
    python -m benchmarks.extraction --base BASE --checkpoints DIR --workers 2 --sheets DIR --json FILE

For every checkpoint: direct sampling, classifier-free guidance and model guidance, each with the paper's clustering and
with the default, on equal numbers of generated images; AS and A-ESR against the training images and against the
control images, which nothing was trained on, and the ceiling that the codec sets. Means over sets carry a 95 %
bootstrap interval; sets marked holdout are shown apart. Without options it takes the checkpoints that are shipped;
`python -m testbed.finetune --all` trains the others. The workspace keeps what is done: a stopped run goes on.

Exit code 1 where model guidance falls behind classifier-free guidance in the mean AS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.config import Clustering, Method, Settings, Solver
from audit.demo import ASSETS
from audit.sampling.guidance import CFG_WEIGHT
from benchmarks.grid import SHIPPED, Job, available, interval, run_all, split_settings

QUICK_IMAGES = 10
PAPER_IMAGES = 50


def ways(weights: Sequence[float | None], **common: Any) -> tuple[Settings, ...]:
    """The settings that are compared: direct, CFG, and model guidance at every one of ``weights`` (None: auto)."""
    return (
        Settings(method=Method.direct, w=1.0, **common),
        Settings(method=Method.cfg, w=CFG_WEIGHT, **common),
        *(Settings(method=Method.model_guidance, w=weight, **common) for weight in weights),
    )


HEADER = (
    f"{'checkpoint':38}{'method':15}{'w':>5} {'clustering':11}{'AS':>6}{'ESR.7':>7}{'ESR.6':>7}"
    f"{'control':>9}{'ESR.7':>7}{'ceiling':>9}{'s':>7}"
)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    w = "" if row["method"] == "direct" else row["w"] or "auto"
    return (
        f"{row['checkpoint']:38.38}{row['method']:15}{w:>5} {row['clustering']:11}{row['as']:6.3f}"
        f"{row['a_esr_07']:7.2f}{row['a_esr_06']:7.2f}{row['control_as']:9.3f}{row['control_a_esr_07']:7.2f}{row['ceiling']:9.3f}"
        f"{row['seconds']:7.0f}"
    )


def is_plain(row: dict[str, Any]) -> bool:
    """Whether the row counts in the means over sets: medium strength, undefended."""
    return row["strength"] == "medium" and row["defence"] == "none" and not row["checkpoint"].endswith("lora-peft")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over sets with bootstrap intervals, per group of sets, tuning, clustering and method."""
    found = []
    plain = [row for row in rows if is_plain(row)]
    keys = dict.fromkeys((row["holdout"], row["tuning"], row["clustering"], row["method"], row["w"]) for row in plain)
    for holdout, tuning, clustering, method, w in sorted(keys, key=str):
        group = [
            row
            for row in plain
            if (row["holdout"], row["tuning"], row["clustering"], row["method"], row["w"])
            == (holdout, tuning, clustering, method, w)
        ]
        entry: dict[str, Any] = {
            "holdout": holdout,
            "tuning": tuning,
            "clustering": clustering,
            "method": method,
            "w": w,
            "sets": len(group),
        }
        for figure in ("as", "a_esr_07", "a_esr_06", "control_as", "control_a_esr_07"):
            entry[figure] = interval([row[figure] for row in group])
        found.append(entry)
    return found


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Model guidance minus CFG and minus direct, paired by checkpoint, with bootstrap intervals."""
    found = []
    plain = [row for row in rows if is_plain(row)]
    for holdout in (False, True):
        for clustering in ("default", "paper"):
            by_method: dict[str, dict[str, dict[str, Any]]] = {}
            for row in plain:
                if (row["holdout"], row["clustering"]) == (holdout, clustering):
                    by_method.setdefault(row["method"], {})[row["checkpoint"]] = row
            guided = by_method.get("model_guidance", {})
            for other in ("cfg", "direct"):
                names = sorted(set(guided) & set(by_method.get(other, {})))
                if names:
                    entry: dict[str, Any] = {"holdout": holdout, "clustering": clustering, "over": other}
                    for figure in ("as", "a_esr_07", "a_esr_06"):
                        entry[figure] = interval(
                            [guided[name][figure] - by_method[other][name][figure] for name in names]
                        )
                    found.append(entry)
    return found


def contact_sheet(rows: list[dict[str, Any]], workspace: Path, path: Path, most: int = 12, side: int = 96) -> None:
    """One checkpoint: its training images, and below each the nearest extraction of every method with its cosine."""
    import io

    from PIL import Image, ImageDraw

    from audit.demo import load_set
    from audit.descriptors import load_descriptor
    from audit.sampling.spooled import vectors_of
    from audit.workspace import Workspace

    opened, nano = Workspace(workspace), load_descriptor("nano")
    pictures = load_set(rows[0]["set"], "train")[:most]
    known = nano.describe(pictures)
    label, gap = 110, 16
    sheet = Image.new("RGB", (label + len(pictures) * (side + 4), (len(rows) + 1) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, side // 2), "training images", fill="black")
    for column, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture).resize((side, side)), (label + column * (side + 4), 0))
    for number, row in enumerate(rows, start=1):
        table = opened.select("SELECT image, descriptor FROM extractions WHERE audit_id = ?", [row["audit_id"]])
        cosines = known @ vectors_of(table).T
        top = number * (side + gap)
        name = row["method"].replace("_", " ")
        draw.text((4, top + side // 2), f"{name}\nAS {row['as']:.2f}", fill="black")
        for column, best in enumerate(cosines.argmax(axis=1)):
            found = Image.open(io.BytesIO(table["image"][int(best)].as_py())).convert("RGB")
            x = label + column * (side + 4)
            sheet.paste(found.resize((side, side)), (x, top))
            value = cosines[column, best]
            draw.text((x + 2, top + side + 1), f"{value:.2f}", fill="darkred" if value > 0.7 else "gray")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def show_summary(rows: list[dict[str, Any]]) -> None:
    """The means and gains, for people."""
    for entry in summary(rows):
        print(
            f"{'holdout' if entry['holdout'] else 'tuning':8}{entry['tuning']:11}{entry['clustering']:8}"
            f"{entry['method']:15}"
            + "  ".join(
                "{} {:.3f} [{:.3f}, {:.3f}]".format(name, *entry[figure])
                for name, figure in (("AS", "as"), ("ESR.7", "a_esr_07"), ("ESR.6", "a_esr_06"))
            )
            + f"  over {entry['sets']} sets"
        )
    for entry in gains(rows):
        print(
            f"{'holdout' if entry['holdout'] else 'tuning':8}{entry['clustering']:8}model guidance over "
            f"{entry['over']:7}"
            + "  ".join(
                "{} {:+.3f} [{:+.3f}, {:+.3f}]".format(name, *entry[figure])
                for name, figure in (("AS", "as"), ("ESR.7", "a_esr_07"), ("ESR.6", "a_esr_06"))
            )
        )


def main(
    quick: Annotated[bool, typer.Option(help="A fifth of the images, the default clustering alone.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these checkpoints, by folder name.")] = None,
    w: Annotated[list[str] | None, typer.Option(help="Weights of model guidance, numbers or auto.")] = None,
    k: Annotated[float, typer.Option(help="The correction term.")] = Settings.k,
    solver: Annotated[Solver, typer.Option(help="ODE solver.")] = Settings.solver,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = Settings.steps,
    clique_limit: Annotated[float, typer.Option(help="Seconds a threshold for the paper's clustering.")] = 30.0,
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    checkpoints: Annotated[Path, typer.Option(help="Folder of the testbed's checkpoints.")] = SHIPPED,
    workers: Annotated[int, typer.Option(help="Processes, each of its share of the cores.")] = 1,
    sheets: Annotated[Path | None, typer.Option(help="Folder for a contact sheet a checkpoint.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Run the table and print it row by row, then the means."""
    weights = [None if value == "auto" else float(value) for value in w or ["auto"]]
    settings = ways(
        weights,
        k=k,
        solver=solver,
        steps=steps,
        images_per_training_image=QUICK_IMAGES if quick else PAPER_IMAGES,
    )
    clusterings = (Clustering.peaks,) if quick else (Clustering.peaks, Clustering.cliques)
    jobs = [
        part
        for recipe in available(checkpoints, only)
        for part in split_settings(Job(recipe, settings, checkpoints, base, workspace, clusterings, clique_limit))
    ]
    print(HEADER, flush=True)
    rows = []
    for done in run_all(jobs, workers):
        for row in done:
            rows.append(row)
            print(line(row), flush=True)
            if json_file:  # after every row: a stopped run leaves what it has
                json_file.write_text(json.dumps(rows, indent=2) + "\n")
    show_summary(rows)
    if sheets:
        for name in dict.fromkeys(row["checkpoint"] for row in rows):
            mine = [row for row in rows if row["checkpoint"] == name and row["clustering"] == "default"]
            order = {"direct": 0, "cfg": 1, "model_guidance": 2}
            contact_sheet(sorted(mine, key=lambda row: order[row["method"]]), workspace, sheets / f"{name}.png")
    mean = {
        method: interval([row["as"] for row in rows if row["method"] == method and row["clustering"] == "default"])[0]
        for method in ("cfg", "model_guidance")
    }
    if mean["model_guidance"] < mean["cfg"]:
        print(f"model guidance (AS {mean['model_guidance']:.3f}) is behind CFG ({mean['cfg']:.3f})")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
