"""`lora-audit study`: fine-tune few-shot sets under given factors, audit them, and show what follows."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import EXIT_ALL_FAILED, JsonOption, console, print_json, progress_display, result_console
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config, EngineName

if TYPE_CHECKING:
    from audit.study.plan import Plan
    from audit.study.results import ResultTable
    from audit.study.run import Finished

log = logging.getLogger(__name__)
app = typer.Typer(
    no_args_is_help=True, help="Experiments as data: fine-tunes of few-shot sets, their audits, tables and figures."
)
Workers = Annotated[
    int,
    typer.Option(min=1, max=64, help="Processes of the local engine, each with its share of the cores' threads."),
]
ENGINE = tuple(
    f"run.{name}"
    for name in (
        "engine", "address", "device", "min_workers", "max_workers", "gpus_per_worker", "cpus_per_worker", "attempts",
        "sample_deadline", "drain_seconds",
    )
)  # fmt: skip
Name = Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")]


@app.command()
@configured(*ENGINE, "workspace")
def run(
    config: Config,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study file, TOML (docs/study.md).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with counts and an estimate, and stop.")
    ] = False,
    workers: Workers = 1,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune, audit and report what a study file asks for; what is done already is left alone.

    With --engine ray its fine-tunes and their audits are spread over a Ray cluster, beside others' audits; SIGTERM and
    SIGINT drain it. Stopping it loses nothing: the same command, or resume, goes on where it was. A study that was
    begun with another file, other pictures or another base is refused.

    [bold]Example[/bold]: lora-audit study run examples/paper-nano.toml
    """
    from audit.study.plan import plan_of, read_study

    study = read_study(file)
    plan = plan_of(study, file.parent)
    if dry_run:
        _show_plan(plan, config.workspace, as_json)
        return
    _go(config, plan, file.parent, workers, as_json)


@app.command()
@configured(*ENGINE, "workspace")
def resume(config: Config, study: Name, workers: Workers = 1, as_json: JsonOption = False) -> None:
    """Go on with a study as it was begun, whatever its file says now, and report it."""
    from audit.study.plan import plan_of
    from audit.study.run import begun
    from audit.workspace import Workspace

    known, beside = begun(Workspace(config.workspace, create=False), study)
    _go(config, plan_of(known, beside), beside, workers, as_json)


def _go(config: Config, plan: Plan, beside: Path, workers: int, as_json: bool) -> None:
    from audit.cli.run import drain_on_signals
    from audit.study.report import report_study
    from audit.study.run import run_study
    from audit.workspace import Workspace

    workspace = Workspace(config.workspace)
    stop = threading.Event()
    on_ray = config.run.engine is EngineName.ray
    if on_ray and workers > 1:
        raise typer.BadParameter("--workers is of the local engine: with --engine ray give --max-workers")
    handlers = drain_on_signals(stop) if on_ray else {}
    try:
        with progress_display(console()) as tell, redirect_stdout(sys.stderr):  # Ray prints to stdout
            finished = run_study(plan, workspace, beside, workers=workers, run=config.run, stop=stop, tell=tell)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for reason in finished.failed:
        log.error("failed: %s", reason)
    if workspace.rows("SELECT 1 FROM study_cells WHERE study = ? LIMIT 1", [plan.study.name]):
        reported = report_study(workspace, plan.study.name)
        _show(reported.as_dict() | _counts(finished), reported.tables, as_json)
    if finished.failed:
        log.error("%d failed; 'lora-audit study resume %s' tries them again", len(finished.failed), plan.study.name)
        raise typer.Exit(EXIT_ALL_FAILED)


def _counts(finished: Finished) -> dict[str, Any]:
    return {"trained": finished.fine_tunes, "audited": finished.audits, "failed": finished.failed}


@app.command()
@configured("workspace")
def report(config: Config, study: Name, as_json: JsonOption = False) -> None:
    """Write tables, figures and the page of a study again, of what is finished of it.

    Figures want matplotlib: pip install 'lora-audit\\[plots]'.
    """
    from audit.study.report import report_study
    from audit.workspace import Workspace

    reported = report_study(Workspace(config.workspace, create=False), study)
    _show(reported.as_dict(), reported.tables, as_json)


@app.command()
@configured("workspace")
def export(
    config: Config,
    study: Name,
    out: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder: STUDY.parquet, .csv and .json are written there.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write the long table of a study, a row an audit with every factor and figure, as Parquet, CSV and JSON."""
    from audit.errors import StudyError
    from audit.locations import is_remote, shown
    from audit.study.results import export_study
    from audit.workspace import Workspace

    if is_remote(out):
        raise StudyError(f"{shown(out)} is no folder of this machine: a study is exported to one")
    files = export_study(Workspace(config.workspace, create=False), study, Path(out))
    if as_json:
        print_json({"files": [str(one) for one in files]})
        return
    for one in files:
        say(one)


@app.command()
@configured("workspace")
def catalog(config: Config, as_json: JsonOption = False) -> None:
    """How much leaks of what was crawled and audited: by base model, rank, steps, N0 and captions. Nothing is trained.

    A share over many audits, with intervals; no verdict on any checkpoint.
    """
    from audit.study.leakage import report_catalog
    from audit.workspace import Workspace

    reported = report_catalog(Workspace(config.workspace, create=False))
    _show(reported.as_dict(), reported.tables, as_json)


def _show(document: dict[str, Any], tables: list[ResultTable], as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    from rich.markup import escape
    from rich.table import Table

    out = result_console()
    for one in tables:
        shown = Table(*(escape(cell) for cell in one.head), title=escape(one.title), title_justify="left")
        for row in one.rows:
            shown.add_row(*(escape(cell) for cell in row))
        out.print(shown)
    say(document["page"])


def _show_plan(plan: Plan, workspace: str, as_json: bool) -> None:
    from audit.study.estimate import estimate

    found = estimate(plan, workspace)
    if as_json:
        print_json(found.as_dict())
        return
    for line in found.lines():
        say(line)
