"""`lora-audit match`: compare finished audits with reference sets, without a model."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from audit.cli.common import (
    JsonOption,
    console,
    leave,
    print_json,
    progress_display,
)
from audit.cli.logs import is_structured, tell
from audit.cli.options import configured
from audit.config import Config

log = logging.getLogger(__name__)


@configured("references", "verdict.*", "workspace", "operator", "signing_key")
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

    A match is one at the rate over all audits that are compared. Exit codes: 0 no match, 10 a match, 11 every
    audit tells nothing, 12 no match, and no verdict of an audit (too few decoys), 13 no match, and something stands out
    in an audit (possible), 2 bad input.
    """
    from rich.markup import escape
    from rich.table import Table

    from audit import api
    from audit.cli.custody import custody_of
    from audit.errors import ConfigError
    from audit.report.index import in_words
    from audit.states import Verdict

    if not config.references:
        raise ConfigError("no reference set is named: give --references NAME, or references in the configuration")
    out, custody = console(), custody_of(config)
    with progress_display(out) as progress:
        compared = api.match(
            config.references, audits, workspace=config.workspace, rule=config.verdict.rule, fdr=config.verdict.fdr,
            custody=custody, progress=progress,
        )  # fmt: skip
    found = compared.found
    matched = found.those(Verdict.match)
    if as_json:
        print_json(compared.as_dict())
    else:
        table = Table("checkpoint", "pictures", "sets", "page", title="with matches")
        for one in matched:
            table.add_row(escape(one.name), str(one.matches), str(one.matched_sets), escape(one.page))
        if table.row_count and not is_structured():
            out.print(table)
        verdicts = {one.page: one.verdict for one in found.answers}
        tell(log, "%s", in_words(found), verdicts=verdicts, compared=found.compared, expected=found.expected)
        for reason, count in compared.left_out.items():
            log.warning("%d left out: %s", count, reason)
    said = next((one for one in (Verdict.match, Verdict.uncalibrated, Verdict.possible) if found.those(one)), None)
    leave(said, bool(found.answers) and all(one.tells_nothing for one in found.answers))
