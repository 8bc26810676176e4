"""`lora-audit similar`: which adapters of the workspace are nearly the same as one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import JsonOption, print_json, result_console
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config


@configured("workspace")
def similar(
    config: Config,
    what: Annotated[str, typer.Argument(metavar="FILE|ITEM", help="An adapter, or an item of the catalog.")],
    least: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Cosine from which one counts as near. \\[default: 0.9]")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Rows at most.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Say which adapters of the workspace are re-saves of one: in another precision, alpha, spelling or rank, or mixed.

    [bold]Example[/bold]: lora-audit similar civitai:12345:67890:55555

    What each changes is compared by a sketch, which crawls make of what they store. Exit code 0, also where none is
    near; 2 for what has no sketch.
    """
    from audit.api import is_item
    from audit.errors import CheckpointError
    from audit.models.checkpoint import open_checkpoint
    from audit.models.experts import PAIR
    from audit.models.sketches.sketch import NEAR
    from audit.similar import attempt, make_up, nearest
    from audit.workspace import Workspace
    from crawlers.catalog import Catalog

    workspace = Workspace(config.workspace, create=False)
    make_up(workspace)
    path = Catalog(workspace).entry(what).path if is_item(Path(what)) else Path(what)
    checkpoint = open_checkpoint(path)
    if {*PAIR} <= {*checkpoint.files}:
        raise CheckpointError(f"{what} is two files, which a crawl keeps as two: ask for one of them")
    files = list(checkpoint.files.values()) if checkpoint.format.is_adapter else []
    sketch = attempt(files, what).sketch
    if sketch is None:
        raise CheckpointError(f"{what} has no sketch: it is no adapter whose change its tensors alone determine")
    found = nearest(workspace, sketch.vector.tolist(), NEAR if least is None else least, limit, checkpoint.identity)
    if as_json:
        print_json(
            {"identity": checkpoint.identity, "modules": sketch.modules, "left_out": sketch.left_out,
             "norm": sketch.norm, "near": [asdict(one) for one in found]}
        )  # fmt: skip
        return
    if not found:
        say("nothing in the workspace is near to it: 'lora-audit crawl' fills it, --least lowers the bar")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("cosine", "name", "items", "audits")
    for one in found:
        cells = (f"{one.cosine:.4f}", one.name or "", ", ".join(one.item_ids[:5]), ", ".join(one.audit_ids[:5]))
        table.add_row(*(escape(cell) for cell in cells))
    result_console().print(table)
