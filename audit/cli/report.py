"""`lora-audit report`: write an audit's page again, or print its facts as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, print_json
from audit.cli.text import say


def report(
    audit: Annotated[str, typer.Argument(metavar="AUDIT", help="The audit's id, or its beginning.")],
    references: Annotated[
        list[str] | None,
        typer.Option(help="A reference set the page is about. Repeat for several. [default: all it was matched with]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes. [default: reports/ in the workspace]")
    ] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Write the report page of a finished audit: one self-contained HTML file."""
    from audit.files import whole_file
    from audit.report import collect, write_page
    from audit.report.page import render
    from audit.storage import Workspace

    opened = Workspace(workspace, reading=as_json or output is not None, create=False)
    facts = collect(opened, audit, references)
    if as_json:
        print_json(facts.as_json())
        return
    if output is None:
        say(write_page(facts, opened))
        return
    with whole_file(output) as file:
        file.write(render(facts).encode())
    say(output)
