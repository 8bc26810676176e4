"""Markdown tables of docs/results.md from the JSON files that the benchmarks write.

python -m benchmarks.tables extraction.json clustering.json sampling.json steps.json weights.json results/judge.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.study.paper import markdown as study_markdown
from benchmarks.extraction import gains, is_plain, summary
from benchmarks.flow_tables import flow
from benchmarks.judge import QUANTILES, VIEWS, key, shown

FIGURES = ("AS", "A-ESR 0.7", "A-ESR 0.6", "control AS", "control A-ESR 0.7")

OF_OTHERS = (("control_a_esr", "control A-ESR"), ("near_a_esr", "near-miss A-ESR"))
GAINED = tuple(f"SSCD {view} {title}" for view in VIEWS for title in ("AS", "A-ESR"))
BESIDE = tuple(f"SSCD {view} {title}" for view in VIEWS for title in ("AS", "A-ESR", "ceiling"))
RANKING = ("precision_at_n0", "average_precision", "as", "extractions")


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _span(figure: tuple[float, float, float], digits: int = 3, sign: str = "") -> str:
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in figure)
    return f"{mean} ({low} to {high})"


def _judged(entry: dict[str, Any], sign: str = "") -> list[str]:
    """What both views say in a row of means or of gains: AS and A-ESR."""
    spans = [(entry.get(key(view, figure)), digits) for view in VIEWS for figure, digits in (("as", 3), ("a_esr", 2))]
    return ["absent" if span is None else _span(span, digits, sign) for span, digits in spans]


def _others(entry: dict[str, Any]) -> list[str]:
    """The A-ESR of controls and of near-misses, which are false accusations: by nano and by both views."""
    keys = ["control_a_esr_07", "near_a_esr_07", *(key(view, figure) for view in VIEWS for figure, _ in OF_OTHERS)]
    return [shown((entry.get(one) or [None])[0], 3) for one in keys]


def _beside(row: dict[str, Any]) -> list[str]:
    """What both views say of one row."""
    figures = (("as", 3), ("a_esr", 2), ("ceiling", 3))
    return [shown(row.get(key(view, figure)), digits) for view in VIEWS for figure, digits in figures]


def _w(row: dict[str, Any]) -> str:
    return "" if row["method"] == "direct" else str(row["w"] or "auto")


def extraction(rows: list[dict[str, Any]]) -> str:
    """Means over sets, gains, ranking, and every checkpoint."""
    parts = []
    order = {"direct": 0, "cfg": 1, "model_guidance": 2}
    means = sorted(
        summary(rows), key=lambda e: (e["holdout"], e["tuning"] != "lora", e["clustering"], order[e["method"]])
    )
    for holdout in (False, True):
        name = "Holdout sets" if holdout else "Tuning sets"
        group = [entry for entry in means if entry["holdout"] is holdout]
        if group:
            parts.append(f"**{name}** ({group[0]['sets']}), mean and 95 % bootstrap interval over sets:\n")
            parts.append(
                table(
                    ("fine-tune", "clustering", "method", "w", *FIGURES),
                    (
                        (
                            entry["tuning"], entry["clustering"], entry["method"].replace("_", " "), _w(entry),
                            _span(entry["as"]), _span(entry["a_esr_07"], 2), _span(entry["a_esr_06"], 2),
                            f"{entry['control_as'][0]:.3f}", f"{entry['control_a_esr_07'][0]:.3f}",
                        )
                        for entry in group
                    ),
                )
            )  # fmt: skip
            parts.append(f"{name}, the same by SSCD:\n")
            parts.append(
                table(
                    ("fine-tune", "clustering", "method", *GAINED),
                    (
                        (entry["tuning"], entry["clustering"], entry["method"].replace("_", " "), *_judged(entry))
                        for entry in group
                    ),
                )
            )
            parts.append(f"{name}, false accusations:\n")
            titles = [f"{witness} {title}" for witness in ("nano", "SSCD native", "SSCD 288") for _, title in OF_OTHERS]
            parts.append(
                table(
                    ("fine-tune", "clustering", "method", *titles),
                    (
                        (entry["tuning"], entry["clustering"], entry["method"].replace("_", " "), *_others(entry))
                        for entry in group
                    ),
                )
            )
    parts.append("**Model guidance less the other method**, paired by checkpoint:\n")
    parts.append(
        table(
            (
                "sets", "clustering", "less", "AS", "A-ESR 0.7", "A-ESR 0.6",
                *GAINED,
            ),
            (
                (
                    "holdout" if entry["holdout"] else "tuning", entry["clustering"], entry["over"],
                    _span(entry["as"], 3, "+"), _span(entry["a_esr_07"], 2, "+"), _span(entry["a_esr_06"], 2, "+"),
                    *_judged(entry, "+"),
                )
                for entry in gains(rows)
            ),
        )
    )  # fmt: skip
    parts.append("**Order of the extractions** (model guidance; N0 unknown to the default, known to the paper's):\n")
    plain = [row for row in rows if is_plain(row) and row["method"] == "model_guidance"]

    def mean(figure: str, holdout: bool, clustering: str) -> str:
        values = [row[figure] for row in plain if (row["holdout"], row["clustering"]) == (holdout, clustering)]
        return f"{sum(values) / len(values):.3f}"

    parts.append(
        table(
            ("sets", "clustering", "precision at N0", "average precision", "AS", "extractions"),
            (
                (
                    "holdout" if holdout else "tuning",
                    clustering,
                    *(mean(f"ranking_{f}", holdout, clustering) for f in RANKING),
                )
                for holdout in (False, True)
                for clustering in ("default", "paper")
                if any((row["holdout"], row["clustering"]) == (holdout, clustering) for row in plain)
            ),
        )
    )
    parts.append("**Every checkpoint** (default clustering):\n")
    parts.append(
        table(
            ("checkpoint", "holdout", "method", "w", *FIGURES, "ceiling", *BESIDE, "images", "s"),
            (
                (
                    row["checkpoint"], "yes" if row["holdout"] else "", row["method"].replace("_", " "), _w(row),
                    f"{row['as']:.3f}", f"{row['a_esr_07']:.2f}", f"{row['a_esr_06']:.2f}", f"{row['control_as']:.3f}",
                    f"{row['control_a_esr_07']:.2f}", f"{row['ceiling']:.3f}", *_beside(row), row["images"],
                    f"{row['seconds']:.0f}",
                )
                for row in sorted(rows, key=lambda row: (row["holdout"], row["checkpoint"], order[row["method"]]))
                if row["clustering"] == "default"
            ),
        )
    )  # fmt: skip
    return "\n".join(parts)


def clustering(rows: list[dict[str, Any]]) -> str:
    """Both algorithms at every size."""
    return table(
        ("images", "N0", "algorithm", "seconds", "clusters", "AS", "A-ESR 0.7", *BESIDE, "timed out"),
        (
            (
                row["n"], row["n0"], row["algorithm"], f"{row['seconds']:.2f}", row["clusters"] or "none",
                "" if row["as"] is None else f"{row['as']:.3f}",
                "" if row["a_esr_07"] is None else f"{row['a_esr_07']:.2f}", *_beside(row),
                "yes" if row["timed_out"] else "no",
            )
            for row in rows
        ),
    )  # fmt: skip


def sampling(figures: dict[str, Any]) -> str:
    """Rates and the parts of an image's time."""
    rates = table(
        ("steps", "threads", "images/s", "plain loop", "times faster", "share of the floor", "not evaluation"),
        [
            (
                figures["steps"], figures["threads"], f"{figures['images_per_second']:.2f}",
                f"{figures['plain_loop_images_per_second']:.2f}", f"{figures['times_faster']:.2f}",
                f"{figures['share_of_floor']:.0%}", f"{figures['other_than_evaluations']:.1%}",
            )
        ],
    )  # fmt: skip
    parts = figures["parts"]
    return rates + "\nMilliseconds an image:\n\n" + table(parts, [[f"{1000 * value:.2f}" for value in parts.values()]])


