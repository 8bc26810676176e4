"""The report as one self-contained HTML page: no script, nothing loaded from anywhere, everything escaped."""

from __future__ import annotations

import base64
import json

from jinja2 import Environment, PackageLoader, StrictUndefined

from audit import __version__
from audit.custody.keep import NOBODY, Custody, keep_manifest
from audit.descriptors.facts import in_words
from audit.report.advice import next_steps, would_change
from audit.report.facts import AuditFacts
from audit.report.histogram import Places, histogram
from audit.report.pages import PageFacts, page_key, write_page_with
from audit.text import printable
from audit.workspace import Workspace


def data_url(picture: bytes) -> str:
    """A PNG or WebP as a data: URL."""
    kind = "webp" if picture[:4] == b"RIFF" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def environment() -> Environment:
    """The templates: everything is escaped and made printable; <bdi> keeps strangers' text from turning ours."""
    found = Environment(
        loader=PackageLoader("audit.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    found.filters["data_url"] = data_url
    found.globals["histogram"] = histogram
    return found


def render(facts: AuditFacts) -> str:
    """The page's HTML."""
    return (
        environment()
        .get_template("page.html")
        .render(
            facts=facts,
            row=facts.row,
            settings=facts.settings,
            versions=json.loads(facts.row["versions"]),
            claimed=json.loads(facts.checkpoint["claimed_metadata"]),
            judge=in_words(facts.row["descriptor"]),
            places=Places(facts),
            denoised={(one.reference_set, one.reference_id): one for one in facts.denoised},
            would_change=would_change(facts),
            next_steps=next_steps(facts),
            version=__version__,
        )
    )


def write_page(facts: AuditFacts, workspace: Workspace, custody: Custody = NOBODY) -> str:
    """Write the page into the workspace, whole or not at all; where it is. Another question has another page.

    Its manifest comes first, and is not signed here (audit/custody/keep.py).
    """
    row, verdict = facts.row, facts.verdict
    references = [one.reference_id for one in facts.references]
    key = page_key(row["audit_id"], facts.reference_sets, references, facts.questions, facts.asked)
    said = PageFacts(
        row["audit_id"], row["checkpoint_name"], facts.reference_sets, facts.pictures, len(verdict.matched),
        len(verdict.possible), verdict.tells_nothing, row["finished_at"].isoformat(), verdict.said, verdict.rule,
        verdict.rate, sorted({one.background for one in facts.pairings}),
    )  # fmt: skip
    html = render(facts)
    keep_manifest(workspace, key, html.encode(), row["audit_id"], facts.reference_sets, facts.record, custody)
    return write_page_with(workspace, key, html, said)
