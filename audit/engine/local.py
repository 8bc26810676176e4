"""The local engine: every stage of an audit in this process, one after another."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
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
from audit.evaluation import score
from audit.extraction.extract import Extract, vectors_of
from audit.extraction.guidance import make_guidance, weight_of
from audit.extraction.sampling import Sampler
from audit.matching import match_extractions
from audit.models.base import load_base
from audit.models.checkpoint import metadata_json
from audit.models.pair import ModelPair
from audit.schemas import EXTRACTIONS, GENERATIONS
from audit.storage import Workspace

Progress = Callable[[str, int, int], None]
PACKAGES = ("lora-audit", "torch", "diffusers", "transformers", "peft", "numpy", "scipy")


class LocalEngine:
    """Runs audits into a workspace. ``progress`` is told (stage, done, total)."""

    def __init__(
        self, workspace: Workspace, device: str = "cpu", batch_size: int = 0, progress: Progress | None = None
    ) -> None:
        self.workspace, self.device, self.batch_size = workspace, device, batch_size
        self.progress = progress or (lambda stage, done, total: None)
        self._loaded: tuple[tuple[str, str, float], ModelPair] | None = None

    def audit(self, plan: Plan) -> bool:
        """Extract and cluster, unless this audit is already finished; whether it had to be run.

        A stopped run goes on where it was. Nothing is in the tables until everything is: the audits row is last.
        Raises AuditError.
        """
        audit_id = plan.audit_id
        if self.workspace.has("audits", audit_id):
            self.workspace.spool(audit_id).discard()
            return False
        started = time.monotonic()
        pair = self._load(plan)
        warnings = list(plan.warnings)
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
        spool = self.workspace.spool(audit_id)
        pixels = plan.settings.stored_images is not StoredImages.hashes_only
        extract = Extract(sampler, plan.descriptor, spool, audit_id, plan.images, pixels)
        rows = extract.run(lambda done, total: self.progress("sampling", done, total))

        self.progress("clustering", 0, 1)
        clusters, clustering_warnings = self._cluster(plan, vectors_of(rows))
        self.progress("clustering", 1, 1)
        warnings += clustering_warnings

        self._store(plan, rows, clusters)
        seconds = float(np.sum(rows["seconds"].to_numpy()))
        sampled = rows["caption"].to_pylist()
        captions = [
            {
                "caption": caption.text,
                "source": caption.source,
                "truncated": caption.text in truncated,
                "images": sampled.count(caption.text),
            }
            for caption in plan.captions
        ]
        row = self._audit_row(plan, pair, sampler, warnings, seconds, time.monotonic() - started)
        self.workspace.write("audits", audit_id, [row | {"captions": captions}])
        spool.discard()
        return True

    def _load(self, plan: Plan) -> ModelPair:
        key = plan.checkpoint.identity, plan.base.revision, plan.settings.lora_scale
        if self._loaded is None or self._loaded[0] != key:
            self.progress("loading", 0, 1)
            pair = ModelPair(load_base(plan.base), plan.checkpoint, self.device, plan.settings.lora_scale)
            self._loaded = key, pair
            self.progress("loading", 1, 1)
        return self._loaded[1]

    @staticmethod
    def _cluster(plan: Plan, vectors: np.ndarray) -> tuple[list[Cluster], list[str]]:
        count = plan.training_images.count
        if plan.settings.clustering is Clustering.cliques:
            clusters, threshold, timed_out = greedy_cliques(vectors, count)
            note = f"the clique search passed its time limit; it ended at threshold {threshold:.2f}"
            return clusters, [note] if timed_out else []
        known = count if plan.training_images.source != "default" else None
        return density_peaks(vectors, known, plan.descriptor.threshold), []

    def _store(self, plan: Plan, rows: pa.Table, clusters: list[Cluster]) -> None:
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
        self.workspace.write("extractions", audit_id, pa.Table.from_pylist(extractions, schema=EXTRACTIONS))
        generations = rows.select(GENERATIONS.names)
        if plan.settings.stored_images is not StoredImages.all:
            at = generations.schema.get_field_index("image")
            generations = generations.set_column(at, "image", pa.nulls(len(generations), pa.binary()))
        self.workspace.write("generations", audit_id, generations)
        if not self.workspace.rows("SELECT 1 FROM checkpoints WHERE checkpoint_sha256 = ?", [checkpoint.sha256]):
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
            self.workspace.write("checkpoints", checkpoint.sha256, [row])

    def _audit_row(
        self, plan: Plan, pair: ModelPair, sampler: Sampler, warnings: list[str], sampling: float, total: float
    ) -> dict[str, Any]:
        return {
            "audit_id": plan.audit_id,
            "checkpoint_sha256": plan.checkpoint.sha256,
            "tensors_sha256": plan.checkpoint.tensors_sha256,
            "checkpoint_name": plan.checkpoint.name,
            "base_name": plan.base.name,
            "base_revision": plan.base.revision,
            "settings": json.dumps(plan.settings.as_dict(), sort_keys=True),
            "training_images": plan.training_images.count,
            "training_images_source": plan.training_images.source,
            "images": plan.images,
            "evaluations": plan.images * plan.settings.steps * sampler.guidance.evaluations,
            "weight_change": pair.effect.weights,
            "prediction_change": pair.effect.prediction,
            "descriptor": plan.descriptor.name,
            "threshold": plan.descriptor.threshold,
            "warnings": warnings,
            "seconds_sampling": sampling,
            "seconds_total": total,
            "device": self._device_name(),
            "versions": json.dumps({"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}),
            "finished_at": datetime.now(UTC),
        }

    def _device_name(self) -> str:
        import torch

        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(self.device)
        return f"{self.device}, {platform.machine()}, {torch.get_num_threads()} threads"

    def match(self, plan: Plan, sets: list[str]) -> None:
        """Match a finished audit with reference sets; one file of matches a set, replaced when it is matched again."""
        extractions = self.workspace.select("SELECT * FROM extractions WHERE audit_id = ?", [plan.audit_id])
        for number, name in enumerate(sets):
            self.progress("matching", number, len(sets))
            rows = match_extractions(
                self.workspace, extractions, [name], plan.descriptor.name, plan.descriptor.threshold
            )
            self.workspace.write("matches", f"{plan.audit_id}.{name}", rows)
        self.progress("matching", len(sets), len(sets))

    def evaluate(self, plan: Plan, kind: str, pictures: list[Image.Image]) -> None:
        """Score a finished audit against known ``pictures``; ``kind`` is "training" or "control"."""
        pair = self._load(plan)
        known = plan.descriptor.describe(pictures)
        _, height, width = pair.latent_shape
        factor = 2 ** (len(pair.vae.config.block_out_channels) - 1)
        images = stacked(pictures, (width * factor, height * factor))
        ceiling = plan.descriptor.describe(pair.reconstruct(images)) * plan.descriptor.describe(images)
        extracted = self.workspace.select("SELECT descriptor FROM extractions WHERE audit_id = ?", [plan.audit_id])
        found = score(vectors_of(extracted) if extracted.num_rows else np.empty((0, known.shape[1])), known)
        row = {"audit_id": plan.audit_id, "kind": kind, **asdict(found), "ceiling": float(ceiling.sum(axis=1).mean())}
        self.workspace.write("evaluations", f"{plan.audit_id}.{kind}", [row])