def settings(rows: list[dict[str, Any]]) -> str:
    """Means a setting, tuning sets and holdout sets."""
    lines = []
    for solver, steps, w in dict.fromkeys((row["solver"], row["steps"], row["w"]) for row in rows):
        cells: list[str] = []
        for holdout in (False, True):
            group = [
                row
                for row in rows
                if (row["solver"], row["steps"], row["w"], row["holdout"]) == (solver, steps, w, holdout)
            ]
            for name in ("as", "a_esr_07", *(key(view, figure) for view in VIEWS for figure in ("as", "a_esr"))):
                values = [row.get(name) for row in group]
                known = [value for value in values if value is not None]
                cells.append("" if not group else shown(sum(known) / len(known) if known else None, 3))
        lines.append((solver, steps, w or "auto", *cells))
    titles = ("AS", "A-ESR", *GAINED)
    sets = [f"{title}, {part}" for part in ("tuning", "holdout") for title in titles]
    return table(("solver", "steps", "w", *sets), lines)


def calibration(content: dict[str, Any]) -> str:
    """How often the judge's thresholds err."""
    return table(
        ("view", "above", "sets", "pictures", "number", "passing", *(f"{round(100 * one)} %" for one in QUANTILES)),
        (
            (
                view, f"{figures['threshold']:.2f}", part, kind, one["pictures"], f"{one['above']:.1%}",
                *(f"{value:.2f}" for value in one["quantiles"]),
            )
            for view, figures in content["views"].items()
            for part in ("tuning", "holdout")
            for kind, one in figures[part].items()
        ),
    )  # fmt: skip


def markdown(path: Path) -> str:
    """The tables of one benchmark's JSON file, told apart by its keys."""
    content = json.loads(path.read_text())
    if isinstance(content, dict) and "columns" in content:
        return study_markdown(path)
    if isinstance(content, dict) and "remembered" in content:
        return flow(content, table)
    if isinstance(content, dict):
        return calibration(content) if "views" in content else sampling(content)
    if "algorithm" in content[0]:
        return clustering(content)
    if "direct" in {row["method"] for row in content}:
        return extraction(content)
    return settings(content)


def main(files: Annotated[list[Path], typer.Argument(help="JSON files of the benchmarks.")]) -> None:
    """Print the tables."""
    for path in files:
        print(f"<!-- {path.stem} -->\n\n{markdown(path)}")


if __name__ == "__main__":
    typer.run(main)
