"""`lora-audit run`: audit what the catalog holds, on this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import EXIT_ALL_FAILED, EXIT_MATCHES_FOUND, EXIT_TELLS_NOTHING, JsonOption, console, print_json
from audit.cli.logs import Seldom, is_quiet, is_structured, tell
from audit.config import EngineName, Priority, RunSettings

if TYPE_CHECKING:
    from rich.console import Console

    from audit.engine.run import Run, RunState

log = logging.getLogger(__name__)
ConfigFile = Annotated[Path | None, typer.Option("--config", envvar="LORA_AUDIT_CONFIG", help="A TOML or YAML file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as settings.steps=25.")
]
Where = Annotated[
    str | None, typer.Option("--workspace", help="Where all results are: a folder, or s3://bucket/prefix.")
]


def _run(name: str, **limits: Any) -> Any:
    return typer.Option(help=str(RunSettings.__dataclass_fields__[name].metadata["help"]), **limits)


def overrides_of(sets: list[str] | None, **named: Any) -> dict[str, Any]:
    """Dotted settings from --set and from options of their own. Raises typer.BadParameter."""
    found: dict[str, Any] = {}
    for one in sets or []:
        name, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r}: write NAME=VALUE", param_hint="--set")
        found[name.strip()] = value.strip()
    return found | {name.replace("__", "."): value for name, value in named.items() if value is not None}


def run(
    config: ConfigFile = None,
    engine: Annotated[EngineName | None, _run("engine")] = None,
    address: Annotated[str | None, _run("address")] = None,
    where: Annotated[str | None, _run("where", metavar="SQL")] = None,
    limit: Annotated[int | None, _run("limit", min=1)] = None,
    shard: Annotated[str | None, _run("shard", metavar="I/N")] = None,
    max_gpu_hours: Annotated[float | None, _run("max_gpu_hours", min=0)] = None,
    priority: Annotated[Priority | None, _run("priority")] = None,
    references: Annotated[
        list[str] | None, typer.Option(help="A reference set of the workspace to match with. Repeat for several.")
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAMILY=SOURCE", help="The base model of a family: sd1=sd15, sd1=owner/name@COMMIT, or a folder."
        ),
    ] = None,
    descriptor: Annotated[str | None, typer.Option(help="sscd, nano, pdq, or a file. [default: sscd]")] = None,
    min_workers: Annotated[int | None, _run("min_workers", min=0)] = None,
    max_workers: Annotated[int | None, _run("max_workers", min=1)] = None,
    gpus_per_worker: Annotated[float | None, _run("gpus_per_worker", min=0)] = None,
    cpus_per_worker: Annotated[float | None, _run("cpus_per_worker", min=0)] = None,
    metrics_port: Annotated[int | None, _run("metrics_port", min=0, max=65535)] = None,
    metrics_address: Annotated[str | None, _run("metrics_address")] = None,
    sets: Set = None,
    workspace: Where = None,
    as_json: JsonOption = False,
) -> None:
    """Audit everything in the catalog that has no result yet under the configuration.

    It can be stopped, killed and run again at any time: what is done is kept, and partial audits go on where they were.
    SIGTERM drains: nothing new begins, running audits have --set run.drain_seconds to finish, exit code 0.
    Finished audits that lack a reference set named here, or their page, are matched and reported, not sampled again.

    Exit codes: 0 nothing found, 10 matches found, 11 every audit tells nothing, 3 every audit failed, 2 bad input.

    [bold]Example[/bold]: lora-audit run --engine ray --base sd1=sd15 --references portfolio --where "source = 'folder'"
    """
    from audit.cli.crawl import serve_metrics
    from audit.config import load_config
    from audit.engine.run import Run
    from audit.errors import ConfigError
    from audit.locations import without_credentials

    named: dict[str, Any] = {
        "run__engine": engine, "run__address": address, "run__where": where, "run__limit": limit, "run__shard": shard,
        "run__max_gpu_hours": max_gpu_hours, "run__priority": priority, "run__min_workers": min_workers,
        "run__max_workers": max_workers, "run__gpus_per_worker": gpus_per_worker,
        "run__cpus_per_worker": cpus_per_worker, "run__metrics_port": metrics_port,
        "run__metrics_address": metrics_address,
        "references": tuple(references) if references else None, "descriptor": descriptor, "workspace": workspace,
    }  # fmt: skip
    overrides = overrides_of(sets, **named)
    for one in base or []:
        family, equals, source = one.partition("=")
        if not equals or not source:
            raise typer.BadParameter(
                f"{without_credentials(one)!r}: write FAMILY=SOURCE, such as sd1=folder", param_hint="--base"
            )
        overrides[f"bases.{family}"] = source
    loaded = load_config(config, None, overrides)
    if not loaded.bases:
        raise ConfigError("no base model is configured: give --base FAMILY=SOURCE, or [bases] in the configuration")
    serve_metrics(loaded.run.metrics_port, loaded.run.metrics_address)
    out = console()
    display = _Display(out)
    running = Run(loaded, display.tell)
    handlers = _drain_on_signals(running)
    try:
        with display, redirect_stdout(sys.stderr):  # Ray prints to stdout, which is for --json
            state = running.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if as_json:
        print_json(asdict(state))
    else:
        show_state(state)
    if state.matched_audits:
        raise typer.Exit(EXIT_MATCHES_FOUND)
    if (state.failed or state.quarantined) and not state.finished:
        raise typer.Exit(EXIT_ALL_FAILED)
    if state.finished and state.told_nothing == state.finished:
        raise typer.Exit(EXIT_TELLS_NOTHING)


def _drain_on_signals(running: Run) -> dict[int, Any]:
    """SIGTERM and the first SIGINT drain; a second SIGINT interrupts."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def drain(number: int, frame: FrameType | None) -> None:
        running.stop.set()
        log.info("draining: running audits finish or keep what they have; nothing new begins")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, drain)
    return before


