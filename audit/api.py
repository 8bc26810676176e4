"""The library: what the command line, services and studies call.

Nothing here prints. Progress goes to a callback, results are plain objects, and what is wrong is an AuditError.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.bench import Bench
from audit.config import (
    Compile,
    Config,
    Evidence,
    Expert,
    Latents,
    Rule,
    Settings,
    StoredImages,
    VerdictSettings,
)
from audit.custody.keep import NOBODY, Custody, sign_written
from audit.devices import default_device
from audit.engine.local import run_stages
from audit.engine.run import Run
from audit.engine.state import RunState
from audit.engine.work import Place
from audit.errors import ConfigError
from audit.job import Job, Request, resolve
from audit.models.experts import check_given_as
from audit.models.inspect import Inspection
from audit.progress import Tell, quiet
from audit.recovery.ask import with_captions
from audit.references import ReferenceSets, SkippedImage
from audit.references.adding import add_references as add_references
from audit.references.asked import described_sets, keep_latents_of, require_decoys
from audit.references.folder import known_pictures
from audit.references.policy import require_in_force
from audit.report import AuditFacts, collect, write_page
from audit.report.again import match_again
from audit.report.facts import find_audit
from audit.report.index import Answer, Together
from audit.report.verdict import QuestionVerdict
from audit.stages import Clustered, Report, Sampled, Scores, stages_for
from audit.states import Known, SetKind
from audit.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_WORKSPACE = "lora-audit-workspace"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a scan leaves.

    ``facts`` are what the report says, ``page`` is where it is; ``skipped`` are reference pictures that were passed
    over, and ``was_known`` says that the audit was finished before: nothing was sampled.
    """

    job: Job
    facts: AuditFacts
    page: str
    skipped: list[SkippedImage] = field(default_factory=list)
    was_known: bool = False

    @property
    def audit_id(self) -> str:
        """The audit's id: 32 hex digits."""
        return self.job.id

    @property
    def verdict(self) -> QuestionVerdict:
        """What is said of the references and sets: match, possible, none or uncalibrated, and what it rests on."""
        return self.facts.verdict

    @property
    def matched(self) -> list[str]:
        """The names of the reference pictures that match, the surest first."""
        return [one.name for one in self.verdict.matched]

    @property
    def possible(self) -> list[str]:
        """The names of those that are possible."""
        return [one.name for one in self.verdict.possible]

    @property
    def tells_nothing(self) -> str | None:
        """Why nothing follows from finding no match; None where the audit did its work, or found some."""
        return self.verdict.tells_nothing

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit scan --json`` prints them: everything but pictures and vectors."""
        skipped = [asdict(one) for one in self.skipped]
        return {**self.facts.as_json(), "report": self.page, "skipped_images": skipped}

    def to_arrow(self) -> pa.Table:
        """A row an extraction and reference near it, with the verdict of the fixed threshold: see ``verdict``."""
        import pyarrow as pa

        rows = [
            {"audit_id": self.audit_id, "rank": one.rank, "confidence": one.confidence, "size": one.size,
             "reference_set": match.reference_set, "name": match.name, "similarity": match.similarity,
             "pdq_distance": match.pdq_distance, "verdict": str(match.verdict), "evidence": match.evidence}
            for one in self.facts.extractions
            for match in one.matches
        ]  # fmt: skip
        kinds = {"rank": pa.int32(), "confidence": pa.float64(), "size": pa.int32(), "similarity": pa.float64(),
                 "pdq_distance": pa.int32()}  # fmt: skip
        names = ("audit_id", "rank", "confidence", "size", "reference_set", "name", "similarity", "pdq_distance",
                 "verdict", "evidence")  # fmt: skip
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
        return pa.Table.from_pylist(rows, schema=schema)

    def to_pandas(self) -> Any:
        """``to_arrow`` as a pandas frame; pandas has to be installed."""
        return self.to_arrow().to_pandas()


@dataclass(frozen=True)
class Compared:
    """What matching finished audits again found, at one rate over all of them, and how many were left out, by why."""

    found: Together
    left_out: dict[str, int]

    @property
    def answers(self) -> list[Answer]:
        """What was found of each audit, those with most matches first."""
        return self.found.answers

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit match --json`` prints them."""
        return {
            "audits": [asdict(one) for one in self.answers], "compared": self.found.compared,
            "expected": self.found.expected, "left_out": self.left_out,
        }  # fmt: skip


