"""The command line: one file a noun. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from audit.cli import (
    captions,
    catalog,
    crawl,
    custody,
    demo,
    estimate,
    inspect,
    match,
    operate,
    query,
    references,
    report,
    run,
    scan,
    similar,
    study,
    tables,
)
from audit.cli.common import EXIT_BAD_INPUT, EXIT_STOPPED
from audit.cli.logs import LogFormat, configure, hoisted

log = logging.getLogger(__name__)

app = typer.Typer(
    name="lora-audit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Which images was this fine-tuned diffusion model trained on?

    [bold]lora-audit demo[/bold] shows it on the small model that comes along; [bold]lora-audit scan[/bold] audits a
    file of yours.

    Exit codes: 0 no match, 10 a match, 11 the audit tells nothing, 12 no verdict (too few decoys), 13 possible: no
    match, and something stands out, 2 bad input, 130 stopped (the same command goes on where it was).
    """,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from audit import __version__

        typer.echo(f"lora-audit {__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    verbose: Annotated[bool, typer.Option("--verbose", help="Tell more on stderr; errors with their origin.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings, errors and results.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="LORA_AUDIT_LOG_FORMAT", help="json: every line on stderr is a JSON object.")
    ] = LogFormat.text,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set up the log for every command."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet contradict each other")
    configure(verbose, quiet, log_format)


app.command("scan")(scan.scan)
app.command("inspect")(inspect.inspect)
app.command("similar")(similar.similar)
app.command("captions")(captions.captions)
app.command("demo")(demo.demo)
app.command("report")(report.report)
app.command("match")(match.match)
app.command("query")(query.query)
app.command("run")(run.run)
app.command("estimate")(estimate.estimate)
app.command("status")(operate.status)
app.command("failures")(operate.failures)
app.command("verify")(custody.verify)
app.command("sign")(custody.sign)
app.command("reproduce")(custody.reproduce)
app.command("compact")(operate.compact)
app.command("export")(tables.export)
app.command("migrate")(tables.migrate)
app.add_typer(operate.config_app, name="config")
app.add_typer(references.app, name="references")
app.add_typer(crawl.app, name="crawl")
app.add_typer(catalog.app, name="catalog")
app.add_typer(study.app, name="study")


def main() -> None:
    """Run the command line; errors a user can mend become one message and exit code 2."""
    from audit.errors import AuditError

    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notices are for developers; ours name the mend
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        app(args=hoisted(sys.argv[1:]))
    except AuditError as error:
        log.error("%s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        sys.exit(EXIT_BAD_INPUT)
    except Exception as error:  # a fault of ours; its text may hold names of strangers, so the log prints it
        log.critical("unexpected %s: %s", type(error).__name__, error, exc_info=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == EXIT_STOPPED:
            log.error("stopped; what is done is kept, and the same command goes on from there")
        raise
