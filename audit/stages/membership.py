"""Membership: by how much better than its base the fine-tuned model denoises each reference."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from audit.progress import Tell, quiet
from audit.stages.precision import widening, wider
from audit.stages.registry import StageKind
from audit.states import Needs

if TYPE_CHECKING:
    import numpy as np

    from audit.bench import Bench
    from audit.config import Precision
    from audit.evidence.effort import Effort
    from audit.job import Job
    from audit.workspace import Workspace

Decoys = dict[Any, tuple[dict[str, str], frozenset[tuple[str, str]]]]  # by what they are of, with its question
REMEMBERED = 5.0  # s
MOST_DECOYS = 200  # that are measured for an audit
VERSION = 1  # raised when the same pictures and settings come to give other scores


@dataclass(frozen=True)
class Remembered:
    """How many references have a score, the seconds it took, and network evaluations of either model.

    ``picture_evaluations`` of both were spent on pictures of what they make of references.
    """

    seconds: float
    references: int
    base_evaluations: int
    tuned_evaluations: int
    picture_evaluations: int = 0

    @property
    def evaluations(self) -> int:
        """Of both models; those of the base that were kept are not among them."""
        return self.base_evaluations + self.tuned_evaluations + self.picture_evaluations


@dataclass(frozen=True)
class Picture:
    """One reference that is measured: a row of the references table without its picture."""

    reference_set: str
    reference_id: str
    width: int | None
    height: int | None
    pdq_quality: int | None
    model_size: int


@dataclass(frozen=True)
class Question:
    """What is to be measured: the references of which there are latents, by set, and how."""

    codec: str
    sets: dict[str, list[Picture]]
    effort: Effort

    @property
    def ids(self) -> list[str]:
        """The pictures, each once."""
        return sorted({one.reference_id for pictures in self.sets.values() for one in pictures})

    def of(self, name: str) -> str:
        """The question as rows of the set ``name`` keep it: it depends on other sets where the budget is short.

        Where the budget covers all, it says so: then scores compare with those of other sets that are so measured.
        """
        from audit.evidence.effort import WHOLE

        all_of_it = self.effort.covers(len(self.ids))
        ids = sorted(one.reference_id for one in self.sets[name]) if all_of_it else self.ids
        effort = self.effort if not all_of_it else replace(self.effort, budget=0)
        said = [VERSION, self.codec, ids, vars(effort)]
        return (WHOLE if all_of_it else "") + hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


class Membership:
    """Measure the references of which the workspace has latents, and write the memberships of each set."""

    name = "membership"
    needs = Needs.gpu
    batch = "losses-"  # how the names of its batches in the spool begin

    def __init__(self, references: Sequence[str]) -> None:
        self.references = tuple(references)
        self._asked: dict[Any, tuple[float, Question]] = {}
        self._decoys: Decoys = {}

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Whether nothing is to be measured, or all of it has been, of the sets as they are now."""
        question = self._question(job, workspace)
        return not question.sets or _answered(job, workspace, question)

    def _question(self, job: Job, workspace: Workspace) -> Question:
        """The question for ``done``, which is asked of thousands of jobs: read again after some seconds."""
        settings, now = job.settings, time.monotonic()
        key = job.base.revision, job.descriptor.name, settings, job.checkpoint.experts
        if key not in self._asked or now - self._asked[key][0] > REMEMBERED:
            self._asked[key] = now, question_of(job, workspace, self.references, self._decoys)
        return self._asked[key][1]

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Remembered:
        """Measure what the spool lacks. Raises AuditError; where nothing was measured by then, nothing is left."""
        started = time.monotonic()
        question = question_of(job, workspace, self.references, self._decoys)
        spool = workspace.spool(job.id)
        spool.begin()

        def work(precision: Precision, _: list[str]) -> Remembered:
            return _measured(job, workspace, bench, question, self.references, precision, tell)

        try:
            found = widening(job, workspace, bench, work, lambda precision: None)
        except BaseException:
            if not spool.batches() and not workspace.spool(job.id, self.batch).batches() and spool.precision() is None:
                spool.discard()
            raise
        if workspace.has("audits", job.id):
            spool.discard()
        return replace(found, seconds=time.monotonic() - started)


