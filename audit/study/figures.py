"""Figures of a study, each as PNG and SVG: bars by method, curves over a factor, recall against strength, ROC.

Drawing needs matplotlib: pip install 'lora-audit[plots]'.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audit.errors import StudyError
from audit.study.compare import alike_but, at_usual
from audit.study.factors import AUDIT
from audit.study.results import Interval, Row, grouped, interval, shown

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")  # Paul Tol's, for all eyes
CURVES = (
    "w", "k", "images", "n0", "steps", "rank", "lr", "lora_scale", "batch", "filter_kept", "noise_multiplier",
    "caption_share",
)  # fmt: skip
LOGARITHMIC = ("images", "steps", "rank", "lr", "batch", "claimed_steps", "training_images")
TITLES = {
    "w": "guidance weight w", "k": "correction term k", "images": "images sampled a training picture",
    "n0": "training pictures N0", "steps": "steps a training picture", "rank": "rank of the LoRA",
    "lr": "learning rate", "lora_scale": "strength of the LoRA", "batch": "pictures a step",
    "extraction": "extraction", "captions": "what the auditor knows of captions", "augmentation": "augmentation",
    "defence": "defence", "filter_kept": "share of directions kept", "noise_multiplier": "noise multiplier",
    "caption_share": "share of words known", "method": "fine-tuning", "layout": "layout of the file",
    "targets": "what the LoRA adapts",
    "text_encoder": "text encoder trained", "prior": "prior preservation", "schedule": "schedule",
    "clustering": "clustering", "rule": "rule", "evidence": "evidence", "repeat": "repetition",
    "family": "family of the base model", "claimed_steps": "steps as claimed, from", "captioned": "captions claimed",
    "training_images": "training pictures as claimed, from",
}  # fmt: skip
MOST_TICKS = 6  # levels that are named at a linear axis
DRAWN = {"average_similarity": "AS", "extraction_rate_07": "A-ESR at 0.7"}


@dataclass(frozen=True)
class Figure:
    """A figure: its file name without ending, what it shows in a sentence, and its bytes in both formats."""

    name: str
    caption: str
    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        """What notebooks show of it."""
        return self.png


def pyplot() -> Any:
    """matplotlib's, drawing without a display. Raises StudyError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise StudyError("figures need matplotlib: pip install 'lora-audit[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    found.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "lora-audit", "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.alpha": 0.3,
        "legend.frameon": False,
    })  # fmt: skip
    return found


def bars(
    name: str, caption: str, rows: Sequence[Row], across: str, within: str, drawn: Mapping[str, str] = DRAWN
) -> Figure:
    """Figures of rows, AS and A-ESR, side by side: a group of bars a level of ``across``, a bar one of ``within``."""
    plt = pyplot()
    figure, panels = _panels(plt, len(drawn))
    groups = [key for (key,) in grouped(rows, [across])]
    parts = [key for (key,) in grouped(rows, [within])] if within != across else [None]
    width = 0.8 / len(parts)
    for axes, (figure_name, title) in zip(panels, drawn.items(), strict=True):
        for number, part in enumerate(parts):
            named = shown(within, part) if within != across else None
            for place, group in enumerate(groups):
                some = [row for row in rows if row[across] == group and (within == across or row[within] == part)]
                found = interval(some, figure_name)
                if found is None:
                    continue
                axes.bar(
                    place + (number - (len(parts) - 1) / 2) * width, found.mean, width * 0.92, yerr=_error(found),
                    color=COLOURS[number % len(COLOURS)], capsize=3, label=named,
                    error_kw={"elinewidth": 1, "ecolor": "#333333"},
                )  # fmt: skip
                named = None  # once in the legend
        axes.set_xticks(range(len(groups)), [shown(across, group) for group in groups])
        axes.set_xlabel(TITLES.get(across, across))
        axes.set_ylabel(title)
        axes.set_ylim(0, 1)
    _legend(figure, panels[0], TITLES.get(within, within))
    return _saved(plt, figure, name, caption)


def curves(
    name: str, caption: str, rows: Sequence[Row], over: str, within: str, drawn: Mapping[str, str] = DRAWN
) -> Figure:
    """The same over a factor of numbers: a line a level of ``within``, its band the interval over sets."""
    plt = pyplot()
    figure, panels = _panels(plt, len(drawn))
    known = [row for row in rows if row[over] is not None]
    for axes, (figure_name, title) in zip(panels, drawn.items(), strict=True):
        for number, ((part,), mine) in enumerate(grouped(known, [within]).items()):
            points = [
                (level, found) for (level,), some in grouped(mine, [over]).items()
                if (found := interval(some, figure_name)) is not None
            ]  # fmt: skip
            colour, levels = COLOURS[number % len(COLOURS)], [level for level, _ in points]
            axes.plot(levels, [one.mean for _, one in points], "o-", color=colour, ms=4, label=shown(within, part))
            low = [one.mean if one.low is None else one.low for _, one in points]
            high = [one.mean if one.high is None else one.high for _, one in points]
            axes.fill_between(levels, low, high, color=colour, alpha=0.15, linewidth=0)
        levels = sorted({row[over] for row in known})
        if over in LOGARITHMIC:
            axes.set_xscale("log")
            axes.minorticks_off()
        if over in LOGARITHMIC or len(levels) <= MOST_TICKS:
            axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.set_xlabel(TITLES.get(over, over))
        axes.set_ylabel(title)
        axes.set_ylim(0, 1)
    _legend(figure, panels[0], TITLES.get(within, within))
    return _saved(plt, figure, name, caption)


