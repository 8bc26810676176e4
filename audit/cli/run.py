"""`lora-audit run`: audit what the catalog holds, on this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from audit.cli.common import (
    EXIT_ALL_FAILED,
    EXIT_MATCHES_FOUND,
    JsonOption,
    console,
    leave,
    print_json,
)
from audit.cli.logs import Seldom, is_quiet, is_structured, tell
from audit.cli.options import configured
from audit.config import Config
from audit.states import Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from audit.engine.state import RunState

log = logging.getLogger(__name__)


@configured(
    "references", "bases", "base_configs", "descriptor", "settings.*", "verdict.*", "run.*", "workspace", "operator",
    "signing_key",
)  # fmt: skip
def run(config: Config, as_json: JsonOption = False) -> None:
    """Audit everything in the catalog that has no result yet under the configuration.

    It can be stopped, killed and run again at any time: what is done is kept, and partial audits go on where they were.
    SIGTERM drains: nothing new begins, running audits have --drain-seconds to finish, exit code 0.
    Finished audits that lack a reference set named here, were weighed with other decoys, or lack their page, are
    matched and reported, not sampled again. A match is one at the rate over all audits of the run; a page speaks of its
    audit alone.

    Exit codes: 0 no match, 10 a match, 11 every audit tells nothing, 12 no match, and no verdict of an audit (too few
    decoys), 13 no match, and something stands out in an audit (possible), 3 every audit failed, 2 bad input.

    [bold]Example[/bold]: lora-audit run --engine ray --base sd1=sd15 --references portfolio --where "source = 'folder'"
    """
    from audit import api
    from audit.cli.crawl import serve_metrics
    from audit.cli.custody import custody_of

    custody = custody_of(config)
    serve_metrics(config.run.metrics_port, config.run.metrics_address)
    out = console()
    display = _Display(out)
    stop = threading.Event()
    handlers = drain_on_signals(stop)
    try:
        with display, redirect_stdout(sys.stderr):  # Ray prints to stdout, which is for --json
            state = api.run(config, display.tell, stop, custody)
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
    said = Verdict.uncalibrated if state.uncalibrated else Verdict.possible if state.possible else None
    leave(said, bool(state.finished) and state.told_nothing == state.finished)


def drain_on_signals(stop: threading.Event) -> dict[int, Any]:
    """SIGTERM and the first SIGINT drain; a second SIGINT interrupts."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def drain(number: int, frame: FrameType | None) -> None:
        stop.set()
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
    by_chance = f", {state.expected:.2g} of {state.compared} by chance" if state.compared and state.matches else ""
    tell(
        log,
        f"{state.finished} audits done, {state.matched_audits} with matches ({state.matches} pictures{by_chance}), "
        f"{state.failed} failed, {state.quarantined} quarantined, {state.retries} tried again; "
        f"{state.images} images, {state.gpu_hours:.2f} worker hours",
        run_id=state.run_id, finished=state.finished, matched_audits=state.matched_audits, failed=state.failed,
        quarantined=state.quarantined, uncalibrated=state.uncalibrated, possible=state.possible,
        expected=state.expected,
    )  # fmt: skip
    if state.matched and not is_structured():
        table = Table("checkpoint", "pictures", "sets", "page", title="with matches")
        for one in state.matched[:50]:
            table.add_row(escape(one["name"]), str(one["matches"]), str(one["matched_sets"]), escape(one["page"]))
        out.print(table)
        if len(state.matched) > 50:
            out.print(f"and {state.matched_audits - 50} more")
    if state.told_nothing:
        log.warning("%d audits tell nothing: what they sampled are no pictures", state.told_nothing)
    if state.uncalibrated:
        log.warning("%d audits have no verdict: their pages say what decoys they lack", state.uncalibrated)
    if state.possible:
        log.info("%d audits have no match, and something that stands out: possible", state.possible)
    if state.index:
        log.info("all of them: %s", state.index)
    for reason, count in state.skipped.items():
        log.warning("%d skipped: %s", count, reason)
    if state.failed or state.quarantined:
        log.warning("reasons: lora-audit failures")
