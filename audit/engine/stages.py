"""The stages of an audit that need no GPU: cluster, match, score against known pictures.

They know nothing of engines. What ``Extraction`` hands to ``finish`` lies in the spool, so the two can run in different
processes, and a run that stopped between them goes on there.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import pyarrow as pa
from PIL import Image

from audit.clustering import Cluster, density_peaks, greedy_cliques
from audit.config import Clustering, StoredImages
from audit.descriptors.base import stacked
from audit.engine.extraction import Extracted
from audit.engine.plan import Plan
from audit.errors import WorkspaceError
from audit.evaluation import score
from audit.extraction.extract import SPOOLED, as_generations, vectors_of
from audit.extraction.pictures import not_pictures
from audit.matching import match_extractions
from audit.models.checkpoint import Checkpoint, metadata_json
from audit.models.pair import ModelPair
from audit.models.trained import Training, training_of
from audit.schemas import EXTRACTIONS, GENERATIONS
from audit.storage import Workspace

Progress = Callable[[str, int, int], None]
PACKAGES = ("lora-audit", "torch", "diffusers", "transformers", "peft", "numpy", "scipy")


def finish(workspace: Workspace, plan: Plan, progress: Progress | None = None) -> None:
    """Cluster what the spool holds and write the audit's tables, the audits row last; the spool is gone then.

    Raises WorkspaceError where the spool is not complete.
    """
    tell = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    audit_id, spool = plan.audit_id, workspace.spool(plan.audit_id)
    facts = spool.finished()
    rows = first_of_each(spool.read([name for name in SPOOLED.names if name != "image"]))
    if facts is None or rows is None or rows.num_rows != plan.images:
        raise WorkspaceError(f"the spool of audit {audit_id} is not complete: run the audit again")
    extracted = Extracted(**facts)
    tell("clustering", 0, 1)
    clusters, warnings = _cluster(plan, vectors_of(rows))
    tell("clustering", 1, 1)
    _store(workspace, plan, clusters)
    seconds = float(np.sum(rows["seconds"].to_numpy()))
    sampled = rows["caption"].to_pylist()
    captions = [
        {
            "caption": caption.text,
            "source": caption.source,
            "truncated": caption.text in extracted.truncated,
            "images": sampled.count(caption.text),
        }
        for caption in plan.captions
    ]
    row = {
        "audit_id": audit_id,
        "checkpoint_sha256": plan.checkpoint.sha256,
        "tensors_sha256": plan.checkpoint.tensors_sha256,
        "checkpoint_name": plan.checkpoint.name,
        "base_name": plan.base.name,
        "base_revision": plan.base.revision,
        "settings": json.dumps(plan.settings.as_dict(), sort_keys=True),
        "training_images": plan.training_images.count,
        "training_images_source": plan.training_images.source,
        "captions": captions,
        "images": plan.images,
        "evaluations": extracted.evaluations,
        "weight_change": extracted.weight_change,
        "prediction_change": extracted.prediction_change,
        "descriptor": plan.descriptor.name,
        "threshold": plan.descriptor.threshold,
        "descriptor_size": plan.descriptor.input_size,
        "warnings": extracted.warnings + warnings,
        "tells_nothing": extracted.problem or not_pictures(rows["contrast"].to_numpy(), rows["roughness"].to_numpy()),
        "seconds_sampling": seconds,
        "seconds_total": extracted.seconds_total + time.monotonic() - started,
        "device": extracted.device,
        "precision": extracted.precision,
        "versions": json.dumps({"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}),
        "finished_at": datetime.now(UTC),
    }
    workspace.write("audits", audit_id, [row])
    spool.discard()


def _cluster(plan: Plan, vectors: np.ndarray) -> tuple[list[Cluster], list[str]]:
    count = plan.training_images.count
    if plan.settings.clustering is Clustering.cliques:
        clusters, threshold, timed_out = greedy_cliques(vectors, count)
        note = f"the clique search passed its time limit; it ended at threshold {threshold:.2f}"
        return clusters, [note] if timed_out else []
    known = count if plan.training_images.source != "default" else None
    return density_peaks(vectors, known, plan.descriptor.threshold), []


def first_of_each(batches: Iterable[pa.Table]) -> pa.Table | None:
    """Rows in the order of their numbers, each number once: two workers may have sampled the same image."""
    tables = list(batches)
    if not tables:
        return None
    rows = pa.concat_tables(tables).sort_by("index")
    numbers = rows["index"].to_numpy()
    return rows.filter(pa.array(np.append(True, numbers[1:] != numbers[:-1])))


def _store(workspace: Workspace, plan: Plan, clusters: list[Cluster]) -> None:
    """Write generations, extractions and the checkpoint. One batch of raw pixels is in memory at a time."""
    audit_id, checkpoint = plan.audit_id, plan.checkpoint
    kept = {cluster.representative for cluster in clusters}
    everything = plan.settings.stored_images is StoredImages.all
    wanted = set(range(plan.images)) if everything else kept
    rows = first_of_each(as_generations(batch, wanted) for batch in workspace.spool(audit_id).read())
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
    workspace.write("extractions", audit_id, pa.Table.from_pylist(extractions, schema=EXTRACTIONS))
    if not everything:
        at = rows.schema.get_field_index("image")
        rows = rows.set_column(at, GENERATIONS.field(at), pa.nulls(len(rows), pa.binary()))
    workspace.write("generations", audit_id, rows)
    if not workspace.rows("SELECT 1 FROM checkpoints WHERE checkpoint_sha256 = ?", [checkpoint.sha256]):
        now = datetime.now(UTC)
        row = {
            "item_id": f"file:{checkpoint.sha256}",
            "source": "file",
            "state": "stored",
            "checkpoint_sha256": checkpoint.sha256,
            "tensors_sha256": checkpoint.tensors_sha256,
            "name": checkpoint.name,
            "format": str(checkpoint.format),
            "bytes": checkpoint.bytes,
            "claimed_metadata": metadata_json(checkpoint.metadata),
            **asdict(_training(checkpoint)),
            "identity": checkpoint.identity,
            "first_seen_at": now,
            "seen_at": now,
        }
        workspace.write("checkpoints", checkpoint.sha256, [row])


def _training(checkpoint: Checkpoint) -> Training:
    headers = [header for _, header in checkpoint.files.values()]
    return training_of(checkpoint.metadata, {name: one for header in headers for name, one in header.tensors.items()})


def match(workspace: Workspace, audit_id: str, sets: Sequence[str]) -> int:
    """Match a finished audit with reference sets; one file of matches a set, replaced when it is matched again.

    How many different reference pictures it matched. Raises WorkspaceError where a set is not there any more: an audit
    without its matches would pass for one that found nothing.
    """
    [audit] = workspace.rows("SELECT descriptor, threshold, descriptor_size FROM audits WHERE audit_id = ?", [audit_id])
    extractions = workspace.select("SELECT * FROM extractions WHERE audit_id = ?", [audit_id])
    there = {
        row["reference_set"]
        for row in workspace.rows(
            'SELECT DISTINCT reference_set FROM "references" WHERE descriptor_name = ?', [audit["descriptor"]]
        )
    }
    found: set[str] = set()
    for name in sets:
        if name not in there:
            raise WorkspaceError(
                f"the reference set {name!r} is not in {workspace.files} any more, described by {audit['descriptor']}: "
                "add it again, or leave it out"
            )
        rows = match_extractions(
            workspace, extractions, [name], audit["descriptor"], audit["threshold"], audit["descriptor_size"] or 0
        )
        workspace.write("matches", f"{audit_id}.{name}", rows)
        found |= {row["reference_id"] for row in rows if row["is_match"]}
    return len(found)


def evaluate(workspace: Workspace, plan: Plan, pair: ModelPair, kind: str, pictures: list[Image.Image]) -> None:
    """Score a finished audit against known ``pictures``; ``kind`` is "training" or "control"."""
    known = plan.descriptor.describe(pictures)
    _, height, width = pair.latent_shape
    factor = pair.base.vae_scale_factor
    images = stacked(pictures, (width * factor, height * factor))
    ceiling = plan.descriptor.describe(pair.reconstruct(images)) * plan.descriptor.describe(images)
    extracted = workspace.select("SELECT descriptor FROM extractions WHERE audit_id = ?", [plan.audit_id])
    found = score(vectors_of(extracted) if extracted.num_rows else np.empty((0, known.shape[1])), known)
    row = {"audit_id": plan.audit_id, "kind": kind, **asdict(found), "ceiling": float(ceiling.sum(axis=1).mean())}
    workspace.write("evaluations", f"{plan.audit_id}.{kind}", [row])