def strength(rows: Sequence[Row]) -> Figure:
    """Recall against how far fine-tuning has moved the predictions, a dot a cell."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    markers = {"lora": "o", "dreambooth": "s"}
    for number, ((extraction,), some) in enumerate(grouped(rows, ["extraction"]).items()):
        for (method,), mine in grouped(some, ["method"]).items():
            known = [row for row in mine if row["extraction_rate_07"] is not None]
            axes.scatter(
                [row["prediction_change"] for row in known], [row["extraction_rate_07"] for row in known], s=32,
                alpha=0.75, marker=markers.get(method, "o"), color=COLOURS[number % len(COLOURS)], linewidths=0,
                label=f"{extraction}, {method}",
            )  # fmt: skip
    changes = [row["prediction_change"] for row in rows]
    if max(changes) > 10 * min(changes):
        axes.set_xscale("log")
    axes.set_xlabel("relative change of the prediction by fine-tuning")
    axes.set_ylabel(DRAWN["extraction_rate_07"])
    axes.set_ylim(-0.03, 1.03)
    _legend(figure, axes, "", 2)
    return _saved(
        plt, figure, "recall-by-strength", "Recall against how strongly a model was fine-tuned, a dot an audit."
    )


def cost(rows: Sequence[Row], by: str = "augmentation") -> Figure:
    """What a defence costs: what leaks against what the fine-tune's own samples are worth, a dot a level."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    for axes, (column, title) in zip(
        panels, (("similarity", "similarity of samples to the set"), ("sharpness", "sharpness of samples")), strict=True
    ):
        for number, ((level,), some) in enumerate(grouped(rows, [by]).items()):
            across, up = interval(some, column), interval(some, "extraction_rate_07")
            if across is not None and up is not None:
                axes.errorbar(
                    across.mean, up.mean, xerr=_error(across), yerr=_error(up), fmt="o", capsize=3, elinewidth=1,
                    color=COLOURS[number % len(COLOURS)], label=shown(by, level),
                )  # fmt: skip
        axes.set_xlabel(title)
        axes.set_ylabel(DRAWN["extraction_rate_07"])
        axes.set_ylim(0, 1)
    _legend(figure, panels[0], TITLES.get(by, by))
    return _saved(plt, figure, f"cost-of-{by}", "What leaks, against what the fine-tune is worth to its owner.")


def roc(scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """The receiver operating curve of each kind of evidence: (training pictures' scores, held-out pictures')."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(4.6, 4), layout="constrained")
    for number, (kind, (seen, unseen)) in enumerate(scores.items()):
        false, true = roc_points(seen, unseen)
        area = float(np.trapezoid(true, false))
        axes.plot(false, true, color=COLOURS[number % len(COLOURS)], label=f"{kind}, AUC {area:.2f}")
    axes.plot([0, 1], [0, 1], ":", color="#999999", lw=1)
    axes.set_xlabel("held-out pictures above the threshold")
    axes.set_ylabel("training pictures above it")
    axes.legend(loc="lower right")
    return _saved(plt, figure, "roc", "How well each kind of evidence tells training pictures from held-out ones.")


def roc_points(seen: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from none above it to all; ties count together."""
    values = np.unique(np.concatenate([seen, unseen]))[::-1]
    false = [float((unseen >= one).mean()) for one in values]
    true = [float((seen >= one).mean()) for one in values]
    return np.array([0.0, *false]), np.array([0.0, *true])


def figures_of(rows: Sequence[Row], varied: Sequence[str], scores: dict[str, Any]) -> Iterator[Figure]:
    """The figures that the varied factors of a study ask for."""
    if "extraction" in varied or "method" in varied:
        plain = at_usual(rows, [name for name in varied if name not in ("method", "extraction")])
        yield bars("methods", "Methods of extraction, by how the model was fine-tuned.", plain, "method", "extraction")
    lines = "extraction" if "extraction" in varied else "method"
    for name in varied:
        if name in ("method", "extraction", "rule", "evidence", "repeat"):
            continue
        some = alike_but(rows, name, varied)
        if some and name in CURVES:
            yield curves(f"by-{name}", f"Over the {TITLES[name]}; bands are over sets.", some, name, lines)
        elif some:
            yield bars(f"by-{name}", f"By {TITLES[name]}.", some, name, lines)
    yield strength(rows)
    for name in ("augmentation", "defence"):
        some = alike_but(rows, name, varied) if name in varied else []
        if some:
            yield cost(at_usual(some, [one for one in varied if one in AUDIT]), name)
    if scores:
        yield roc(scores)


def _panels(plt: Any, count: int) -> tuple[Any, Any]:
    figure, panels = plt.subplots(1, count, figsize=(4.6 * count, 3.6), layout="constrained", squeeze=False)
    return figure, panels[0]


def _error(found: Interval) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    return [[max(0.0, found.mean - found.low)], [max(0.0, found.high - found.mean)]]


def _legend(figure: Any, axes: Any, title: str, columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, title=title or None, loc="outside lower center", ncols=min(columns, len(labels)))


def _saved(plt: Any, figure: Any, name: str, caption: str) -> Figure:
    parts = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
        parts.append(buffer.getvalue())
    plt.close(figure)
    return Figure(name, caption, *parts)
