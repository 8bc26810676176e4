"""The tables of docs/results.md about nano-flow: benchmarks/tables.py prints them of the JSON of benchmarks/flow.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

NAMES = {"direct": "direct", "cfg": "cfg (w 3)", "base": "the base alone (cfg, w 3)"}
FIGURES = ("AS", "A-ESR 0.7", "A-ESR 0.6", "control A-ESR 0.7", "SSCD 64 AS", "SSCD 64 A-ESR", "SSCD 64 control A-ESR")
GAINED = (("as", "AS", 3), ("a_esr_07", "A-ESR 0.7", 2), ("sscd_native_as", "SSCD 64 AS", 3),
          ("sscd_native_a_esr", "SSCD 64 A-ESR", 2))  # fmt: skip
Table = Callable[[Iterable[str], Iterable[Iterable[Any]]], str]


def span(figure: Sequence[float] | None, digits: int, sign: str = "") -> str:
    """A mean with its interval."""
    if figure is None:
        return "absent"
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in figure)
    return f"{mean} ({low} to {high})"


def mean(figure: Sequence[float] | None, digits: int) -> str:
    """The mean alone."""
    return "absent" if figure is None else f"{figure[0]:.{digits}f}"


def way(row: dict[str, Any]) -> str:
    """By what was sampled, in words."""
    if row["method"] in NAMES:
        return NAMES[row["method"]]
    w = "auto" if row["w"] is None else f"{row['w']:g}"
    return f"model guidance, w {w}" + (f", k {row['k']:g}" if row["k"] else "")


def means(found: dict[str, Any], table: Table) -> str:
    """Means over sets of every way of sampling."""
    lines = (
        (way(one), span(one["as"], 3), span(one["a_esr_07"], 2), mean(one["a_esr_06"], 2),
         mean(one["control_a_esr_07"], 3), span(one["sscd_native_as"], 3), span(one["sscd_native_a_esr"], 2),
         mean(one["sscd_native_control_a_esr"], 3))
        for one in found["recovered"]
    )  # fmt: skip
    return table(("sampled by", *FIGURES), lines)


def gains(found: dict[str, Any], table: Table) -> str:
    """Model guidance under `--w auto` less every other way, paired by LoRA, by those who judged."""
    known = [part for part in GAINED if any(one[part[0]] is not None for one in found["gained"])]
    lines = ((one["less"], *(span(one[key], digits, "+") for key, _, digits in known)) for one in found["gained"])
    return table(("`--w auto` less", *(title for _, title, _ in known)), lines)


def by_set(found: dict[str, Any], table: Table) -> str:
    """AS and A-ESR of each LoRA; the best of the fixed weights in bold."""
    rows = found["extraction"]
    ways = list(dict.fromkeys(way(row) for row in rows))
    lines = []
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        mine = {way(row): row for row in rows if row["checkpoint"] == name}
        auto = next(row for row in mine.values() if (row["method"], row["w"]) == ("model_guidance", None))
        fixed = {one: row["as"] for one, row in mine.items() if row["method"] == "model_guidance" and row["w"]}
        best = max(fixed, key=lambda one: fixed[one], default=None)
        cells = [f"{mine[one]['as']:.3f}, {mine[one]['a_esr_07']:.2f}" if one in mine else "" for one in ways]
        cells = [f"**{cell}**" if one == best else cell for one, cell in zip(ways, cells, strict=True)]
        title = f"{auto['set']}{' (holdout)' if auto['holdout'] else ''}"
        lines.append([title, f"{auto['prediction_change']:.2f}", f"{auto['w_taken']:.2f}", *cells])
    titles = (
        one.replace("model guidance, ", "").removesuffix(" (cfg, w 3)").replace("cfg (w 3)", "cfg") for one in ways
    )
    return table(("set", "change", "auto's w", *(one.strip() for one in titles)), lines)


def times(found: dict[str, Any], table: Table) -> str:
    """Membership by choice of times, every folder of LoRAs; the best of the last one first."""
    by_choice = {folder: {one["choice"]: one for one in rows} for folder, rows in found["remembered"].items()}
    last = list(found["remembered"].values())[-1]
    lines = []
    for choice in (one["choice"] for one in last):
        some = [rows[choice] for rows in by_choice.values()]
        cells = [cell for one in some for cell in (span(one["auc"], 3), mean(one["tpr_at_fpr_1"], 3))]
        lines.append([choice, " ".join(f"{t / 1000:.2f}" for t in some[0]["times"]), *cells])
    titles = (f"{figure}, {folder}" for folder in by_choice for figure in ("AUC", "TPR"))
    return table(("choice", "t", *titles), lines)


def flow(found: dict[str, Any], table: Table) -> str:
    """All of them."""
    return "\n".join(part(found, table) for part in (means, gains, by_set, times))
