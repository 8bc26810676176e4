"""Control: what the base alone draws for the captions and seeds of an audit. What it draws as well was not learnt."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from audit.progress import Tell, quiet
from audit.stages.cluster import first_of_each
from audit.stages.precision import widening
from audit.stages.registry import StageKind
from audit.states import Needs

if TYPE_CHECKING:
    import pyarrow as pa

    from audit.bench import Bench
    from audit.config import Precision
    from audit.job import Job
    from audit.workspace import Workspace


@dataclass(frozen=True)
class Controlled:
    """How many control generations there are, the seconds it took, and network evaluations of the base."""

    seconds: float
    images: int
    evaluations: int


class Control:
    """Sample the base alone, and write the control generations; those in the spool are not sampled again."""

    name = "control"
    needs = Needs.gpu
    batch = "control-"  # how the names of its batches in the spool begin

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Whether none are asked for, or all are there."""
        return not job.control_images or workspace.has("control_generations", job.id)

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Controlled:
        """Sample what the spool lacks. Raises AuditError; where nothing was sampled by then, nothing is left."""
        started = time.monotonic()
        spool, own = workspace.spool(job.id), workspace.spool(job.id, self.batch)
        spool.begin()

        def work(precision: Precision, _: list[str]) -> Controlled:
            return _sampled(job, workspace, bench, precision, tell)

        try:
            found = widening(job, workspace, bench, work, lambda precision: own.clear())
        except BaseException:
            if not spool.batches() and not own.batches() and spool.precision() is None:
                spool.discard()
            raise
        if workspace.has("audits", job.id):
            spool.discard()
        return replace(found, seconds=time.monotonic() - started)


def _sampled(job: Job, workspace: Workspace, bench: Bench, precision: Precision, tell: Tell) -> Controlled:
    from audit.config import StoredImages
    from audit.sampling.collect import Collector
    from audit.sampling.guidance import CFG_WEIGHT, BaseAlone
    from audit.sampling.sampler import Sampler

    settings = job.settings
    pair = bench.pair(job, workspace, precision, tell)
    sampler = Sampler(
        pair, BaseAlone(), [caption.text for caption in job.captions], settings.solver, settings.steps, settings.seed,
        bench.batch_size, CFG_WEIGHT,
    )  # fmt: skip
    spool = workspace.spool(job.id, Control.batch)
    pixels = settings.stored_images is not StoredImages.hashes_only
    collector = Collector(sampler, bench.descriptor(job), spool, job.id, job.control_images, pixels)
    collector.run(lambda done, total: tell("control generations", done, total))
    rows = first_of_each(_as_kept(batch) for batch in spool.read())
    assert rows is not None
    workspace.write("control_generations", job.id, rows)
    evaluations = job.control_images * settings.steps * BaseAlone.evaluations
    return Controlled(0.0, job.control_images, evaluations)


def _as_kept(spooled: pa.Table) -> pa.Table:
    """Rows of the spool as rows of control_generations: their pictures made small."""
    import pyarrow as pa

    from audit.schemas import CONTROL_GENERATIONS

    kept = spooled.select(CONTROL_GENERATIONS.names)
    at = CONTROL_GENERATIONS.get_field_index("image")
    pictures = pa.array([_small(row) for row in spooled.to_batches(max_chunksize=1)], pa.binary())
    return kept.set_column(at, CONTROL_GENERATIONS.field(at), pictures).cast(CONTROL_GENERATIONS)


def _small(row: Any) -> bytes | None:
    import numpy as np

    from audit.references.denoised import webp

    pixels = row["image"][0]
    if not pixels.is_valid:
        return None
    shape = row["height"][0].as_py(), row["width"][0].as_py(), 3
    return webp(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape))


STAGE = StageKind("control", "sample", lambda references: Control())