class _Display:
    """Progress at a terminal, else a log line every 10 seconds."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self._seldom = Seldom()
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Display:
        if self.out.is_terminal and not is_structured() and not is_quiet():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.out)
            self._bar.start()
            self._audits = self._bar.add_task("audits", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, state: RunState) -> None:
        """Show ``state``."""
        ended = state.finished + state.failed + state.quarantined
        if self._bar:
            self._bar.update(
                self._audits, completed=ended, total=ended + state.waiting + state.running,
                description=self._line(state),
            )  # fmt: skip
        elif self._seldom.due() or not state.running + state.waiting:
            tell(
                log, "%s", self._line(state), run_id=state.run_id, finished=state.finished, failed=state.failed,
                quarantined=state.quarantined, waiting=state.waiting, running=state.running, workers=state.workers,
                images=state.images,
            )  # fmt: skip

    def _line(self, state: RunState) -> str:
        seconds = max(1e-9, time.monotonic() - self._started)
        use = state.busy_seconds / seconds / max(1, state.workers)
        ended = state.finished + state.failed + state.quarantined
        left = state.waiting + state.running
        rest = f", {left * seconds / ended:.0f} s left" if ended and left else ""
        return (
            f"{state.finished} done, {state.failed} failed, {state.quarantined} quarantined, {left} to go; "
            f"{state.workers} workers {min(1.0, use):.0%} busy, {state.images / seconds:.1f} images/s{rest}"
        )


def show_state(state: RunState) -> None:
    """The end of a run, for a person."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    tell(
        log,
        f"{state.finished} audits done, {state.matched_audits} with matches ({state.matches} pictures), "
        f"{state.failed} failed, {state.quarantined} quarantined, {state.retries} tried again; "
        f"{state.images} images, {state.gpu_hours:.2f} worker hours",
        run_id=state.run_id, finished=state.finished, matched_audits=state.matched_audits, failed=state.failed,
        quarantined=state.quarantined,
    )  # fmt: skip
    if state.matched and not is_structured():
        table = Table("checkpoint", "pictures", "page", title="with matches")
        ordered = sorted(state.matched, key=lambda one: -one["matches"])
        for one in ordered[:50]:
            table.add_row(escape(one["name"]), str(one["matches"]), escape(one["page"]))
        out.print(table)
        if len(ordered) > 50:
            out.print(f"and {state.matched_audits - 50} more")
    if state.told_nothing:
        log.warning("%d audits tell nothing: what they sampled are no pictures", state.told_nothing)
    if state.index:
        log.info("all of them: %s", state.index)
    for reason, count in state.skipped.items():
        log.warning("%d skipped: %s", count, reason)
    if state.failed or state.quarantined:
        log.warning("reasons: lora-audit failures")
