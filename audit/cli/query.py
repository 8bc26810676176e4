"""`lora-audit query`: SQL over the workspace's tables."""

from __future__ import annotations

from typing import Annotated

import typer

from audit.cli.common import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, print_json


def query(
    sql: Annotated[str, typer.Argument(help='A DuckDB statement. Quote "references": the word is reserved.')],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Run SQL over the workspace's tables.

    They are checkpoints, captions, audits, generations, extractions, "references", matches and evaluations.

    [bold]Example[/bold]: lora-audit query "SELECT checkpoint_name, count(DISTINCT reference_id)
    FROM audits JOIN matches USING (audit_id)
    WHERE is_match GROUP BY ALL"

    Columns are described in audit/schemas.py. The statement can read the tables and nothing else.
    """
    import duckdb

    from audit.errors import WorkspaceError
    from audit.storage import Workspace

    try:
        rows = Workspace(workspace, reading=True).rows(sql)
    except duckdb.Error as error:
        raise WorkspaceError(f"the query failed: {error}") from error
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        typer.echo("no rows")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(escape(_short(value)) for value in row.values()))
    Console().print(table)


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
