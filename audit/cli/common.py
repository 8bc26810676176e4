"""What the commands share: exit codes, common options, progress on stderr."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from audit.matching import SkippedImage

EXIT_BAD_INPUT = 2
EXIT_MATCHES_FOUND = 10
EXIT_STOPPED = 130

DESCRIPTOR_HELP = "sscd, nano, pdq, or the path of a TorchScript or ONNX file."
DEFAULT_WORKSPACE = "lora-audit-workspace"

WorkspaceOption = Annotated[
    str,
    typer.Option(
        "--workspace", envvar="LORA_AUDIT_WORKSPACE", help="Where all results are: a folder, or s3://bucket/prefix."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]


def console() -> Console:
    """The console for people: stderr, so that stdout stays clean for --json."""
    from rich.console import Console

    return Console(stderr=True)


PIPED_WIDTH = 100_000  # columns of what is not a terminal: a line is as long as it is


def result_console() -> Console:
    """The console for results: stdout. Where it is no terminal, nothing is wrapped or cut."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def print_json(value: Any) -> None:
    """One JSON document on stdout; what is not finite is null."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_display(out: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A callable for (stage, done, total): bars with images/s and time left, or plain lines without a terminal."""
    if not out.is_terminal:
        yield _plain_lines(out)
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


def _plain_lines(out: Console) -> Callable[[str, int, int], None]:
    started: dict[str, tuple[float, int]] = {}
    printed: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began, first = started.setdefault(stage, (now, done))
        if (done < total or not total) and now - printed.get(stage, -1e9) < 10:
            return
        printed[stage] = now
        speed = (done - first) / (now - began) if now > began else 0.0
        extra = (
            f", {speed:.1f} images/s, {(total - done) / speed:.0f} s left" if speed > 0 and stage in PER_IMAGE else ""
        )
        out.print(f"{stage} {done}/{total}{extra}" if total else f"{stage} {done}", highlight=False)

    return tell


def tell_skipped(out: Console, skipped: list[SkippedImage]) -> None:
    """Name the pictures that were passed over, and why."""
    from rich.markup import escape

    for one in skipped[:20]:
        out.print(f"[yellow]passed over[/yellow] {escape(one.name)}: {escape(one.reason)}", highlight=False)
    if len(skipped) > 20:
        out.print(f"[yellow]passed over[/yellow] {len(skipped) - 20} more")


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
