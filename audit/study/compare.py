"""Which audits of a study are compared: those that differ in nothing but what a table or figure is about.

A study need not be a cross product: a reference with one factor after the other beside it is one too. There the mean
over all cells of a level would be a mean over what else was varied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from audit.study.factors import FACTORS
from audit.study.results import Row

PLAIN = ("augmentation", "defence", "captions")  # whose default is the reference wherever there is one


def applies(name: str, row: Row) -> bool:
    """Whether a factor has a level in a row."""
    other, levels = FACTORS[name][1].metadata.get("only", (None, ()))
    return other is None or row[other] in levels


def dependents(name: str) -> list[str]:
    """The factors that apply at some levels of ``name`` alone."""
    return [one for one, (_, known) in FACTORS.items() if known.metadata.get("only", (None, ()))[0] == name]


def usual(rows: Sequence[Row], name: str) -> dict[str, set[Any]]:
    """By method the levels that most rows have; of several those that are most frequent over all methods.

    Of PLAIN factors it is the default, where a method has it: what is not defended, and whose captions are known.
    """
    everywhere = _most([row[name] for row in rows if applies(name, row)])
    found = {}
    for method in {row["method"] for row in rows}:
        levels = [row[name] for row in rows if row["method"] == method and applies(name, row)]
        default = FACTORS[name][1].default
        own = {default} if name in PLAIN and default in levels else _most(levels)
        found[method] = own & everywhere or own
    return found


def _most(levels: Iterable[Any]) -> set[Any]:
    counted = Counter(levels)
    return {level for level, times in counted.items() if times == max(counted.values())}


def at_usual(rows: Sequence[Row], names: Iterable[str]) -> list[Row]:
    """The rows that have the usual level of each of the factors ``names`` that applies to them."""
    known = {name: usual(rows, name) for name in names}
    return [
        row for row in rows
        if all(not applies(name, row) or row[name] in levels[row["method"]] for name, levels in known.items())
    ]  # fmt: skip


def alike_but(rows: Sequence[Row], name: str, varied: Sequence[str]) -> list[Row]:
    """The rows to which factor ``name`` applies and beside which another differs in it alone, of the ``varied`` ones.

    Factors that depend on it have their usual level.
    """
    mine = set(dependents(name))
    kept = at_usual([row for row in rows if applies(name, row)], [one for one in varied if one in mine])
    others = ["few_shot", "method", *(one for one in varied if one not in mine)]
    if name in others:
        others.remove(name)
    levels: dict[tuple[Any, ...], set[Any]] = {}
    for row in kept:
        levels.setdefault(tuple(row[one] for one in others), set()).add(row[name])
    return [row for row in kept if len(levels[tuple(row[one] for one in others)]) > 1]