def question_of(job: Job, workspace: Workspace, references: Sequence[str], known: Decoys | None = None) -> Question:
    """What there is to measure for the ``references``, sets of the workspace, as they are now: they, and their decoys.

    Backgrounds of another look than the references take nothing of the budget. ``known`` keeps which pictures are
    decoys of which sets, as long as these are the same.
    """
    from audit.config import Evidence
    from audit.evidence.effort import NOISES, Effort
    from audit.references.latents import VIEWS, codec_id

    codec = codec_id(job.base.revision, job.settings.resolution)
    sets: dict[str, list[Picture]] = {}
    if references and job.settings.evidence is not Evidence.extraction:
        rows = workspace.rows(
            """SELECT r.reference_set, r.reference_id, any_value(r.width) AS width, any_value(r.height) AS height,
                any_value(r.pdq_quality) AS pdq_quality, any_value(least(l.width, l.height)) AS model_size
            FROM "references" AS r JOIN latents AS l USING (reference_set, reference_id)
            WHERE l.codec = $1 AND r.descriptor_name = $2
            AND (list_contains($3::VARCHAR[], r.reference_set) OR r.kind = 'background')
            GROUP BY r.reference_set, r.reference_id ORDER BY ALL""",
            [codec, job.descriptor.name, list(references)],
        )
        asked = [Picture(**row) for row in rows if row["reference_set"] in references]
        paired = _decoys_of(job, workspace, references, {} if known is None else known) if asked else frozenset()
        background = [Picture(**row) for row in rows if (row["reference_set"], row["reference_id"]) in paired]
        # of many decoys those whose hash is lowest: a choice by what they show would tell them from the references
        decoys = sorted({one.reference_id for one in background} - {one.reference_id for one in asked})[:MOST_DECOYS]
        chosen = set(decoys)
        for one in [*asked, *(one for one in background if one.reference_id in chosen)]:
            sets.setdefault(one.reference_set, []).append(one)
    return Question(codec, sets, Effort(_timesteps(job), NOISES, len(VIEWS), job.settings.membership_evaluations))


def _timesteps(job: Job) -> tuple[int, ...]:
    """The noise levels that are asked: of a base with two experts those of the ones that were changed."""
    from audit.evidence.effort import TIMESTEPS

    if job.base.boundary is None:
        return TIMESTEPS
    from audit.evidence.levels import timesteps_of  # torch

    return timesteps_of(job.base.boundary, job.checkpoint.experts)


def _decoys_of(job: Job, workspace: Workspace, references: Sequence[str], known: Decoys) -> frozenset[tuple[str, str]]:
    """(background, picture) of the decoys of ``references``; read again where ``known`` has them of other pictures."""
    from audit.references.decoys import questions_of
    from audit.references.index.known import Known
    from audit.references.offer import decoys_of

    about, digests = (job.descriptor, *references), Known(workspace.files.scratch)
    now = questions_of(workspace.rows, job.descriptor.name, references, digests)
    if about not in known or known[about][0] != now.of:
        known[about] = now.of, frozenset(decoys_of(workspace, job.descriptor, references) if now.has_decoys else ())
    return known[about][1]


def _answered(job: Job, workspace: Workspace, question: Question) -> bool:
    rows = workspace.rows("SELECT DISTINCT reference_set, question FROM memberships WHERE audit_id = ?", [job.id])
    there = {(row["reference_set"], row["question"]) for row in rows}
    return all((name, question.of(name)) in there for name in question.sets)


