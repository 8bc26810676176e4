"""What a study found: tables, figures and one page, written into the workspace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit.study.figures import figures_of
from audit.study.pages import Written, write_results
from audit.study.paper import tables_of
from audit.study.results import Row, long_table
from audit.study.run import begun
from audit.study.sheets import sheets_of
from audit.workspace import Workspace


@dataclass(frozen=True)
class Reported(Written):
    """What was written of a study, and how many of its cells it is of."""

    study: str
    cells: int
    planned: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit study report --json`` prints them."""
        return super().as_dict() | {"study": self.study, "cells": self.cells, "planned": self.planned}


def report_study(workspace: Workspace, name: str) -> Reported:
    """Write tables, figures and the page of a study, of what is finished of it.

    Raises StudyError where nothing is finished.
    """
    study, beside = begun(workspace, name)
    [known] = workspace.rows("SELECT * FROM studies WHERE study = ?", [name])
    rows = long_table(workspace, name).to_pylist()
    shown = {
        "study": study, "known": known, "rows": rows, "sheets": sheets_of(workspace, study, beside, rows),
        "silent": sum(row["tells_nothing"] is not None for row in rows),
        "settings": json.dumps(study.as_dict()["settings"], indent=1), "seconds": _seconds(rows),
    }  # fmt: skip
    varied = known["varied"]
    written = write_results(
        workspace, name, "study.html", shown, tables_of(rows, varied),
        lambda: figures_of(rows, varied, evidence_scores(workspace, name)), _asked_sets(workspace, name),
    )  # fmt: skip
    return Reported(**vars(written), study=name, cells=len(rows), planned=known["cells"])


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


def _seconds(rows: Sequence[Row]) -> dict[str, float]:
    trained = {row["fine_tune_id"]: row["training_seconds"] or 0.0 for row in rows}
    audited = {row["audit_id"]: row["seconds_sampling"] or 0.0 for row in rows}
    return {"training": sum(trained.values()), "sampling": sum(audited.values())}
