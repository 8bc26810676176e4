"""Cluster: the images in the spool become extractions, and the audit's tables."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from audit.errors import WorkspaceError
from audit.progress import Tell, quiet
from audit.stages.registry import StageKind
from audit.stages.sample import SpoolFacts
from audit.states import ItemState, Needs

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from audit.bench import Bench
    from audit.evidence import Cluster as Group
    from audit.job import Job
    from audit.workspace import Workspace

PACKAGES = ("lora-audit", "torch", "diffusers", "transformers", "peft", "numpy", "scipy")


@dataclass(frozen=True)
class Clustered:
    """How many extractions there are, and the seconds it took."""

    seconds: float
    extractions: int


class Cluster:
    """Cluster what the spool holds and write the audit's tables, the audits row last; the spool is gone then."""

    name = "cluster"
    needs = Needs.cpu

    def done(self, job: Job, workspace: Workspace) -> bool:
        """Whether the audit is in the tables, and nothing is left of its spool."""
        return not workspace.spool(job.id).exists() and workspace.has("audits", job.id)

    def run(self, job: Job, workspace: Workspace, bench: Bench, tell: Tell = quiet) -> Clustered:
        """Write the tables. Raises WorkspaceError where the spool is not complete."""
        started = time.monotonic()
        spool = workspace.spool(job.id)
        clusters: list[Group] = []
        if not workspace.has("audits", job.id):  # else it was killed before its spool was gone
            clusters = _write_audit(job, workspace, tell, started)
        spool.discard()
        return Clustered(time.monotonic() - started, len(clusters))


def _write_audit(job: Job, workspace: Workspace, tell: Tell, started: float) -> list[Group]:
    from audit.sampling.spooled import SPOOLED, vectors_of

    spool = workspace.spool(job.id)
    facts = spool.finished()
    rows = first_of_each(spool.read([name for name in SPOOLED.names if name != "image"]))
    rows = SPOOLED.empty_table() if rows is None else rows
    if facts is None or rows.num_rows != job.images:
        raise WorkspaceError(f"the spool of audit {job.id} is not complete: run the audit again")
    tell("clustering", 0, 1)
    clusters, warnings = _clusters(job, vectors_of(rows)) if job.images else ([], [])
    tell("clustering", 1, 1)
    if job.images:
        _write_images(job, workspace, clusters)
    _write_checkpoint(job, workspace)
    row = _audit_row(job, rows, SpoolFacts(**facts), warnings, started)
    workspace.write("audits", job.id, [row])
    return clusters


def _clusters(job: Job, vectors: np.ndarray) -> tuple[list[Group], list[str]]:
    from audit.config import Clustering
    from audit.evidence import density_peaks, greedy_cliques

    count = job.n0.count
    if job.settings.clustering is Clustering.cliques:
        clusters, threshold, timed_out = greedy_cliques(vectors, count)
        note = f"the clique search passed its time limit; it ended at threshold {threshold:.2f}"
        return clusters, [note] if timed_out else []
    known = count if job.n0.source != "default" else None
    return density_peaks(vectors, known, job.descriptor.threshold), []


