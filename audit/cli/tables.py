"""`lora-audit migrate` and `lora-audit export`: the workspace's tables as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import JsonOption, print_json
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config


@configured("workspace")
def migrate(config: Config, as_json: JsonOption = False) -> None:
    """Rewrite a workspace of an older version in place.

    Every command that writes does it by itself; this one does nothing else. It can be killed at any point and begun
    again.
    """
    from audit.workspace import Workspace
    from audit.workspace.workspace import VERSION

    opened = Workspace(config.workspace, create=False)
    if as_json:
        print_json({"version": VERSION})
        return
    say(f"{opened.files} is of version {VERSION}, the newest")


@configured("workspace")
def export(
    config: Config,
    out: Annotated[Path, typer.Argument(help="A folder; a file a table is written there, for delta a folder a table.")],
    kind: Annotated[str, typer.Option("--format", help="parquet, csv or delta.")] = "parquet",
    table: Annotated[list[str] | None, typer.Option(help="Only this table. Repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the tables for other programs, as SQL sees them: of the catalog, the newest row of every item.

    [bold]Example[/bold]: lora-audit export --format csv --table matches out
    """
    from audit.errors import WorkspaceError
    from audit.files import make_folder
    from audit.schemas import TABLES
    from audit.workspace import Workspace
    from audit.workspace.export import ExportFormat
    from audit.workspace.export import export as export_table

    try:
        chosen = ExportFormat(kind)
    except ValueError:
        raise WorkspaceError(f"--format {kind!r} is not known: choose parquet, csv or delta") from None
    opened = Workspace(config.workspace, reading=True, create=False)
    make_folder(out)
    written = {name: export_table(opened, name, chosen, out) for name in table or TABLES}
    if as_json:
        print_json({name: {"path": str(path), "rows": rows} for name, (path, rows) in written.items()})
        return
    for path, rows in written.values():
        say(f"{path}: {rows} rows")
