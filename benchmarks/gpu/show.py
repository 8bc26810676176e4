"""The Markdown table of a results file: ``python -m benchmarks.gpu.show FILE``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.facts import Bound, Fact, Results, State, shown_figure


def read(file: Path) -> Results:
    """A results file. Raises ValueError where it is none."""
    try:
        held = json.loads(file.read_text())
        held["facts"] = [Fact(**fact | {"state": State(fact["state"])}) for fact in held["facts"]]
        held["bounds"] = [Bound(**bound) for bound in held["bounds"]]
        return Results(**held)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no results file of benchmarks.gpu: {str(error)[:200]}") from error


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(results: Results) -> str:
    """When and how it was run, the facts, and the bounds."""
    command = ", ".join(f"{name} {value}" for name, value in results.command.items())
    parts = [f"Begun {results.started}; {command}{'' if results.ended else '; CUT OFF before its end'}.\n"]
    parts.append(table(("part", "what", "figures"), (_row(fact) for fact in results.facts)))
    if results.bounds:
        rows = (
            (bound.part, bound.name, shown_figure(bound.figure), bound.limit, _verdict(bound))
            for bound in results.bounds
        )
        parts.append(table(("part", "bound", "figure", "limit", "holds"), rows))
    return "\n".join(parts)


def _row(fact: Fact) -> tuple[str, str, str]:
    figures = ", ".join(f"{name} {shown_figure(value)}" for name, value in fact.figures.items() if name != "step_s")
    state = "" if fact.state is State.measured else f"**{fact.state}** "
    return fact.part, fact.name, state + figures


def _verdict(bound: Bound) -> str:
    return ("yes" if bound.held else "**no**") + ("" if bound.counted else " (not counted)")


def main(file: Annotated[Path, typer.Argument(help="A file that benchmarks.gpu wrote.")]) -> None:
    """Print the tables."""
    try:
        print(markdown(read(file)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
