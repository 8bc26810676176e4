"""`lora-audit match`: compare finished audits with reference sets, without a model."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from audit.cli.common import (
    EXIT_MATCHES_FOUND,
    JsonOption,
    console,
    print_json,
    progress_display,
)
from audit.cli.logs import is_structured, tell
from audit.cli.options import configured
from audit.config import Config

log = logging.getLogger(__name__)


@configured("references", "workspace", "operator", "signing_key")
def match(
    config: Config,
    audits: Annotated[
        list[str] | None, typer.Argument(metavar="[AUDIT]...", help="Ids, or their beginnings. \\[default: all]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare finished audits with reference sets that came later, and write their pages. Nothing is sampled.

    Compared are audits whose descriptor is the one that the sets were described by; the others are named.

    [bold]Example[/bold]: lora-audit references add portfolio paintings/ && lora-audit match --references portfolio

    Exit codes: 0 nothing found, 10 matches found, 2 bad input.
    """
    from rich.markup import escape
    from rich.table import Table

    from audit import api
    from audit.cli.custody import custody_of
    from audit.errors import ConfigError

    if not config.references:
        raise ConfigError("no reference set is named: give --references NAME, or references in the configuration")
    out, custody = console(), custody_of(config)
    with progress_display(out) as progress:
        compared = api.match(config.references, audits, workspace=config.workspace, custody=custody, progress=progress)
    answers = compared.answers
    if as_json:
        print_json(compared.as_dict())
    else:
        table = Table("checkpoint", "pictures", "page", title="with matches")
        for one in (one for one in answers if one.matches):
            table.add_row(escape(one.name), str(one.matches), escape(one.page))
        if table.row_count and not is_structured():
            out.print(table)
        with_matches = {one.page: one.matches for one in answers if one.matches}
        tell(log, f"{len(answers)} audits compared, {table.row_count} with matches", matches=with_matches)
        for reason, count in compared.left_out.items():
            log.warning("%d left out: %s", count, reason)
    if any(one.matches for one in answers):
        raise typer.Exit(EXIT_MATCHES_FOUND)
