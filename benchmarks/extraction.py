"""How much of the training images each method recovers, on the checkpoints of the testbed.

    python -m benchmarks.extraction [--quick] [--json FILE]
    python -m benchmarks.extraction --base BASE --checkpoints DIR --workers 2 --sheets DIR --json FILE

For every checkpoint: direct sampling, classifier-free guidance and model guidance, each with the paper's clustering and
with the default, on equal numbers of generated images; AS and A-ESR against the training images and against the
control images and near-misses, which nothing was trained on, and the ceiling that the codec sets: by nano's descriptor,
and by SSCD where its package is installed (benchmarks/judge.py). Means over sets carry a 95 % bootstrap interval; sets
marked holdout are shown apart. Without options it takes the checkpoints that are shipped; `python -m testbed.finetune
--all` trains the others. The workspace keeps what is done: a stopped run goes on.

Exit code 1 where model guidance falls behind classifier-free guidance in the mean AS, by any of them.
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
from benchmarks import judge
from benchmarks.grid import SHIPPED, Job, available, interval, run_all, split_settings
from benchmarks.judge import Asked, JudgeName

GAINED = ("as", "a_esr")
QUICK_IMAGES = 10
PAPER_IMAGES = 50


def ways(weights: Sequence[float | None], **common: Any) -> tuple[Settings, ...]:
    """The settings that are compared: direct, CFG, and model guidance at every one of ``weights`` (None: auto)."""
    return (
        Settings(method=Method.direct, w=1.0, **common),
        Settings(method=Method.cfg, w=CFG_WEIGHT, **common),
        *(Settings(method=Method.model_guidance, w=weight, **common) for weight in weights),
    )


NANO = ("as", "a_esr_07", "a_esr_06", "control_as", "control_a_esr_07", "near_as", "near_a_esr_07")
HEADER = (
    f"{'checkpoint':38}{'method':15}{'w':>5} {'clustering':11}{'AS':>6}{'ESR.7':>7}{'ESR.6':>7}"
    f"{'control':>9}{'ESR.7':>7}{'ceiling':>9}{'s':>7}"
)


def line(row: dict[str, Any]) -> str:
    """One row for people, and below it what the judge says."""
    w = "" if row["method"] == "direct" else row["w"] or "auto"
    by_nano = (
        f"{row['checkpoint']:38.38}{row['method']:15}{w:>5} {row['clustering']:11}{row['as']:6.3f}"
        f"{row['a_esr_07']:7.2f}{row['a_esr_06']:7.2f}{row['control_as']:9.3f}{row['control_a_esr_07']:7.2f}{row['ceiling']:9.3f}"
        f"{row['seconds']:7.0f}"
    )
    return "\n".join([by_nano, *judge.lines(row, 38 * " ")])


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
        for figure in (*NANO, *judge.KEYS):
            entry[figure] = known_interval([row.get(figure) for row in group])
        found.append(entry)
    return found


def known_interval(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Mean and interval over those that are known (a set without near-misses has no figure of them); else None."""
    known = [value for value in values if value is not None]
    return interval(known) if known else None


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
                    for figure in (*NANO[:3], *(judge.key(view, name) for view in judge.VIEWS for name in GAINED)):
                        entry[figure] = known_interval(
                            [_difference(guided[name], by_method[other][name], figure) for name in names]
                        )
                    found.append(entry)
    return found


def _difference(one: dict[str, Any], other: dict[str, Any], figure: str) -> float | None:
    values = one.get(figure), other.get(figure)
    return None if values[0] is None or values[1] is None else values[0] - values[1]


def contact_sheet(rows: list[dict[str, Any]], workspace: Path, path: Path, most: int = 12, side: int = 96) -> None:
    """One checkpoint: its training images, and below each the nearest extraction of every method with its cosine.

    Where the judge spoke, SSCD's cosine of the same two pictures, as they are, stands behind nano's.
    """
    import io

    from PIL import Image, ImageDraw

    from audit.demo import load_set
    from audit.descriptors import load_descriptor
    from audit.sampling.spooled import vectors_of
    from audit.workspace import Workspace

    opened, nano = Workspace(workspace), load_descriptor("nano")
    pictures = load_set(rows[0]["set"], "train")[:most]
    known = nano.describe(pictures)
    sscd = judge.views()[0] if rows[0]["judge"] == judge.SSCD.name else None
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
            draw.text((x + 2, top + side + 1), f"{value:.2f}", fill="darkred" if value > nano.threshold else "gray")
            if sscd is not None:
                first, second = sscd.descriptor.describe([pictures[column], found])
                by_sscd = float(first @ second)
                color = "darkred" if by_sscd > sscd.threshold else "gray"
                draw.text((x + 34, top + side + 1), f"SSCD {by_sscd:.2f}", fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


WITNESSES = (
    ("nano", {"AS": "as", "ESR.7": "a_esr_07", "ESR.6": "a_esr_06", "control ESR.7": "control_a_esr_07"}),
    *(
        (
            f"SSCD {view}",
            {
                "AS": judge.key(view, "as"),
                "ESR": judge.key(view, "a_esr"),
                "control ESR": judge.key(view, "control_a_esr"),
            },
        )
        for view in judge.VIEWS
    ),
)


def show_summary(rows: list[dict[str, Any]]) -> None:
    """The means and gains, for people: a line a witness."""
    for entry in summary(rows):
        name = f"{entry['tuning']:11}{entry['clustering']:8}{entry['method']:15}"
        _show(entry, name, "", f"over {entry['sets']} sets")
    for entry in gains(rows):
        _show(entry, f"{entry['clustering']:8}model guidance over {entry['over']:7}", "+", "")


def _show(entry: dict[str, Any], name: str, sign: str, end: str) -> None:
    for witness, figures in WITNESSES:
        spans = [
            f"{title} {mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
            for title, figure in figures.items()
            if (found := entry.get(figure)) is not None
            for mean, low, high in (found,)
        ]
        sets = "holdout" if entry["holdout"] else "tuning"
        print(f"{sets:8}{name}{witness:12}{'  '.join(spans) or 'absent'}  {end}".rstrip())


def behind(rows: list[dict[str, Any]]) -> list[str]:
    """By which witnesses model guidance falls behind CFG in the mean AS of the default clustering, in words."""
    found = []
    for witness, figures in WITNESSES:
        means = {
            method: known_interval(
                [row.get(figures["AS"]) for row in rows if row["method"] == method and row["clustering"] == "default"]
            )
            for method in ("cfg", "model_guidance")
        }
        cfg, guided = means["cfg"], means["model_guidance"]
        if cfg and guided and guided[0] < cfg[0]:
            found.append(f"by {witness} model guidance (AS {guided[0]:.3f}) is behind CFG ({cfg[0]:.3f})")
    return found


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
    asked: Asked = JudgeName.auto,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Run the table and print it row by row, then the means."""
    speaks = judge.settled(asked)
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
        for part in split_settings(
            Job(recipe, settings, checkpoints, base, workspace, clusterings, clique_limit, speaks)
        )
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
    found = behind(rows)
    if found:
        print("\n".join(found))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