def scan(
    checkpoint: Request | str | Path,
    base: str | None = None,
    *,
    references: Iterable[str | Path] = (),
    descriptor: str = "sscd",
    workspace: Workspace | str | Path = DEFAULT_WORKSPACE,
    captions: Sequence[str] = (),
    n0: int | None = None,
    settings: Settings | None = None,
    training_images: str | Path | None = None,
    control: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 0,
    compile: Compile = Compile.off,
    background: Iterable[str | Path] = (),
    drawn: bool = False,
    latents: Latents = Latents.auto,
    rule: Rule | str = Rule.calibrated,
    fdr: float = VerdictSettings.fdr,
    custody: Custody = NOBODY,
    progress: Tell | None = None,
    bench: Bench | None = None,
) -> Result:
    """Audit one checkpoint: sample it, cluster, match with references, score, and write a report page.

    ``checkpoint`` is a file, a folder or an item of the catalog ("civitai:1:2:3"), or a Request, which says the base,
    captions, N0 and settings itself. ``references`` are names of reference sets or folders of pictures;
    ``training_images`` and ``control`` folders of pictures that it is scored against. ``latents`` says whether those of
    folders' pictures are kept, which membership is measured on. ``background`` are decoys in the same form, pictures
    of the references' kind that cannot have been trained on; the workspace's sets of that kind count too. ``drawn``
    declares that these folders and the references are a random split of one collection, which ``rule`` "either" asks
    for. ``rule`` and ``fdr`` say what counts as a match (VerdictSettings). ``progress`` is told (what, done, of how
    many). ``custody`` says who asks, for the page's manifest, and signs it. A ``bench`` keeps models in memory from
    call to call; it has the device, and serves one at a time.

    A stopped scan goes on where it was. Raises AuditError; what can be refused is refused before sampling starts.
    """
    tell, asked = progress or quiet, verdict_settings(rule, fdr)
    request = _request(checkpoint, base, captions, n0, settings)
    references, decoys = list(references), list(background)
    require_references(request.settings, references)
    require_decoys(references, decoys, drawn)
    bench = _bench(bench, device, batch_size, compile)
    if is_item(Path(request.checkpoint)):
        workspace = workspace if isinstance(workspace, Workspace) else Workspace(workspace, create=False)
        request, truth = from_catalog(request, workspace)
        training_images = training_images or truth
    job = resolve(request, descriptor, bench)
    log.debug(
        "audit %s on %s: %d images of %s, base %s at %s, descriptor %s", job.id, bench.device, job.images, job.name,
        job.base.name, job.base.revision, job.descriptor.name,
    )  # fmt: skip
    known = {
        kind: known_pictures(Path(folder))
        for kind, folder in ((Known.training, training_images), (Known.control, control))
        if folder is not None
    }
    opened = workspace if isinstance(workspace, Workspace) else Workspace(workspace)
    job = with_captions(job, request, opened, bench, tell)
    thumbnails = request.settings.stored_images is not StoredImages.hashes_only
    names, skipped = described_sets(opened, references, bench, job, thumbnails, tell)
    described_sets(opened, decoys, bench, job, thumbnails, tell, SetKind.background, names if drawn else ())
    if latents is Latents.always or (latents is Latents.auto and thumbnails):
        keep_latents_of(opened, [*references, *decoys], bench, job, tell)
    place = Place(opened, bench)
    stages = stages_for(names)
    page = next(number for number, stage in enumerate(stages) if stage.name == Report.name)
    records = run_stages(stages[:page], job, place, tell)
    run_stages([Scores(kind, pictures) for kind, pictures in known.items()], job, place, tell)
    facts = collect(opened, job.id, names, asked)  # once: for the page and for the caller
    written = write_page(facts, opened, custody)
    sign_written(opened, written, custody)
    run_stages(stages[page + 1 :], job, place, tell)
    was_known = not any(isinstance(record, Sampled | Clustered) for record in records)
    return Result(job, facts, written, skipped, was_known)


def verdict_settings(rule: Rule | str, fdr: float) -> VerdictSettings:
    """What counts as a match. Raises ConfigError for a rule that there is not, or a rate out of its limits."""
    try:
        return VerdictSettings(Rule(rule), fdr)
    except ValueError as error:
        raise ConfigError(f"rule = {rule!r}: it is one of {', '.join(Rule)}") from error


def _request(
    checkpoint: Request | str | Path, base: str | None, captions: Sequence[str], n0: int | None,
    settings: Settings | None,
) -> Request:  # fmt: skip
    if isinstance(checkpoint, Request):
        if base is not None or captions or n0 is not None or settings is not None:
            raise ConfigError("a Request says its base, captions, n0 and settings itself: give one or the other")
        return checkpoint
    if base is None:
        raise ConfigError(f"say which base model {checkpoint} was trained on: sd15, owner/name@COMMIT, a folder")
    return Request(Path(checkpoint), base, captions=list(captions), n0=n0, settings=settings or Settings())


