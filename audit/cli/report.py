"""`lora-audit report`: write an audit's page again, or print its facts as JSON."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import JsonOption, leave, print_json
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config

log = logging.getLogger(__name__)


@configured("references", "verdict.*", "workspace", "operator", "signing_key")
def report(
    config: Config,
    audit: Annotated[str, typer.Argument(metavar="AUDIT", help="The audit's id, or its beginning.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes. \\[default: reports/ in the workspace]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report page of a finished audit: one self-contained HTML file.

    It is about the reference sets that are named; without one, about all that the audit was matched with. Named sets,
    and those of a page in reports/, are compared as they are now: nothing is sampled.

    Exit codes: those of scan, 0 no match, 10 a match, 11 the audit tells nothing, 12 no verdict on a set (too few
    decoys), 13 possible: no match, and something stands out, 2 bad input.
    """
    from audit.cli.custody import custody_of
    from audit.custody.keep import sign_written
    from audit.files import whole_file
    from audit.report import collect, write_page
    from audit.report.again import compare_again
    from audit.report.facts import find_audit
    from audit.report.page import render
    from audit.workspace import Workspace

    custody = custody_of(config)
    reading = not config.references and (as_json or output is not None)
    opened = Workspace(config.workspace, reading=reading, create=False)
    if not reading:  # a set that was never compared, or has changed since, would pass for one without a match
        audit = compare_again(opened, find_audit(opened, audit), config.references)
    facts = collect(opened, audit, list(config.references) or None, config.verdict)
    if as_json:
        print_json(facts.as_json())
    elif output is None:
        written = write_page(facts, opened, custody)
        sign_written(opened, written, custody)
        say(written)
    else:
        if custody.key is not None:
            log.warning("%s has no manifest and is not signed: leave --output away for a page in the workspace", output)
        with whole_file(output) as file:
            file.write(render(facts).encode())
        say(output)
    leave(facts.verdict.said, facts.verdict.tells_nothing is not None)
