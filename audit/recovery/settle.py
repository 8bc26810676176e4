"""What a run samples with where captions are to be recovered: settled once by a worker, and kept in the workspace.

An audit's id is made of its captions, so they are settled before the audit is due: as a stage of its own, through the
same engine as all others. What is kept is found again without a network.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from audit.claims.captions import Caption
from audit.config import CaptionChoice, CaptionSettings
from audit.errors import NotRecoverableError
from audit.progress import Tell, quiet
from audit.recovery.ask import found_captions
from audit.recovery.kept import TABLE, effort_of
from audit.recovery.recover import VERSION
from audit.states import Needs

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.job import Job
    from audit.workspace import Workspace

CAPTION, WARNING = "settled", "warning"  # kinds of rows


def settlement_id(job: Job, asked: CaptionSettings) -> str:
    """32 hex digits: a hash of all that is known of a job before its captions are settled."""
    known = [(caption.text, caption.source) for caption in job.captions]
    said = [
        "settled", VERSION, job.checkpoint.identity, job.base.revision, known, asked.method, effort_of(asked),
        job.settings.seed, job.settings.lora_scale, job.settings.adapter, job.settings.resolution,
        job.settings.precision, *([job.settings.expert] if job.settings.expert else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def settled(jobs: Sequence[Job], asked: CaptionSettings, workspace: Workspace) -> list[Job | None]:
    """Each job with the captions that were settled for it; None where they have not been. Nothing is loaded."""
    if asked.choice is not CaptionChoice.auto:
        return list(jobs)
    keys = [settlement_id(job, asked) for job in jobs]
    rows = workspace.rows(
        "SELECT recovery_id, kind, text, why, confidence FROM recoveries "
        "WHERE recovery_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY recovery_id, kind, rank",
        [keys],
    )
    kept: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kept.setdefault(row["recovery_id"], []).append(row)
    return [_with(job, kept[key]) if key in kept else None for job, key in zip(jobs, keys, strict=True)]


def _with(job: Job, rows: Iterable[dict[str, Any]]) -> Job:
    rows = list(rows)
    captions = tuple(Caption(one["text"], one["why"], one["confidence"]) for one in rows if one["kind"] == CAPTION)
    return replace(job, captions=captions, warnings=tuple(one["text"] for one in rows if one["kind"] == WARNING))


@dataclass(frozen=True)
class Settle:
    """The stage before all others: whether claimed captions move the model, and recovery where they do not.

    Models whose captions are not recovered at all keep what is known of them, which a warning says.
    """

    asked: CaptionSettings
    name: str = "recover"
    needs: Needs = Needs.gpu

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Whether the workspace has it."""
        return settled([job], self.asked, workspace) != [None]

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> None:
        """Settle it and keep it. Raises AuditError."""
        started = time.monotonic()
        try:
            captions, warnings = found_captions(job, self.asked, workspace, bench, tell)
        except NotRecoverableError as error:
            captions, warnings = job.captions, (*job.warnings, f"captions are as known, none was recovered: {error}")
        key = settlement_id(job, self.asked)
        common = {
            "recovery_id": key, "identity": job.checkpoint.identity,
            "base_revision": job.base.revision, "method": str(self.asked.method), "score": None, "vectors": None,
            "evaluations": 0, "seconds": round(time.monotonic() - started, 3),
        }  # fmt: skip
        rows = [
            {**common, "kind": CAPTION, "rank": rank, "text": one.text, "confidence": one.confidence, "why": one.source}
            for rank, one in enumerate(captions, start=1)
        ] + [
            {**common, "kind": WARNING, "rank": rank, "text": text, "confidence": None, "why": None}
            for rank, text in enumerate(warnings, start=1)
        ]
        workspace.write(TABLE, key, rows)
