"""Who asks for recovered captions: a scan whose captions nobody knows, and ``lora-audit captions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from audit.bench import Bench
from audit.claims.captions import Caption
from audit.config import CaptionChoice, CaptionSettings
from audit.devices import default_device
from audit.errors import ConfigError
from audit.job import Job, Request, resolve
from audit.progress import Tell, quiet
from audit.recovery.contrast import heeded
from audit.recovery.kept import recovered
from audit.recovery.recover import Recovered
from audit.stages.precision import widening
from audit.workspace import Workspace

if TYPE_CHECKING:
    from audit.config import Precision

HEEDED = 0.01  # relative change of the prediction by a caption; below it the model does not heed it
DEFAULT = "default"  # the source of the empty caption, where nothing is known


def recover_captions(
    checkpoint: Request | str | Path,
    base: str | None = None,
    *,
    settings: CaptionSettings | None = None,
    words: Sequence[str] = (),
    workspace: Workspace | str | Path = "lora-audit-workspace",
    device: str | None = None,
    progress: Tell | None = None,
    bench: Bench | None = None,
) -> Recovered:
    """Keywords and captions that are recovered from the model itself, whatever the file claims; kept in the workspace.

    ``words`` are further candidates. They are estimates: no caption is told from them with an error rate. Raises
    AuditError, CheckpointError where captions of its family are not recovered.
    """
    if not isinstance(checkpoint, Request):
        if base is None:
            raise ConfigError(f"say which base model {checkpoint} was trained on: sd15, owner/name@COMMIT, a folder")
        checkpoint = Request(Path(checkpoint), base)
    bench = bench or Bench(device or default_device())
    job = resolve(checkpoint, "pdq", bench)
    opened = workspace if isinstance(workspace, Workspace) else Workspace(workspace)
    return recovered(job, opened, bench, settings or checkpoint.recovery, progress or quiet, words)


def with_captions(job: Job, request: Request, workspace: Workspace, bench: Bench, tell: Tell) -> Job:
    """The job with recovered captions where ``request`` wants them and what is known does not do; its id is of them.

    What the user has given stays as it is. Raises AuditError.
    """
    given = bool(request.captions) or request.caption_file is not None
    if request.recovery.choice is not CaptionChoice.auto or given:
        return job
    captions, warnings = found_captions(job, request.recovery, workspace, bench, tell)
    return replace(job, captions=captions, warnings=warnings)


def found_captions(
    job: Job, asked: CaptionSettings, workspace: Workspace, bench: Bench, tell: Tell
) -> tuple[tuple[Caption, ...], tuple[str, ...]]:
    """What to sample ``job`` with, and its warnings: what is claimed where the model heeds it, else what is recovered.

    Raises AuditError, NotRecoverableError where captions of its family are not recovered.
    """
    known = [caption for caption in job.captions if caption.source != DEFAULT]
    warnings = [one for one in job.warnings if not one.startswith("no caption is known")]
    if known:
        moved = widening(job, workspace, bench, lambda precision, _: _heeded(job, workspace, bench, precision, tell),
                         lambda precision: None)  # fmt: skip
        said = f"{max(moved):.1%} at most by a caption that is claimed ({known[moved.index(max(moved))].source})"
        if max(moved) >= HEEDED:
            return job.captions, (*job.warnings, f"captions as claimed: the prediction changes by {said}")
        warnings.append(f"claimed captions do not move the model: its prediction changes by {said}, under {HEEDED:.0%}")
    found = recovered(job, workspace, bench, asked, tell)
    first = ", ".join(repr(one.word) for one in found.keywords[:3])
    warnings.append(
        f"captions were recovered from the model by {found.method} ({found.evaluations} evaluations): they are "
        f"estimates, no claims; likeliest words {first}"
    )
    return tuple(found.captions), tuple(warnings)


def _heeded(job: Job, workspace: Workspace, bench: Bench, precision: Precision, tell: Tell) -> list[float]:
    pair = bench.pair(job, workspace, precision, tell)
    known = [caption.text for caption in job.captions if caption.source != DEFAULT]
    return heeded(pair, known)
