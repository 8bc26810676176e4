"""`lora-audit query`: SQL over the workspace's tables."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from audit.cli.common import JsonOption, print_json, result_console
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config
from audit.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST_CELL = 80  # at a terminal


class RowFormat(StrEnum):
    """How rows are printed."""

    table = "table"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"
    parquet = "parquet"


@configured("workspace")
def query(
    config: Config,
    sql: Annotated[str, typer.Argument(help='A DuckDB statement. Quote "references": the word is reserved.')],
    format_: Annotated[
        RowFormat, typer.Option("--format", help="jsonl is an object a line; parquet goes into a file.")
    ] = RowFormat.table,
    as_json: JsonOption = False,
) -> None:
    """Run SQL over the workspace's tables.

    They are checkpoints, captions, asked, audits, generations, control_generations, extractions, "references",
    matches, memberships, chances, set_chances, evaluations and failures.

    [bold]Example[/bold]: lora-audit query "SELECT checkpoint_name, reference_set, p
    FROM audits JOIN set_chances USING (audit_id) ORDER BY p" --format csv

    nearest('SET', TOP, 'AUDIT') is a table, too: the TOP references (3) of a set that are nearest to each extraction,
    of audits that begin so (all).

    Columns are described in audit/schemas.py. The statement can read the tables and nothing else. Bytes are printed as
    hex. Where two columns have one name, JSON and Parquet number the second. Piped, a table is not cut.
    """
    import duckdb

    from audit.cli.rows import as_csv, as_json_lines, as_json_rows, as_parquet
    from audit.errors import WorkspaceError
    from audit.references.nearest import answered
    from audit.workspace import Workspace

    if as_json and format_ not in (RowFormat.table, RowFormat.json):
        raise typer.BadParameter(f"--json and --format {format_} contradict each other", param_hint="--format")
    if format_ is RowFormat.parquet and sys.stdout.isatty():
        raise typer.BadParameter("Parquet is no text: redirect it into a file", param_hint="--format")
    try:
        rows = answered(Workspace(config.workspace, reading=True, create=False), sql)
    except duckdb.Error as error:
        raise WorkspaceError(f"the query failed: {error}") from error
    if as_json or format_ is RowFormat.json:
        print_json(as_json_rows(rows))
    elif format_ is RowFormat.parquet:
        typer.echo(as_parquet(rows), nl=False)
    elif format_ in (RowFormat.csv, RowFormat.jsonl):
        for line in as_csv(rows) if format_ is RowFormat.csv else as_json_lines(rows):
            typer.echo(printable(line) if sys.stdout.isatty() else line, color=True)  # color: exact, also in a pipe
    else:
        _show(rows)


def _show(rows: pa.Table) -> None:
    from rich.markup import escape
    from rich.table import Table

    from audit.cli.rows import cell, rows_of

    if not rows.num_rows:
        say("no rows")
        return
    out = result_console()
    table = Table(*map(escape, rows.column_names))
    for row in rows_of(rows):
        texts = [cell(value) for value in row]
        if out.is_terminal:
            texts = [text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 3] + "..." for text in texts]
        table.add_row(*map(escape, texts))
    out.print(table)