def _audit_row(job: Job, rows: pa.Table, sampled: SpoolFacts, warnings: list[str], started: float) -> dict[str, Any]:
    from importlib.metadata import version

    import numpy as np

    drawn = rows["caption"].to_pylist()
    captions = [
        {
            "caption": caption.text,
            "source": caption.source,
            "truncated": caption.text in sampled.truncated,
            "images": drawn.count(caption.text),
        }
        for caption in job.captions
    ]
    return {
        "audit_id": job.id,
        "checkpoint_sha256": job.checkpoint.sha256,
        "tensors_sha256": job.checkpoint.tensors_sha256,
        "checkpoint_name": job.name,
        "base_name": job.base.name,
        "base_revision": job.base.revision,
        "settings": json.dumps(job.settings.as_dict(), sort_keys=True),
        "training_images": job.n0.count,
        "training_images_source": job.n0.source,
        "captions": captions,
        "images": job.images,
        "evaluations": sampled.evaluations,
        "weight_change": sampled.weight_change,
        "prediction_change": sampled.prediction_change,
        "descriptor": job.descriptor.name,
        "threshold": job.descriptor.threshold,
        "descriptor_size": job.descriptor.input_size,
        "warnings": sampled.warnings + warnings,
        "tells_nothing": sampled.problem or _tells_nothing(rows),
        "seconds_sampling": float(np.sum(rows["seconds"].to_numpy())),
        "seconds_total": sampled.seconds_total + time.monotonic() - started,
        "device": sampled.device,
        "precision": sampled.precision,
        "versions": json.dumps({"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}),
        "finished_at": datetime.now(UTC),
    }


def _tells_nothing(rows: pa.Table) -> str | None:
    from audit.sampling.pictures import NOT_SAMPLED, not_pictures

    if rows.num_rows == 0:
        return NOT_SAMPLED
    return not_pictures(rows["contrast"].to_numpy(), rows["roughness"].to_numpy())


def first_of_each(batches: Iterable[pa.Table]) -> pa.Table | None:
    """Rows in the order of their numbers, each number once: two workers may have sampled the same image."""
    import numpy as np
    import pyarrow as pa

    tables = list(batches)
    if not tables:
        return None
    rows = pa.concat_tables(tables).sort_by("index")
    numbers = rows["index"].to_numpy()
    return rows.filter(pa.array(np.append(True, numbers[1:] != numbers[:-1])))


def _write_images(job: Job, workspace: Workspace, clusters: list[Group]) -> None:
    """Write generations and extractions. One batch of raw pixels is in memory at a time."""
    import pyarrow as pa

    from audit.config import StoredImages
    from audit.sampling.spooled import as_generations
    from audit.schemas import EXTRACTIONS, GENERATIONS

    kept = {cluster.representative for cluster in clusters}
    everything = job.settings.stored_images is StoredImages.all
    wanted = set(range(job.images)) if everything else kept
    rows = first_of_each(as_generations(batch, wanted) for batch in workspace.spool(job.id).read())
    assert rows is not None
    extractions = [
        {
            **rows.slice(cluster.representative, 1).to_pylist()[0],
            "rank": rank,
            "confidence": cluster.confidence,
            "size": len(cluster.members),
            "tightness": cluster.tightness,
            "members": list(cluster.members),
        }
        for rank, cluster in enumerate(clusters, start=1)
    ]
    workspace.write("extractions", job.id, pa.Table.from_pylist(extractions, schema=EXTRACTIONS))
    if not everything:
        at = rows.schema.get_field_index("image")
        rows = rows.set_column(at, GENERATIONS.field(at), pa.nulls(len(rows), pa.binary()))
    workspace.write("generations", job.id, rows)


def _write_checkpoint(job: Job, workspace: Workspace) -> None:
    """Write the row of a checkpoint that was given as a file; one of the catalog has its own."""
    checkpoint = job.checkpoint
    known = "SELECT 1 FROM checkpoints WHERE checkpoint_sha256 = ?"
    if checkpoint.path is None or workspace.rows(known, [checkpoint.sha256]):
        return
    now = datetime.now(UTC)
    row = {
        "item_id": checkpoint.item_id,
        "source": "file",
        "state": ItemState.stored,
        "checkpoint_sha256": checkpoint.sha256,
        "tensors_sha256": checkpoint.tensors_sha256,
        "name": checkpoint.name,
        "format": checkpoint.format,
        "bytes": checkpoint.bytes,
        "claimed_metadata": checkpoint.claimed_metadata,
        **asdict(checkpoint.training),
        "identity": checkpoint.identity,
        "first_seen_at": now,
        "seen_at": now,
    }
    workspace.write("checkpoints", checkpoint.sha256, [row])


STAGE = StageKind("cluster", "membership", lambda references: Cluster())
