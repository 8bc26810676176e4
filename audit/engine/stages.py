"""The stages of an audit: extract on a GPU, then cluster, match and report on a CPU.

They are plain classes that know nothing of engines. What ``Extraction`` hands to ``finish`` lies in the spool, so the
two can run in different processes, and a run that stopped between them goes on there.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from audit.clustering import Cluster, density_peaks, greedy_cliques
from audit.config import Clustering, StoredImages
from audit.descriptors.base import stacked
from audit.engine.plan import Plan
from audit.errors import WorkspaceError
from audit.evaluation import score
from audit.extraction.extract import Extract, vectors_of
from audit.extraction.guidance import make_guidance, weight_of
from audit.extraction.sampling import Sampler
from audit.matching import match_extractions
from audit.models.base import BaseModel, load_base
from audit.models.checkpoint import metadata_json
from audit.models.pair import ModelPair
from audit.schemas import EXTRACTIONS, GENERATIONS
from audit.storage import Workspace

Progress = Callable[[str, int, int], None]
PACKAGES = ("lora-audit", "torch", "diffusers", "transformers", "peft", "numpy", "scipy")


@dataclass(frozen=True)
class Extracted:
    """What is known of an audit once its images are in the spool, besides the images."""

    warnings: list[str]
    truncated: list[str]
    evaluations: int
    weight_change: float
    prediction_change: float
    device: str
    peak_memory: int
    seconds_loading: float
    seconds_total: float


class Extraction:
    """The stage that needs a GPU. One base model is kept in memory, and the pair of the last checkpoint."""

    def __init__(
        self, workspace: Workspace, device: str = "cpu", batch_size: int = 0, progress: Progress | None = None
    ) -> None:
        self.workspace, self.device, self.batch_size = workspace, device, batch_size
        self.progress = progress or (lambda stage, done, total: None)
        self._base: tuple[str, BaseModel] | None = None
        self._pair: tuple[tuple[str, str, tuple[Any, ...]], ModelPair] | None = None

    def run(self, plan: Plan) -> Extracted:
        """Sample what the spool lacks. Raises AuditError."""
        started = time.monotonic()
        pair = self.pair(plan)
        loading = time.monotonic() - started
        warnings = [*plan.warnings, *pair.warnings]
        missing = [token for token in pair.tokens if not any(token in caption.text for caption in plan.captions)]
        if missing:
            warnings.append(f"the file brings tokens that are in no caption: {', '.join(missing[:10])[:200]}")
        truncated = [caption.text for caption in plan.captions if pair.is_truncated(caption.text)]
        warnings += [
            f"the caption {text[:60]!r}... is longer than the {pair.caption_tokens} tokens the text encoder takes: "
            "its end was cut off"
            for text in truncated
        ]
        sampler = Sampler(
            pair,
            make_guidance(plan.settings),
            [caption.text for caption in plan.captions],
            solver=plan.settings.solver,
            steps=plan.settings.steps,
            seed=plan.settings.seed,
            batch_size=self.batch_size,
            w=weight_of(plan.settings, pair.effect.prediction),
        )
        spool = self.workspace.spool(plan.audit_id)
        pixels = plan.settings.stored_images is not StoredImages.hashes_only
        extract = Extract(sampler, plan.descriptor, spool, plan.audit_id, plan.images, pixels)
        extract.run(lambda done, total: self.progress("sampling", done, total))
        extracted = Extracted(
            warnings=warnings,
            truncated=truncated,
            evaluations=plan.images * plan.settings.steps * sampler.guidance.evaluations,
            weight_change=pair.effect.weights,
            prediction_change=pair.effect.prediction,
            device=self._device_name(),
            peak_memory=peak_memory(self.device),
            seconds_loading=loading,
            seconds_total=time.monotonic() - started,
        )
        spool.finish(asdict(extracted))
        return extracted

    def pair(self, plan: Plan) -> ModelPair:
        """The base and the fine-tuned networks of ``plan``, loaded unless they are those of the last one."""
        settings = plan.settings
        options = settings.lora_scale, settings.adapter, settings.resolution, settings.embedded_guidance
        key = plan.checkpoint.identity, plan.base.revision, options
        if self._pair is None or self._pair[0] != key:
            self.progress("loading", 0, 1)
            self._pair = None  # the old fine-tuned side goes before the new one comes
            if self._base is None or self._base[0] != plan.base.revision:
                self._base = None
                self._base = plan.base.revision, load_base(plan.base)
            self._pair = key, ModelPair(self._base[1], plan.checkpoint, self.device, *options)
            self.progress("loading", 1, 1)
        return self._pair[1]

    def _device_name(self) -> str:
        import torch

        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(self.device)
        return f"{self.device}, {platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device: str) -> int:
    """The most memory this process has used on its device, bytes; its resident size on a CPU."""
    import resource

    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish(workspace: Workspace, plan: Plan, progress: Progress | None = None) -> None:
    """Cluster what the spool holds and write the audit's tables, the audits row last; the spool is gone then.

    Raises WorkspaceError where the spool is not complete.
    """
    tell = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    audit_id, spool = plan.audit_id, workspace.spool(plan.audit_id)
    facts, rows = spool.finished(), spool.read()
    if facts is None or rows is None or rows.num_rows != plan.images:
        raise WorkspaceError(f"the spool of audit {audit_id} is not complete: run the audit again")
    extracted = Extracted(**facts)
    rows = rows.sort_by("index")
    tell("clustering", 0, 1)
    clusters, warnings = _cluster(plan, vectors_of(rows))
    tell("clustering", 1, 1)
    _store(workspace, plan, rows, clusters)
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
        "warnings": extracted.warnings + warnings,
        "seconds_sampling": seconds,
        "seconds_total": extracted.seconds_total + time.monotonic() - started,
        "device": extracted.device,
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


def _store(workspace: Workspace, plan: Plan, rows: pa.Table, clusters: list[Cluster]) -> None:
    audit_id, checkpoint = plan.audit_id, plan.checkpoint
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
    generations = rows.select(GENERATIONS.names)
    if plan.settings.stored_images is not StoredImages.all:
        at = generations.schema.get_field_index("image")
        generations = generations.set_column(at, "image", pa.nulls(len(generations), pa.binary()))
    workspace.write("generations", audit_id, generations)
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
            "identity": checkpoint.identity,
            "first_seen_at": now,
            "seen_at": now,
        }
        workspace.write("checkpoints", checkpoint.sha256, [row])


def match(workspace: Workspace, plan: Plan, sets: list[str]) -> int:
    """Match a finished audit with reference sets; one file of matches a set, replaced when it is matched again.

    How many reference pictures it matched.
    """
    extractions = workspace.select("SELECT * FROM extractions WHERE audit_id = ?", [plan.audit_id])
    found: set[tuple[str, str]] = set()
    for name in sets:
        rows = match_extractions(workspace, extractions, [name], plan.descriptor.name, plan.descriptor.threshold)
        workspace.write("matches", f"{plan.audit_id}.{name}", rows)
        found |= {(name, row["reference_id"]) for row in rows if row["is_match"]}
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