def require_references(settings: Settings, references: Sequence[Any]) -> None:
    """Raise ConfigError where membership alone is asked for, and nothing that could be a member is named."""
    if settings.evidence is Evidence.membership and not references:
        raise ConfigError("membership is measured on references: give --references, or another --evidence")


def _bench(bench: Bench | None, device: str | None, batch_size: int, compile: Compile) -> Bench:
    if bench is None:
        return Bench(device or default_device(), batch_size, compile)
    if device is not None or batch_size or compile is not Compile.off:
        raise ConfigError("a Bench has its device, batch_size and compile itself: give one or the other")
    return bench


def is_item(path: Path) -> bool:
    """Whether what is given in place of a file names an item of the catalog."""
    source, _, rest = str(path).partition(":")
    if not rest or path.exists():
        return False
    from crawlers.local import LocalFile
    from crawlers.source import SOURCES

    return source == LocalFile.name or source in SOURCES


def from_catalog(request: Request, workspace: Workspace) -> tuple[Request, Path | None]:
    """The request for an item of the catalog with its file and claims, and the folder of its known training images.

    Raises FetchError where it has no stored file.
    """
    from crawlers.catalog import Catalog, OptOuts

    catalog, second = Catalog(workspace, OptOuts.read(workspace, None)), request.low_noise
    entry = catalog.entry(str(request.checkpoint))
    if second is not None and is_item(second):
        other = catalog.entry(str(second))
        check_given_as(Expert.low_noise, second, other.name or "", {})
        second = other.path
    known = replace(
        request, checkpoint=entry.path, low_noise=second, name=entry.name, known_captions=entry.captions,
        known_n0=entry.n0, known_warnings=entry.warnings, known_bases=entry.bases,
    )  # fmt: skip
    return known, entry.ground_truth


def run(
    config: Config, tell: Callable[[RunState], None] | None = None, stop: threading.Event | None = None,
    custody: Custody = NOBODY,
) -> RunState:  # fmt: skip
    """Audit what the catalog of a workspace holds and has no result yet; the final state.

    ``tell`` hears of the state at every event; ``custody`` is for the pages' manifests, as in ``scan``. It can be
    stopped at any time, at best by setting ``stop``, and goes on where it was. Raises AuditError where it cannot
    begin, and where results cannot be kept.
    """
    if not config.bases:
        raise ConfigError("no base model is configured: give --base FAMILY=SOURCE, or [bases] in the configuration")
    require_references(config.settings, config.references)
    return Run(config, tell, stop, custody).run()


def inspect(
    path: str | Path, base: str | None = None, *, base_config: str | None = None, adapter: str | None = None,
    low_noise: str | Path | None = None, expert: Expert | str | None = None,
) -> Inspection:  # fmt: skip
    """What a checkpoint is and what was trained, before anything is sampled; with ``base`` it is applied to it too.

    Of a base with two experts ``low_noise`` is the second file, and ``expert`` the one that a single file is for. What
    it cannot be audited for is in ``problem``. Raises AuditError for a base that cannot be had, and for another expert.
    """
    from audit.models.base import load_base, locate_base
    from audit.models.inspect import inspect as look

    model = load_base(locate_base(base, base_config)) if base else None
    if expert is not None and expert not in [*Expert]:
        raise ConfigError(f"expert = {expert!r}: it is one of {', '.join(Expert)}")
    second = None if low_noise is None else Path(low_noise)
    return look(Path(path), model, adapter, second, None if expert is None else Expert(expert))


def match(
    references: Sequence[str],
    audits: Sequence[str] | None = None,
    *,
    workspace: Workspace | str | Path = DEFAULT_WORKSPACE,
    rule: Rule | str = Rule.calibrated,
    fdr: float = VerdictSettings.fdr,
    custody: Custody = NOBODY,
    progress: Tell | None = None,
) -> Compared:
    """Compare finished audits with reference sets that came later, and write their pages. No model is needed.

    ``audits`` are ids, or their beginnings; None: all. ``rule`` and ``fdr`` say what counts as a match, of all audits
    together. Raises ReferenceSetError for a set that is not there.
    """
    asked = verdict_settings(rule, fdr)
    opened = workspace if isinstance(workspace, Workspace) else Workspace(workspace, create=False)
    ReferenceSets(opened).require_any(references)
    require_in_force(opened, references)
    chosen = [find_audit(opened, one) for one in audits] if audits else None
    return Compared(*match_again(opened, references, chosen, progress or quiet, asked, custody))
