"""What a study found: tables, figures and one page, written into the workspace."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit.errors import StudyError
from audit.report.page import environment
from audit.report.pages import FOLDER, keep_sets
from audit.study.figures import Figure, figures_of
from audit.study.paper import tables_of
from audit.study.plan import Study
from audit.study.results import ResultTable, Row, long_table
from audit.study.run import begun
from audit.study.sheets import Sheet, sheets_of
from audit.workspace import Workspace

STUDIES = f"{FOLDER}/studies"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reported:
    """What was written: the page, the folder of tables and figures, and the tables themselves."""

    study: str
    page: str
    folder: str
    cells: int
    planned: int
    tables: list[ResultTable]
    figures: list[str]
    no_figures: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit study report --json`` prints them."""
        tables = [{"name": one.name, "title": one.title, "head": one.head, "rows": one.rows} for one in self.tables]
        return {
            "study": self.study, "page": self.page, "folder": self.folder, "cells": self.cells, "planned": self.planned,
            "tables": tables, "figures": self.figures, "no_figures": self.no_figures,
        }  # fmt: skip


def report_study(workspace: Workspace, name: str) -> Reported:
    """Write tables (CSV), figures (PNG and SVG) and the page of a study, of what is finished of it.

    Without matplotlib there are no figures, which the page says. Raises StudyError where nothing is finished.
    """
    study, beside = begun(workspace, name)
    [known] = workspace.rows("SELECT * FROM studies WHERE study = ?", [name])
    rows = long_table(workspace, name).to_pylist()
    tables = tables_of(rows, known["varied"])
    figures: list[Figure] = []
    no_figures = None
    try:
        figures = list(figures_of(rows, known["varied"], evidence_scores(workspace, name)))
    except StudyError as error:
        no_figures = str(error)
        log.warning("%s", no_figures)
    for table in tables:
        workspace.files.write(f"{STUDIES}/{name}/{table.name}.csv", as_csv(table))
    for one in figures:
        workspace.files.write(f"{STUDIES}/{name}/{one.name}.png", one.png)
        workspace.files.write(f"{STUDIES}/{name}/{one.name}.svg", one.svg)
    sheets = sheets_of(workspace, study, beside, rows)
    page = f"{STUDIES}/{name}.html"
    html = _page(study, known, rows, tables, figures, no_figures, sheets)
    keep_sets(workspace, page, _asked_sets(workspace, name))
    workspace.files.write(page, html.encode())
    return Reported(
        name, f"{workspace.files}/{page}", f"{workspace.files}/{STUDIES}/{name}", len(rows), known["cells"], tables,
        [one.name for one in figures], no_figures,
    )  # fmt: skip


def evidence_scores(workspace: Workspace, study: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind of evidence, what training and held-out pictures score in the audits of a study that were asked."""
    rows = workspace.rows(
        "SELECT h.similarity, h.score, h.reference_set LIKE '%-training' AS seen FROM study_cells AS c "
        "JOIN chances AS h USING (audit_id) WHERE c.study = ? AND h.reference_set SIMILAR TO '.*-(training|control)'",
        [study],
    )
    found = {}
    for kind, column in (("extraction", "similarity"), ("membership", "score")):
        parts = [
            np.array([row[column] for row in rows if row[column] is not None and row["seen"] is seen])
            for seen in (True, False)
        ]
        if len(parts[0]) and len(parts[1]):
            found[kind] = (parts[0], parts[1])
    return found


def _asked_sets(workspace: Workspace, study: str) -> list[str]:
    rows = workspace.rows(
        "SELECT DISTINCT m.reference_set FROM study_cells AS c JOIN chances AS m USING (audit_id) WHERE c.study = ?",
        [study],
    )
    return [row["reference_set"] for row in rows]


def as_csv(table: ResultTable) -> bytes:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.head)
    writer.writerows(table.rows)
    return text.getvalue().encode()


def _page(
    study: Study, known: Row, rows: list[Row], tables: list[ResultTable], figures: list[Figure], no_figures: str | None,
    sheets: list[Sheet],
) -> str:  # fmt: skip
    silent = sum(row["tells_nothing"] is not None for row in rows)
    return (
        environment()
        .get_template("study.html")
        .render(
            study=study, known=known, rows=rows, tables=tables, no_figures=no_figures, sheets=sheets, silent=silent,
            figures=[(one, svg_url(one.svg)) for one in figures],
            settings=json.dumps(study.as_dict()["settings"], indent=1), seconds=_seconds(rows),
        )
    )  # fmt: skip


def _seconds(rows: Sequence[Row]) -> dict[str, float]:
    trained = {row["fine_tune_id"]: row["training_seconds"] or 0.0 for row in rows}
    audited = {row["audit_id"]: row["seconds_sampling"] or 0.0 for row in rows}
    return {"training": sum(trained.values()), "sampling": sum(audited.values())}


def svg_url(svg: bytes) -> str:
    """An SVG picture as a data: URL."""
    import base64

    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
