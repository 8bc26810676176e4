"""Recoveries that a workspace keeps, so that the same model is not asked twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from audit.claims.captions import Caption
from audit.config import CaptionSettings, Recovery
from audit.errors import WorkspaceError
from audit.models.soft import is_soft, soft_prompt
from audit.recovery.recover import VERSION, Keyword, Recovered, candidates, recover
from audit.stages.precision import widening

if TYPE_CHECKING:
    import torch

    from audit.bench import Bench
    from audit.config import Precision
    from audit.job import Job
    from audit.progress import Tell
    from audit.workspace import Workspace

TABLE = "recoveries"


def effort_of(asked: CaptionSettings) -> int:
    """The budget that the method that is asked for heeds."""
    return asked.iterations if asked.method is Recovery.gradient else asked.evaluations


def recovery_id(job: Job, words: Sequence[str], asked: CaptionSettings) -> str:
    """32 hex digits: a hash of all that a recovery depends on."""
    said = [
        VERSION, job.checkpoint.identity, job.base.revision, asked.method, effort_of(asked), sorted(words),
        job.settings.seed, job.settings.lora_scale, job.settings.adapter, job.settings.resolution,
        job.settings.precision, *([job.settings.expert] if job.settings.expert else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def recovered(
    job: Job, workspace: Workspace, bench: Bench, asked: CaptionSettings, tell: Tell, more: Sequence[str] = ()
) -> Recovered:
    """The captions of the checkpoint of ``job``: those that the workspace keeps, else recovered now and kept.

    ``more`` are further candidates. Raises AuditError, CheckpointError where its family's are not recovered.
    """

    def work(precision: Precision, _: list[str]) -> Recovered:
        pair = bench.pair(job, workspace, precision, tell)
        words = candidates(pair, bench.checkpoint(job, workspace).metadata, more)
        key = recovery_id(job, words, asked)
        known = read(workspace, key)
        if known is not None:
            return replace(known, words=len(words))
        found = recover(pair, words, asked, job.settings.seed, lambda done, total: tell("recovering", done, total))
        workspace.write(TABLE, key, _rows(key, job, found))
        return found

    return widening(job, workspace, bench, work, lambda precision: None)


def _rows(key: str, job: Job, found: Recovered) -> list[dict[str, object]]:
    common = {
        "recovery_id": key, "identity": job.checkpoint.identity, "base_revision": job.base.revision,
        "method": found.method, "evaluations": found.evaluations, "seconds": found.seconds,
    }  # fmt: skip
    keywords = [
        {**common, "kind": "keyword", "rank": rank, "text": one.word, "confidence": one.confidence, "score": one.score,
         "why": one.why, "vectors": None}
        for rank, one in enumerate(found.keywords, start=1)
    ]  # fmt: skip
    captions = [
        {**common, "kind": "caption", "rank": rank, "text": one.text, "confidence": one.confidence, "score": None,
         "why": one.source, "vectors": found.soft.get(one.text)}
        for rank, one in enumerate(found.captions, start=1)
    ]  # fmt: skip
    return [*keywords, *captions]


def read(workspace: Workspace, key: str) -> Recovered | None:
    """The kept recovery ``key``; None where there is none."""
    rows = workspace.rows("SELECT * FROM recoveries WHERE recovery_id = ? ORDER BY kind, rank", [key])
    if not rows:
        return None
    keywords = [
        Keyword(one["text"], one["score"], one["confidence"], one["why"]) for one in rows if one["kind"] == "keyword"
    ]
    told = [one for one in rows if one["kind"] == "caption"]
    captions = [Caption(one["text"], one["why"], one["confidence"]) for one in told]
    soft = {one["text"]: one["vectors"] for one in told if one["vectors"]}
    return Recovered(rows[0]["method"], keywords, captions, 0, rows[0]["evaluations"], rows[0]["seconds"], soft)


def soft_prompts(workspace: Workspace, captions: Sequence[Caption]) -> dict[str, torch.Tensor]:
    """The vectors of those ``captions`` that are soft prompts, by name. Raises WorkspaceError where one is not kept."""
    names = [caption.text for caption in captions if is_soft(caption.text)]
    if not names:
        return {}
    rows = workspace.rows(
        "SELECT DISTINCT ON (text) text, vectors FROM recoveries WHERE vectors IS NOT NULL "
        "AND text IN (SELECT unnest(?::VARCHAR[]))",
        [names],
    )
    kept = {one["text"]: one["vectors"] for one in rows}
    if missing := [name for name in names if name not in kept]:
        raise WorkspaceError(
            f"{missing[0]!r} is a prompt that is no words, and the workspace has no recovery with its numbers (any "
            "more): recover it again with 'lora-audit captions --caption-method gradient', or give words"
        )
    try:
        return {name: soft_prompt(name, kept[name]) for name in names}
    except ValueError as error:
        raise WorkspaceError(f"the table of recoveries is damaged: {error}") from error


def carry(workspace: Workspace, into: Workspace, captions: Sequence[Caption]) -> None:
    """Keep the recoveries that soft prompts among ``captions`` are of in another workspace, too."""
    names = [caption.text for caption in captions if is_soft(caption.text)]
    if not names:
        return
    rows = workspace.rows(
        "SELECT * FROM recoveries WHERE recovery_id IN (SELECT recovery_id FROM recoveries WHERE vectors IS NOT NULL "
        "AND text IN (SELECT unnest(?::VARCHAR[])))",
        [names],
    )
    for key in {one["recovery_id"] for one in rows}:
        into.write(TABLE, key, [one for one in rows if one["recovery_id"] == key])