def _measured(
    job: Job, workspace: Workspace, bench: Bench, question: Question, references: Sequence[str],
    precision: Precision, tell: Tell,
) -> Remembered:  # fmt: skip
    from audit.evidence.effort import FIRST, nearest_and_sample
    from audit.references.denoised import denoised_of
    from audit.references.latents import VIEWS
    from audit.references.losses import Both

    effort, ids = question.effort, question.ids
    pair = bench.pair(job, workspace, precision, tell)
    spool = workspace.spool(job.id, Membership.batch)
    both = Both(job, workspace, spool, pair, question, bench.batch_size, wider(job, precision, bench) is not None, tell)
    count = effort.looked_at(len(ids))
    if count < len(ids):
        numbers = nearest_and_sample(_described(job, workspace, ids), _seen(job, workspace), count, job.settings.seed)
        chosen = {ids[number] for number in numbers}
        for some in question.sets.values():  # one of each at least: a set without a row would count as not measured
            if chosen.isdisjoint(one.reference_id for one in some):
                chosen.add(some[0].reference_id)
        ids = sorted(chosen)
    items = [(one, view) for one in ids for view in VIEWS]
    first = effort.noises if effort.covers(len(ids)) else FIRST
    both.fill(items, range(first))
    if first < effort.noises:
        likeliest = sorted(items, key=lambda item: (-both.rank(item), item))
        both.fill(sorted(likeliest[: effort.looked_closer(len(ids))]), range(first, effort.noises))
    rows = {one: both.row(one) for one in ids}
    written: dict[str, list[dict[str, Any]]] = {}
    for name, pictures in question.sets.items():
        about = {"audit_id": job.id, "reference_set": name, "question": question.of(name)}
        mine = [one for one in pictures if one.reference_id in rows]
        written[name] = [{**about, **_with_caveat(rows[one.reference_id], one)} for one in mine]
    shown, spent = denoised_of(job, both, {name: some for name, some in written.items() if name in references})
    for name, rows_of_it in written.items():  # pictures first: a set with its memberships is done
        if name in shown:
            workspace.write("denoised", f"{job.id}.{name}", shown[name])
        workspace.write("memberships", f"{job.id}.{name}", rows_of_it)
    tell("membership", len(items), len(items))
    return Remembered(0.0, len(ids), both.base.evaluations, both.tuned.evaluations, spent)


def _with_caveat(row: dict[str, Any], picture: Picture) -> dict[str, Any]:
    from audit.descriptors.pdq import MIN_QUALITY

    said = [row["caveat"]] if row["caveat"] else []
    side = picture.model_size
    if picture.width and picture.height and min(picture.width, picture.height) < side:
        said.append(f"{picture.width} x {picture.height} pixels are less than the model's {side}: it was enlarged")
    if picture.pdq_quality is not None and picture.pdq_quality < MIN_QUALITY:
        said.append(f"there is little in it (PDQ quality {picture.pdq_quality} of 100)")
    return {**row, "caveat": "; ".join(said) or None}


def _described(job: Job, workspace: Workspace, ids: Sequence[str]) -> np.ndarray:
    """The descriptors [N, D] of the references ``ids``, which are sorted."""
    from audit.sampling.spooled import vectors_of

    return vectors_of(
        workspace.select(
            'SELECT reference_id, any_value(descriptor) AS descriptor FROM "references" WHERE descriptor_name = ? '
            "AND list_contains(?::VARCHAR[], reference_id) GROUP BY reference_id ORDER BY reference_id",
            [job.descriptor.name, list(ids)],
        )
    )


def _seen(job: Job, workspace: Workspace) -> np.ndarray:
    """The descriptors [M, D] of the images that were sampled: in the spool, or in the tables."""
    import numpy as np

    from audit.sampling.spooled import vectors_of

    parts = [vectors_of(rows) for rows in workspace.spool(job.id).read(["descriptor"])]
    if not parts:
        rows = workspace.select("SELECT descriptor FROM generations WHERE audit_id = ?", [job.id])
        parts = [vectors_of(rows)] if rows.num_rows else []
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


STAGE = StageKind("membership", "control", Membership)
