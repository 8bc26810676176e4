"""The long table of a study, a row a finished cell, and what is made of it: means with intervals, and files.

Intervals are over sets: the cells of a set are one draw (bootstrap of means of sets, Efron and Tibshirani 1993, chapter
13); with one set there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from audit.errors import StudyError
from audit.files import make_folder, whole_file
from audit.workspace import Workspace

LONG = """
SELECT c.study, c.cell_id, c.few_shot, c.fine_tune_id, c.audit_id, s.base, f.family, f.method, f.layout, f.rank,
    f.targets, f.text_encoder, f.prior, f.steps, f.optimiser_steps, f.lr, f.batch, f.schedule, f.n0, f.augmentation,
    f.defence, f.filter_kept, f.noise_multiplier, f.repeat, c.extraction, c.w, c.k, c.images, c.captions,
    c.caption_share, c.clustering, c.lora_scale, c.rule, c.evidence,
    a.images AS sampled, a.evaluations, a.weight_change, a.prediction_change, a.descriptor, a.threshold,
    t.average_similarity, t.extraction_rate_07, t.extraction_rate_06, t.ceiling,
    o.average_similarity AS control_similarity, o.extraction_rate_07 AS control_rate_07,
    o.extraction_rate_06 AS control_rate_06, c."references", c.recalled, c.innocent, c.accused,
    q.base_training_loss, q.training_loss, q.base_held_out_loss, q.held_out_loss, q.similarity, q.sharpness,
    q.epsilon,
    f.final_loss, f.seconds AS training_seconds, a.seconds_sampling, a.device, a.tells_nothing, c.finished_at
FROM study_cells AS c
JOIN studies AS s USING (study)
JOIN fine_tunes AS f USING (fine_tune_id)
JOIN audits AS a USING (audit_id)
LEFT JOIN evaluations AS t ON t.audit_id = c.audit_id AND t.kind = 'training'
LEFT JOIN evaluations AS o ON o.audit_id = c.audit_id AND o.kind = 'control'
LEFT JOIN quality AS q ON q.fine_tune_id = c.fine_tune_id
WHERE c.study = ? ORDER BY f.method, c.few_shot, c.cell_id
"""
FIGURES = {
    "average_similarity": "AS", "extraction_rate_07": "A-ESR 0.7", "extraction_rate_06": "A-ESR 0.6",
    "control_similarity": "control AS", "control_rate_07": "control A-ESR 0.7",
}  # fmt: skip
COSTS = {
    "similarity": "similarity of samples", "sharpness": "sharpness", "training_loss": "training loss",
    "held_out_loss": "held-out loss", "base_held_out_loss": "held-out loss, base", "epsilon": "epsilon",
}  # fmt: skip
GAINED = ("average_similarity", "extraction_rate_07")
Row = dict[str, Any]


def long_table(workspace: Workspace, study: str) -> pa.Table:
    """The long table of a study. Raises StudyError where nothing of it is finished."""
    found = workspace.select(LONG, [study])
    if not found.num_rows:
        raise StudyError(f"nothing of the study {study!r} is finished in {workspace.files}: run it first")
    return found


def export_study(workspace: Workspace, study: str, folder: Path) -> list[Path]:
    """Write the long table as Parquet, CSV and JSON into ``folder``, in place of older ones; the files.

    The JSON has the varied factors too: the study's tables can be made of it alone.
    """
    table = long_table(workspace, study)
    make_folder(folder)
    files = [folder / f"{study}.{kind}" for kind in ("parquet", "csv", "json")]
    with whole_file(files[0]) as file:
        pq.write_table(table, file, compression="zstd")
    times = table.column("finished_at").cast(pa.string())
    plain = table.set_column(table.schema.get_field_index("finished_at"), "finished_at", times)
    with whole_file(files[1]) as file:
        pyarrow.csv.write_csv(plain, file)
    [known] = workspace.rows("SELECT varied FROM studies WHERE study = ?", [study])
    document = {"study": study, "varied": known["varied"], "columns": plain.to_pydict()}
    with whole_file(files[2]) as file:
        file.write(json.dumps(document, indent=0, allow_nan=False).encode() + b"\n")
    return files


@dataclass(frozen=True)
class Interval:
    """A mean over sets, its 95 % bootstrap interval (None of one set), and how many sets and cells it is of."""

    mean: float
    low: float | None
    high: float | None
    sets: int
    cells: int

    def text(self, digits: int = 2, sign: str = "") -> str:
        """For people."""
        kind = f"{sign}.{digits}f"
        span = f" ({self.low:{kind}} to {self.high:{kind}})" if self.low is not None else ""
        return f"{self.mean:{kind}}{span}"


def interval(rows: Iterable[Row], figure: str, draws: int = 4000, seed: int = 0) -> Interval | None:
    """The mean of a figure over sets, of rows that have it; None where none has."""
    by_set: dict[str, list[float]] = {}
    for row in rows:
        if row[figure] is not None:
            by_set.setdefault(row["few_shot"], []).append(float(row[figure]))
    if not by_set:
        return None
    means = np.array([np.mean(values) for values in by_set.values()])
    cells = sum(map(len, by_set.values()))
    if len(means) == 1:
        return Interval(float(means[0]), None, None, 1, cells)
    drawn = means[np.random.default_rng(seed).integers(len(means), size=(draws, len(means)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(means.mean()), float(low), float(high), len(means), cells)


def grouped(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values in the columns ``names``, in the order of numbers, and of words as they come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(found.items(), key=lambda one: tuple(map(_order, one[0]))))


def _order(value: Any) -> tuple[int, float, str]:
    if value is None:
        return 2, 0.0, ""
    if isinstance(value, int | float):
        return 0, float(value), ""
    first = {"none": "", "direct": "0", "cfg": "1", "model-guidance": "2", "known": "0", "partial": "1"}
    return 1, 0.0, first.get(str(value), str(value))


def shown(name: str, value: Any) -> str:
    """A level in words."""
    if value is None:
        return "auto" if name == "w" else "does not apply"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class ResultTable:
    """A table for the page and for CSV: a title, a head, rows of texts, and what the paper says of it."""

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def means_table(
    name: str,
    title: str,
    rows: Sequence[Row],
    by: Sequence[str],
    note: str = "",
    paper: Callable[[Row], str] | None = None,
) -> ResultTable:
    """AS and A-ESR by the columns ``by``, each with its interval, and those of the control.

    ``paper`` says of the levels of a line what the paper says of it, for a last column.
    """
    lines = []
    for key, some in grouped(rows, by).items():
        found = {figure: interval(some, figure) for figure in FIGURES}
        size = next((one for one in found.values() if one is not None), None)
        lines.append([
            *(shown(column, value) for column, value in zip(by, key, strict=True)),
            str(size.sets if size else 0), str(len(some)), *(one.text() if one else "" for one in found.values()),
            *([paper(dict(zip(by, key, strict=True)))] if paper else []),
        ])  # fmt: skip
    head = [*by, "sets", "cells", *FIGURES.values(), *(["the paper"] if paper else [])]
    return ResultTable(name, title, head, lines, note)


def gains_table(rows: Sequence[Row]) -> ResultTable | None:
    """Model guidance less each other method, paired by set; None where it is not among others."""
    lines = []
    for (method,), mine in grouped(rows, ["method"]).items():
        of = {key[0]: _by_set(some) for key, some in grouped(mine, ["extraction"]).items()}
        guided = of.pop("model-guidance", {})
        for other, theirs in of.items():
            both = [
                {"few_shot": name, **{figure: guided[name][figure] - theirs[name][figure] for figure in GAINED}}
                for name in sorted(guided.keys() & theirs.keys())
            ]  # fmt: skip
            if both:
                found = [interval(both, figure) for figure in GAINED]
                means = [float(np.mean([one[n]["extraction_rate_07"] for n in one])) for one in (guided, theirs)]
                lines.append([
                    method, other, str(len(both)), *(one.text(2, "+") if one else "" for one in found),
                    f"{means[0] / means[1]:.1f}" if means[1] else "none of the other's", "+0.02 to +0.05", "about 2",
                ])  # fmt: skip
    head = ["method", "less", "sets", "AS", "A-ESR 0.7", "A-ESR 0.7, times", "AS, the paper", "times, the paper"]
    title = "Main table: model guidance less the other method, paired by set"
    return ResultTable("gains", title, head, lines) if lines else None


def _by_set(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Means of AS and A-ESR a set, of sets that have both."""
    found = {}
    for (name,), some in grouped(rows, ["few_shot"]).items():
        known = [row for row in some if all(row[figure] is not None for figure in GAINED)]
        if known:
            found[name] = {figure: float(np.mean([row[figure] for row in known])) for figure in GAINED}
    return found


