"""The index page of a run: every audit it finished, those with matches first, with links to their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from audit.report.page import environment
from audit.report.pages import FOLDER, keep_sets
from audit.workspace import Workspace

RUNS = f"{FOLDER}/runs"


@dataclass(frozen=True)
class Answer:
    """What a run found of one audit: how many different pictures matched, and where its page is."""

    audit_id: str
    name: str
    item_id: str
    matches: int
    page: str
    tells_nothing: bool


def write_index(workspace: Workspace, run_id: str, sets: Sequence[str], answers: Sequence[Answer]) -> str:
    """Write the page; where it is."""
    ordered = sorted(answers, key=lambda one: (-one.matches, one.tells_nothing, one.name))
    html = environment().get_template("index.html").render(run_id=run_id, sets=list(sets), answers=ordered)
    key = f"{RUNS}/{run_id}.html"
    keep_sets(workspace, key, sets)
    workspace.files.write(key, html.encode())
    return f"{workspace.files}/{key}"
