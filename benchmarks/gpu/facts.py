"""Facts as they come: each is a line on standard output and at once in the JSON file, so that a cut-off run keeps them.

The file holds the command, every fact (measured, skipped for want of time, or failed), and every bound with whether it
held. ``python -m benchmarks.gpu.show FILE`` prints it as a table.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

Figure = float | int | str | bool | None
Figures = Mapping[str, Figure]

TINY_COST = 0.1  # of a step's estimate, which is for real sizes on an H100


class State(StrEnum):
    """What became of a step."""

    measured = "measured"
    skipped = "skipped"
    failed = "failed"


@dataclass(frozen=True)
class Fact:
    """One step of a part: ``at`` seconds after the start, its figures by names that end in their units."""

    part: str
    name: str
    at: float
    state: State
    figures: Figures

    def line(self) -> str:
        """The fact as a line."""
        shown = ", ".join(f"{name} {shown_figure(figure)}" for name, figure in self.figures.items())
        mark = "" if self.state is State.measured else f" {self.state.upper()}"
        return f"[{self.at:6.1f} s] {self.part}: {self.name}:{mark} {shown}"


@dataclass(frozen=True)
class Bound:
    """A claim on a figure. ``counted`` is False for claims on speed away from a GPU or at toy size."""

    part: str
    name: str
    figure: Figure
    limit: str
    held: bool
    counted: bool


@dataclass
class Results:
    """Everything of one run, as the JSON file holds it."""

    command: Figures
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    facts: list[Fact] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    ended: bool = False

    @property
    def failed(self) -> list[Fact]:
        """The steps that failed."""
        return [fact for fact in self.facts if fact.state is State.failed]

    @property
    def broken(self) -> list[Bound]:
        """The bounds that count and did not hold."""
        return [bound for bound in self.bounds if bound.counted and not bound.held]

    def write(self, file: Path) -> None:
        """Replace ``file`` as a whole: whoever reads it sees one state or the next."""
        partial = file.with_name(f"{file.name}.part")
        partial.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n")
        os.replace(partial, file)


class Record:
    """Takes facts and bounds, keeps the time, and lets a step run only where its estimate fits into what is left."""

    def __init__(self, command: Figures, seconds: float, file: Path, tiny: bool, speed_counts: bool) -> None:
        self.results = Results(command)
        self.file, self.seconds, self.tiny, self.speed_counts = file, seconds, tiny, speed_counts
        self.part = ""
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def last(self) -> Figures:
        """The figures of the last fact."""
        return self.results.facts[-1].figures

    def say(self, name: str, figures: Figures, state: State = State.measured) -> None:
        """Keep and print one fact."""
        fact = Fact(self.part, name, round(self.elapsed, 2), state, dict(figures))
        self.results.facts.append(fact)
        self._flush(fact.line())

    def bound(
        self,
        name: str,
        figure: Figure,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        equal: Figure = None,
        speed: bool = False,
    ) -> None:
        """Keep whether ``figure`` holds its bound; NaN and None never do. ``speed`` counts on a GPU at real size."""
        number = figure if isinstance(figure, (int, float)) else float("nan")
        if at_least is not None:
            limit, held = f"at least {at_least:g}", number >= at_least
        elif at_most is not None:
            limit, held = f"at most {at_most:g}", number <= at_most
        else:
            limit, held = f"{shown_figure(equal)}", figure == equal
        bound = Bound(self.part, name, figure, limit, bool(held), self.speed_counts or not speed)
        self.results.bounds.append(bound)
        verdict = "holds" if held else "BROKEN" if bound.counted else "not held (does not count here)"
        self._flush(f"           {self.part}: bound: {name} {shown_figure(figure)}, {limit}: {verdict}")

    def fits(self, name: str, cost: float) -> bool:
        """Whether a step that takes about ``cost`` seconds at real size fits; where it does not, it is said."""
        cost = cost * TINY_COST if self.tiny else cost
        left = self.seconds - self.elapsed
        if cost <= left:
            return True
        self.say(name, {"needs_s": cost, "left_s": round(max(left, 0.0), 1)}, State.skipped)
        return False

    def step(self, name: str, cost: float, measure: Callable[[], Figures]) -> bool:
        """Run ``measure`` where it fits and keep what it returns; whether it did. An error becomes a failed fact."""
        if not self.fits(name, cost):
            return False
        began = time.monotonic()
        try:
            figures = measure()
        except Exception as error:
            self._failed(name, error)
            return False
        self.say(name, {**figures, "step_s": round(time.monotonic() - began, 2)})
        return True

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The facts inside are of ``part``; an error becomes a failed fact."""
        self.part = part
        try:
            yield
        except Exception as error:
            self._failed("the part", error)

    def end(self) -> int:
        """Close the file; the exit code: 1 where a step failed or a bound that counts is broken."""
        results = self.results
        results.ended = True
        self.part = "end"
        skipped = sum(fact.state is State.skipped for fact in results.facts)
        figures: Figures = {"failed": len(results.failed), "broken": len(results.broken), "skipped": skipped}
        self.say("all parts", figures)
        for fact in results.failed:
            print(f"FAILED {fact.part}: {fact.name}", flush=True)
        for bound in results.broken:
            print(f"BROKEN {bound.part}: {bound.name} is {shown_figure(bound.figure)}, not {bound.limit}", flush=True)
        return 1 if results.failed or results.broken else 0

    def _failed(self, name: str, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        text = " ".join(str(error).split())[:400]
        self.say(name, {"error": type(error).__name__, "text": text, "where": where}, State.failed)

    def _flush(self, line: str) -> None:
        print(line, flush=True)
        self.results.write(self.file)


def shown_figure(figure: Figure) -> str:
    """A figure with four digits at most behind the first."""
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)