def costs_table(name: str, title: str, rows: Sequence[Row], by: Sequence[str], note: str = "") -> ResultTable:
    """What fine-tunes are worth to their owners beside what leaks, by the columns ``by``."""
    lines = []
    for key, some in grouped(rows, by).items():
        figures = {"extraction_rate_07": "A-ESR 0.7", **COSTS}
        found = [interval(some, figure) for figure in figures]
        lines.append([
            *(shown(column, value) for column, value in zip(by, key, strict=True)),
            str(len({row["few_shot"] for row in some})), *(one.text(3) if one else "" for one in found),
        ])  # fmt: skip
    return ResultTable(name, title, [*by, "sets", "A-ESR 0.7", *COSTS.values()], lines, note)


def verdicts_table(rows: Sequence[Row]) -> ResultTable | None:
    """Recall and false accusations by rule and evidence; None where nothing was asked."""
    asked = [row for row in rows if row["references"] is not None]
    if not asked:
        return None
    by, lines = ["method", "extraction", "rule", "evidence"], []
    for key, some in grouped(asked, by).items():
        total: Callable[[str], int] = lambda name, some=some: sum(row[name] for row in some)  # type: ignore[misc]  # noqa: E731
        lines.append([
            *(shown(column, value) for column, value in zip(by, key, strict=True)), str(len(some)),
            f"{total('recalled')} of {total('references')}", f"{total('accused')} of {total('innocent')}",
        ])  # fmt: skip
    return ResultTable(
        "verdicts", "What is called a match", [*by, "cells", "training pictures", "held-out pictures: wrongly"], lines,
        "Held-out pictures were asked about beside the training pictures: a match among them is a false accusation.",
    )  # fmt: skip
