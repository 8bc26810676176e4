"""What both kinds of result pages share: tables as CSV, figures as PNG and SVG, and where it all is."""

from __future__ import annotations

import base64
import csv
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from audit.errors import StudyError
from audit.report.page import environment
from audit.report.pages import FOLDER, keep_sets
from audit.study.figures import Figure
from audit.study.results import ResultTable
from audit.workspace import Workspace

STUDIES = f"{FOLDER}/studies"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What was written: the page, the folder of tables and figures, and the tables themselves."""

    page: str
    folder: str
    tables: list[ResultTable]
    figures: list[str]
    no_figures: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as commands print them."""
        tables = [{"name": one.name, "title": one.title, "head": one.head, "rows": one.rows} for one in self.tables]
        return {
            "page": self.page, "folder": self.folder, "tables": tables, "figures": self.figures,
            "no_figures": self.no_figures,
        }  # fmt: skip


def write_results(
    workspace: Workspace,
    name: str,
    template: str,
    shown: dict[str, Any],
    tables: list[ResultTable],
    draw: Callable[[], Iterable[Figure]],
    sets: Sequence[str],
) -> Written:
    """Write tables (CSV), figures (PNG and SVG) and the page ``name``, of the values ``shown`` by its template.

    ``sets`` are the reference sets whose pictures the page may show: it goes when they go. Without matplotlib there are
    no figures, which the page says.
    """
    figures: list[Figure] = []
    no_figures = None
    try:
        figures = list(draw())
    except StudyError as error:
        no_figures = str(error)
        log.warning("%s", no_figures)
    for table in tables:
        workspace.files.write(f"{STUDIES}/{name}/{table.name}.csv", as_csv(table))
    for one in figures:
        workspace.files.write(f"{STUDIES}/{name}/{one.name}.png", one.png)
        workspace.files.write(f"{STUDIES}/{name}/{one.name}.svg", one.svg)
    drawn = [(one, svg_url(one.svg)) for one in figures]
    html = environment().get_template(template).render(**shown, tables=tables, figures=drawn, no_figures=no_figures)
    page = f"{STUDIES}/{name}.html"
    keep_sets(workspace, page, list(sets))
    workspace.files.write(page, html.encode())
    folder = f"{workspace.files}/{STUDIES}/{name}"
    return Written(f"{workspace.files}/{page}", folder, tables, [one.name for one in figures], no_figures)


def as_csv(table: ResultTable) -> bytes:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.head)
    writer.writerows(table.rows)
    return text.getvalue().encode()


def svg_url(svg: bytes) -> str:
    """An SVG picture as a data: URL."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
