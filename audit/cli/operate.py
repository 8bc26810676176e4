"""`lora-audit status`, `failures`, `compact` and `config show`: what an operator asks of a workspace."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from audit.cli.common import (
    EXIT_DAMAGED,
    JsonOption,
    console,
    print_json,
    progress_display,
    result_console,
)
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config

if TYPE_CHECKING:
    pass

config_app = typer.Typer(no_args_is_help=True, help="The configuration.")


@configured("workspace")
def status(config: Config, as_json: JsonOption = False) -> None:
    """What the workspace holds, and what runs are doing."""
    from rich.markup import escape
    from rich.table import Table

    from audit import upkeep
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=True, create=False)
    found = upkeep.status(opened)
    if as_json:
        print_json(found.as_dict())
        return
    out = result_console()
    table = Table("source", "state", "items", title="catalog")
    for row in found.catalog:
        table.add_row(escape(row["source"]), escape(row["state"]), str(row["items"]))
    out.print(table)
    last = f", the last at {found.last:%Y-%m-%d %H:%M} UTC" if found.last else ""
    alike = f"{found.alike_audits} with pictures that look like a reference (no verdict)"
    totals = f"{found.audits} audits, {alike}, {found.images} images{last}"
    out.print(totals, highlight=False)
    for row in found.failures:
        out.print(f"{row['audits']} {row['state']} (lora-audit failures)", highlight=False)
    for run, alive in found.runs:
        sign = "running" if alive else ("lost" if run.state == "running" else run.state)
        out.print(
            f"run {escape(run.run_id)} on {escape(run.host)}, shard {escape(run.shard)}, "
            f"since {datetime.fromtimestamp(run.started_at, UTC):%Y-%m-%d %H:%M} UTC: "
            f"{sign}, {run.finished} done, {run.failed} failed, {run.quarantined} quarantined, "
            f"{run.waiting} waiting, {run.workers} workers", highlight=False,
        )  # fmt: skip


@configured("workspace")
def failures(
    config: Config,
    retry: Annotated[bool, typer.Option("--retry", help="Let the next run try all of these again.")] = False,
    kind: Annotated[
        str | None,
        typer.Option(help="Only these: input, worker-died, device-lost, deadline, out-of-memory, storage, error."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Audits that failed, grouped by reason.

    A file that has failed under several configurations counts once, with what was said of it last; [bold]--retry[/bold]
    releases it under all of them.
    """
    from rich.markup import escape
    from rich.table import Table

    from audit import upkeep
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=not retry, create=False)
    found = upkeep.failures(opened, kind, retry)
    if as_json:
        print_json(found.as_dict())
        return
    if not found.groups:
        say("no audit has failed")
        return
    table = Table("audits", "state", "kind", "the newest reason", "of", "at (UTC)")
    for group in found.groups:
        table.add_row(
            str(group.audits), escape(group.state), escape(group.kind), escape(group.newest_reason[:400]),
            escape(group.items[0]),
            f"{group.newest_at:%Y-%m-%d %H:%M}",
        )  # fmt: skip
    result_console().print(table)
    if retry:
        say(f"{found.forgiven} audits will be tried again by the next run")


@configured("workspace")
def compact(
    config: Config,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Give up the rows of files that cannot be read, and remove them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the small files of every table, and remove what earlier merges have replaced."""
    from audit.schemas import TABLES
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, create=False)
    merged = {table: opened.compact(table, drop_damaged, every=True) for table in TABLES}
    files = {table: len(opened.keys(table)) for table in TABLES}
    if as_json:
        print_json({"merged": merged, "files": files})
        return
    for table in TABLES:
        say(f"{table}: {merged[table]} files merged, {files[table]} now")


def verify_workspace(config: Config, as_json: bool) -> None:
    """Print what is damaged in the workspace; exit code 1 where something is."""
    from audit import upkeep
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=True, create=False)
    with progress_display(console()) as progress:
        problems = upkeep.verify(opened, progress)
    if as_json:
        print_json({"problems": [asdict(one) for one in problems]})
    else:
        for one in problems[:100]:
            say(f"{one.where}: {one.problem}")
        say(f"{len(problems)} problems" if problems else "everything is as recorded")
    if problems:
        raise typer.Exit(EXIT_DAMAGED)


@config_app.command("show")
@configured("workspace")
def config_show(config: Config, as_json: JsonOption = False) -> None:
    """The configuration in force, with what every setting means: file, environment and --set taken together."""
    from rich.markup import escape
    from rich.table import Table

    from audit.config import leaves, variable_of
    from audit.files import shown as location_shown
    from audit.locations import plain_without_credentials, without_credentials

    config = replace(config, workspace=location_shown(config.workspace))
    if as_json:
        print_json(plain_without_credentials(asdict(config)))
        return
    table = Table("setting", "value", "meaning", "environment")
    for dotted, (value, text) in leaves(config):
        shown = (
            "auto"
            if dotted == "settings.w" and value is None
            else ("" if value is None else without_credentials(str(value)))
        )
        table.add_row(dotted, escape(shown), escape(text), variable_of(dotted))
    result_console().print(table)
