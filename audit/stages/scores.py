"""Scores: a finished audit against known pictures, and the ceiling that the base's codec sets."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from audit.progress import Tell, quiet
from audit.states import Known, Needs

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from audit.bench import Bench
    from audit.job import Job
    from audit.workspace import Workspace

CEILINGS = "ceilings"  # the folder of a workspace that keeps them


@dataclass(frozen=True)
class Scored:
    """What was written: the row of evaluations without the audit's id."""

    kind: Known
    images: int
    average_similarity: float
    extraction_rate_07: float
    extraction_rate_06: float
    ceiling: float


class Scores:
    """Score against ``pictures``, which the audit's ``kind`` of pictures are.

    The ceiling of the same pictures under the same base is computed once a workspace; no denoiser is loaded for it.
    """

    name = "scores"
    needs = Needs.gpu

    def __init__(self, kind: Known, pictures: Sequence[Image.Image]) -> None:
        self.kind, self.pictures = kind, list(pictures)

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Never: the pictures may be others now."""
        return False

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Scored:
        """Write the row of evaluations. Raises AuditError."""
        import numpy as np

        from audit.evidence import score
        from audit.sampling.spooled import vectors_of

        known = bench.descriptor(job).describe(self.pictures)
        key = f"{CEILINGS}/{_ceiling_key(job, self.pictures)}.json"
        ceiling = _kept_ceiling(workspace, key)
        if ceiling is None:
            ceiling = _ceiling(job, bench, self.pictures)
            workspace.files.write(key, json.dumps({"ceiling": ceiling}).encode())
        extracted = workspace.select("SELECT descriptor FROM extractions WHERE audit_id = ?", [job.id])
        found = score(vectors_of(extracted) if extracted.num_rows else np.empty((0, known.shape[1])), known)
        scored = Scored(self.kind, **asdict(found), ceiling=ceiling)
        workspace.write("evaluations", f"{job.id}.{self.kind}", [{"audit_id": job.id, **asdict(scored)}])
        return scored


def _ceiling(job: Job, bench: Bench, pictures: Sequence[Image.Image]) -> float:
    """Mean cosine of the pictures and their reconstructions by the base's codec."""
    from audit.descriptors.base import stacked

    codec, descriptor = bench.codec(job), bench.descriptor(job)
    images: np.ndarray = stacked(pictures, codec.picture_size)
    cosines = descriptor.describe(codec.reconstruct(images)) * descriptor.describe(images)
    return float(cosines.sum(axis=1).mean())


def _ceiling_key(job: Job, pictures: Sequence[Image.Image]) -> str:
    """A hash of everything that the ceiling depends on."""
    settings = job.settings
    depends_on = [job.base.revision, settings.resolution, settings.precision, job.descriptor.name, job.algorithm]
    digest = hashlib.sha256(json.dumps(depends_on).encode())
    for picture in pictures:
        digest.update(json.dumps(picture.size).encode())
        digest.update(picture.convert("RGB").tobytes())
    return digest.hexdigest()


def _kept_ceiling(workspace: Workspace, key: str) -> float | None:
    """The ceiling in the file ``key``; None where there is none, or it is damaged."""
    try:
        found = json.loads(workspace.files.read(key) or b"")["ceiling"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, float) and math.isfinite(found) else None
