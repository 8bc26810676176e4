"""What the commands share: exit codes, common options, progress on stderr."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.logs import Seldom, is_quiet, is_structured, tell
from audit.states import Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from audit.references import SkippedImage

log = logging.getLogger(__name__)
EXIT_DAMAGED = 1
EXIT_BAD_INPUT = 2
EXIT_ALL_FAILED = 3
EXIT_MATCHES_FOUND = 10
EXIT_TELLS_NOTHING = 11
EXIT_UNCALIBRATED = 12  # no match, and of a set that was asked about there is no verdict
EXIT_POSSIBLE = 13  # no match, and something stands out
EXIT_STOPPED = 130


def leave(said: Verdict | None, tells_nothing: bool) -> None:
    """End with the exit code that a verdict calls for: what is not known of one set comes before what is possible."""
    codes: dict[Verdict | None, int] = {Verdict.uncalibrated: EXIT_UNCALIBRATED, Verdict.possible: EXIT_POSSIBLE}
    code = EXIT_MATCHES_FOUND if said is Verdict.match else EXIT_TELLS_NOTHING if tells_nothing else codes.get(said, 0)
    if code:
        raise typer.Exit(code)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]


def console() -> Console:
    """The console for people: stderr, so that stdout stays clean for --json."""
    from audit.cli.text import SafeConsole

    return SafeConsole(stderr=True)


PIPED_WIDTH = 100_000  # columns of what is not a terminal: a line is as long as it is


def result_console(width: int = PIPED_WIDTH) -> Console:
    """The console for results: stdout. Where it is no terminal, lines have ``width`` columns: nothing is cut."""
    from audit.cli.text import SafeConsole

    out = SafeConsole()
    return out if out.is_terminal else SafeConsole(width=width)


def print_json(value: Any) -> None:
    """One JSON document on stdout; numbers that are not finite, which JSON has not, are null."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))  # it escapes what is not ASCII


def _finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite, as a value or as a key's text."""
    if hasattr(value, "tolist"):  # an array or a number of numpy's
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {_key(name): _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_finite(one) for one in value]
    return value


def _key(name: Any) -> Any:
    return name if name is None or isinstance(name, (str, int, bool)) else str(name)


@contextmanager
def progress_display(out: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A callable for (stage, done, total): bars with images/s and time left, or lines of the log without a terminal."""
    if is_quiet():
        yield lambda stage, done, total: None
        return
    if not out.is_terminal or is_structured():
        yield _plain_lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} images/s" if speed and task.description in PER_IMAGE else "")

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=out) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield tell


PER_IMAGE = ("sampling", "describing")


def _plain_lines() -> Callable[[str, int, int], None]:
    started: dict[str, tuple[float, int]] = {}
    seldom = Seldom()

    def line(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began, first = started.setdefault(stage, (now, done))
        if not seldom.due(stage) and (done < total or not total):
            return
        speed = (done - first) / (now - began) if now > began else 0.0
        extra = (
            f", {speed:.1f} images/s, {(total - done) / speed:.0f} s left" if speed > 0 and stage in PER_IMAGE else ""
        )
        text = f"{stage} {done}/{total}{extra}" if total else f"{stage} {done}"
        tell(log, "%s", text, stage=stage, done=done, total=total or None)

    return line


def tell_skipped(skipped: list[SkippedImage]) -> None:
    """Name the files that were passed over, and why; those of one ending, which are no pictures, in one line."""
    endings = Counter(one.reason for one in skipped if "ending" in one.reason)
    told = [one for one in skipped if one.reason not in endings]
    for one in told[:20]:
        log.warning("passed over %s: %s", one.name, one.reason)
    if len(told) > 20:
        log.warning("passed over %d more", len(told) - 20)
    for reason, count in endings.most_common(20):
        log.warning("passed over %d files: %s", count, reason)


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    from audit.devices import default_device as found

    return found()
