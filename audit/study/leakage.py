"""How much leaks of what was crawled and audited: by base model, rank, steps, N0 and captions. Nothing is trained here.

The share of an audit is how many of the reference pictures it was compared with came out of it alike, by the fixed
threshold of the descriptor; where the uploader has published the training set, A-ESR stands beside it. They are figures
over many audits, and no verdict on any. Steps, N0 and captions are claims of uploaders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from audit.errors import StudyError
from audit.study.figures import Figure, bars, curves
from audit.study.pages import Written, write_results
from audit.study.results import ResultTable, Row, grouped, interval, shown
from audit.workspace import Workspace

NAME = "catalog"
SQL = """
WITH places AS (
    SELECT checkpoint_sha256, min(family) AS family, min(base_model) AS base_model, min(tensor_rank) AS rank,
        min(claimed_steps) AS claimed_steps, min(training_images) AS training_images
    FROM checkpoints WHERE source <> 'file' AND checkpoint_sha256 IS NOT NULL GROUP BY ALL
), newest AS (
    SELECT * FROM audits WHERE audit_id NOT IN (SELECT audit_id FROM study_cells)
    QUALIFY row_number() OVER (PARTITION BY checkpoint_sha256 ORDER BY finished_at DESC) = 1
), asked AS (
    SELECT audit_id, count(DISTINCT r.reference_id) AS pictures
    FROM (SELECT DISTINCT audit_id, reference_set FROM matches) AS m JOIN newest AS a USING (audit_id)
    JOIN "references" AS r ON r.reference_set = m.reference_set AND r.descriptor_name = a.descriptor
    GROUP BY audit_id
), alike AS (
    SELECT audit_id, count(DISTINCT reference_id) AS pictures FROM matches WHERE is_match GROUP BY audit_id
)
SELECT a.audit_id, a.audit_id AS few_shot, p.family, p.base_model, p.rank, p.claimed_steps, p.training_images,
    coalesce(a.captions[1].source, 'default') <> 'default' AS captioned,
    coalesce(alike.pictures, 0) / asked.pictures AS alike, e.extraction_rate_07
FROM newest AS a JOIN places AS p USING (checkpoint_sha256) LEFT JOIN asked USING (audit_id)
LEFT JOIN alike USING (audit_id) LEFT JOIN evaluations AS e ON e.audit_id = a.audit_id AND e.kind = 'training'
WHERE a.tells_nothing IS NULL AND (asked.pictures > 0 OR e.extraction_rate_07 IS NOT NULL) ORDER BY a.audit_id
"""
DRAWN = {"alike": "reference pictures alike", "extraction_rate_07": "A-ESR 0.7 of published training sets"}
FACTORS = {
    "family": "By family of the base model", "base_model": "By base model, as claimed", "rank": "By rank",
    "claimed_steps": "By steps, as claimed", "training_images": "By training pictures, as claimed",
    "captioned": "By whether captions are claimed",
}  # fmt: skip
BINNED = ("claimed_steps", "training_images")  # into powers of two
MOST_NAMED = 20  # base models that are named; the others are one line


@dataclass(frozen=True)
class Leakage(Written):
    """What was written of the catalog, and of how many audits it is."""

    audits: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit study catalog --json`` prints them."""
        return super().as_dict() | {"audits": self.audits}


def leaks(workspace: Workspace) -> list[Row]:
    """A row an audited checkpoint of the catalog that was compared with pictures; claimed numbers are in bins.

    Raises StudyError where there is none.
    """
    rows = workspace.rows(SQL)
    if not rows:
        raise StudyError(
            f"no audit in {workspace.files} of a crawled checkpoint was compared with pictures: crawl, and give "
            "'lora-audit run' --references"
        )
    named = [
        key[0] for key, _ in sorted(grouped(rows, ["base_model"]).items(), key=lambda one: -len(one[1]))[:MOST_NAMED]
    ]
    for row in rows:
        row["base_model"] = row["base_model"] if row["base_model"] in named else "others"
        for name in BINNED:
            row[name] = 2 ** (row[name].bit_length() - 1) if row[name] else None
    return rows


def report_catalog(workspace: Workspace) -> Leakage:
    """Write tables (CSV), figures (PNG and SVG) and a page of what leaks; figures want matplotlib."""
    rows = leaks(workspace)
    sets = [row["reference_set"] for row in workspace.rows("SELECT DISTINCT reference_set FROM matches")]
    written = write_results(
        workspace, NAME, "leakage.html", {"audits": len(rows)}, tables_of(rows), lambda: _figures(rows), sets
    )
    return Leakage(**vars(written), audits=len(rows))


def _drawn(rows: Sequence[Row]) -> dict[str, str]:
    """The figures that any row has, and their titles."""
    return {name: title for name, title in DRAWN.items() if any(row[name] is not None for row in rows)}


def tables_of(rows: Sequence[Row]) -> list[ResultTable]:
    """A table a factor, each of it alone."""
    return [_table(name, title, rows, _drawn(rows)) for name, title in FACTORS.items()]


def _table(name: str, title: str, rows: Sequence[Row], drawn: dict[str, str]) -> ResultTable:
    lines = []
    for (level,), some in grouped(rows, [name]).items():
        found = [interval(some, figure) for figure in drawn]
        label = "not said" if level is None else shown(name, level)
        lines.append([label, str(len(some)), *(one.text() if one else "" for one in found)])
    return ResultTable(name.replace("_", "-"), title, [name.replace("_", " "), "audits", *drawn.values()], lines)


def _figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Bars and curves with intervals over audits, of what is said of two checkpoints at the least."""
    drawn = _drawn(rows)
    for name in ("family", "captioned"):
        known = [row for row in rows if row[name] is not None]
        if known:
            yield bars(f"by-{name}", f"{FACTORS[name]}.", known, name, "family", drawn)
    for name in ("rank", *BINNED):
        known = [row for row in rows if row[name] is not None and row["family"] is not None]
        if len({row[name] for row in known}) > 1:
            yield curves(f"by-{name.replace('_', '-')}", f"{FACTORS[name]}.", known, name, "family", drawn)
