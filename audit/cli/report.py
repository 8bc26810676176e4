"""`lora-audit report`: write an audit's page again, or print its facts as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import JsonOption, print_json
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config


@configured("references", "workspace")
def report(
    config: Config,
    audit: Annotated[str, typer.Argument(metavar="AUDIT", help="The audit's id, or its beginning.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes. \\[default: reports/ in the workspace]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report page of a finished audit: one self-contained HTML file.

    It is about the reference sets that are named; without one, about all that the audit was matched with.
    """
    from audit.files import whole_file
    from audit.report import collect, write_page
    from audit.report.page import render
    from audit.storage import Workspace

    opened = Workspace(config.workspace, reading=as_json or output is not None, create=False)
    facts = collect(opened, audit, list(config.references) or None)
    if as_json:
        print_json(facts.as_json())
        return
    if output is None:
        say(write_page(facts, opened))
        return
    with whole_file(output) as file:
        file.write(render(facts).encode())
    say(output)
