"""Sample: networks, captions and sampling, from a job to a full spool. The stage that needs a GPU."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from audit.progress import Tell, quiet
from audit.stages.precision import widening
from audit.stages.registry import StageKind
from audit.states import Needs

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.config import Precision
    from audit.job import Job
    from audit.models.pair import ModelPair
    from audit.sampling.sampler import Sampler
    from audit.workspace import Spool, Workspace


@dataclass(frozen=True)
class SpoolFacts:
    """What is known of an audit once its images are in the spool, besides the images."""

    warnings: list[str]
    problem: str | None
    truncated: list[str]
    evaluations: int
    weight_change: float
    prediction_change: float
    device: str
    precision: str
    peak_memory: int
    seconds_loading: float
    seconds_total: float


@dataclass(frozen=True)
class Sampled:
    """What the stage measured: seconds of loading and of the rest, images, evaluations, and most bytes of memory."""

    seconds_loading: float
    seconds: float
    images: int
    evaluations: int
    peak_memory: int


class Sample:
    """Fill the spool; images that are there already are not sampled again."""

    name = "sample"
    needs = Needs.gpu

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Whether all images are there, or the whole audit is."""
        return workspace.spool(job.id).finished() is not None or workspace.has("audits", job.id)

    def prepare(self, job: Job, workspace: Workspace, bench: Bench) -> None:
        """Open, hash and merge the checkpoint while another one is sampled."""
        if not workspace.has("audits", job.id):
            bench.ahead(job, workspace)

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Sampled:
        """Sample what the spool lacks. Raises AuditError; where nothing was sampled by then, nothing is left."""
        spool = workspace.spool(job.id)
        spool.begin()
        try:
            found = sample(job, workspace, bench, tell)
        except BaseException:
            if not spool.batches() and spool.precision() is None:
                spool.discard()
            raise
        return Sampled(
            found.seconds_loading, found.seconds_total - found.seconds_loading, job.images, found.evaluations,
            found.peak_memory,
        )  # fmt: skip


def sample(job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> SpoolFacts:
    """Sample what the spool lacks; in a wider precision where numbers overflow and none was asked for.

    Raises AuditError.
    """
    from audit.devices import reset_peak_memory

    reset_peak_memory(bench.device)
    spool = workspace.spool(job.id)

    def begin_again(precision: Precision) -> None:
        """All images of an audit are of one precision."""
        spool.discard()
        spool.begin()
        spool.keep_precision(precision)

    def work(precision: Precision, warnings: list[str]) -> SpoolFacts:
        return _sample_in(precision, job, workspace, bench, warnings, tell)

    return widening(job, workspace, bench, work, begin_again)


def _sample_in(
    precision: Precision, job: Job, workspace: Workspace, bench: Bench, warnings: list[str], tell: Tell
) -> SpoolFacts:
    from audit.config import StoredImages
    from audit.devices import device_name, peak_memory
    from audit.models.placement import NAMES
    from audit.sampling.collect import Collector

    started = time.monotonic()
    descriptor = bench.descriptor(job)
    pair = bench.pair(job, workspace, precision, tell)
    loading = time.monotonic() - started
    truncated = [caption.text for caption in job.captions if pair.is_truncated(caption.text)]
    spool: Spool = workspace.spool(job.id)
    evaluations = 0
    if job.images:
        sampler = _sampler(job, pair, bench.batch_size)
        pixels = job.settings.stored_images is not StoredImages.hashes_only
        sampling = Collector(sampler, descriptor, spool, job.id, job.images, pixels)
        sampling.run(lambda done, total: tell("sampling", done, total))
        evaluations = job.images * job.settings.steps * sampler.guidance.evaluations
    facts = SpoolFacts(
        warnings=list(
            dict.fromkeys([*job.warnings, *pair.warnings, *warnings, *_caption_warnings(job, pair, truncated)])
        ),
        problem=pair.problem,
        truncated=truncated,
        evaluations=evaluations,
        weight_change=pair.effect.weights,
        prediction_change=pair.effect.prediction,
        device=device_name(bench.device),
        precision=NAMES[pair.dtype],
        peak_memory=peak_memory(bench.device),
        seconds_loading=loading,
        seconds_total=time.monotonic() - started,
    )
    spool.finish(asdict(facts))
    return facts


def _caption_warnings(job: Job, pair: ModelPair, truncated: list[str]) -> list[str]:
    missing = [token for token in pair.tokens if not any(token in caption.text for caption in job.captions)]
    found = [f"the file brings tokens that are in no caption: {', '.join(missing[:10])[:200]}"] if missing else []
    return found + [
        f"the caption {text[:60]!r}... is longer than the {pair.caption_tokens} tokens the text encoder takes: "
        "its end was cut off"
        for text in truncated
    ]


def _sampler(job: Job, pair: ModelPair, batch_size: int) -> Sampler:
    from audit.sampling.guidance import make_guidance, weight_of
    from audit.sampling.sampler import Sampler

    return Sampler(
        pair,
        make_guidance(job.settings),
        [caption.text for caption in job.captions],
        solver=job.settings.solver,
        steps=job.settings.steps,
        seed=job.settings.seed,
        batch_size=batch_size,
        w=weight_of(job.settings, pair.effect.prediction),
    )


STAGE = StageKind("sample", None, lambda references: Sample())
