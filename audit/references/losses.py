"""The losses of base and fine-tuned model that membership rests on: those that are kept, and those that are measured.

The base's are kept in the workspace for all checkpoints of a base, the fine-tuned model's in the audit's spool, a slice
of pictures at a time: what is stopped goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from audit.errors import CheckpointError, NotFiniteError
from audit.evidence.levels import expert_at
from audit.evidence.membership import level_of, losses, scores
from audit.models.batches import batch_to_sample
from audit.models.pair import ModelPair
from audit.models.placement import NAMES
from audit.progress import Tell
from audit.references.latents import VIEWS, read_latents
from audit.schemas import BASE_LOSSES

if TYPE_CHECKING:
    from audit.job import Job
    from audit.stages.membership import Question
    from audit.workspace import Spool, Workspace

SLICE = 32  # pictures, under a view each, that are measured and kept together
SPOOLED = pa.schema([one for one in BASE_LOSSES if one.name != "reference_set"])

Item = tuple[str, str]  # a picture and a view of it
Spot = tuple[int, int]  # a timestep and the number of a noise


class Side:
    """One of the two models: its losses by picture, view and spot, and how many evaluations were made here."""

    def __init__(self, pair: ModelPair, tuned: bool, batch: int) -> None:
        self.pair, self.tuned, self.batch = pair, tuned, batch
        self.known: defaultdict[Item, dict[Spot, float]] = defaultdict(dict)
        self.evaluations = 0
        self.condition = pair.encode([_caption(pair) if tuned else ""], tuned)
        self.kind = "losses", pair.architecture.name, pair.latent_shape, pair.dtype  # of batches, for what fits
        self._repeated: dict[int, Any] = {}

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """Know the losses in ``rows``."""
        for row in rows:
            self.known[row["reference_id"], row["view"]][row["timestep"], row["noise"]] = row["loss"]

    def lacks(self, item: Item, spots: Sequence[Spot]) -> bool:
        """Whether one of the losses of ``item`` is not known."""
        return any(spot not in self.known[item] for spot in spots)

    def measure(
        self, items: Sequence[Item], latents: torch.Tensor, timesteps: Sequence[int], noises: Sequence[int]
    ) -> list[dict[str, Any]]:
        """The losses of ``items`` as rows, whose ``latents`` [N, ...] are on the device."""
        pair = self.pair
        levels = [level_of(t, pair.prediction_type, pair.scheduler) for t in timesteps]
        with pair.text_once():
            found = losses(self.predict, latents, levels, noises, pair.fits, self.kind, self.batch)
        self.evaluations += found.size
        rows = [
            {"reference_id": one, "view": view, "timestep": t, "noise": number, "loss": float(found[row, at, on])}
            for row, (one, view) in enumerate(items)
            for at, t in enumerate(timesteps)
            for on, number in enumerate(noises)
        ]
        self.take(rows)
        return rows

    def of(self, item: Item, timesteps: Sequence[int]) -> np.ndarray:
        """float64 [timesteps, noises]: the losses of ``item``, of as many noises as are known at all timesteps."""
        known, count = self.known[item], 0
        while all((t, count) in known for t in timesteps):
            count += 1
        return np.array([[known[t, number] for number in range(count)] for t in timesteps])

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The model's prediction at ``latents`` [N, ...], in its precision, without a caption."""
        count = len(latents)
        if count not in self._repeated:  # the same tensor for every batch of a size: what is made of it is kept
            rows = torch.zeros(count, dtype=torch.long, device=self.pair.device)
            self._repeated[count] = self.condition.select(rows)
        predict = self.pair.predict_tuned if self.tuned else self.pair.predict_base
        return predict(latents, timestep, self._repeated[count])


def _caption(pair: ModelPair) -> str:
    """What the fine-tuned model is told: nothing, but by a checkpoint of tokens alone, which changes nothing else."""
    return "" if pair.effect.weights else " ".join(pair.tokens)


def _asked(pair: ModelPair, timesteps: Sequence[int]) -> tuple[int, ...]:
    """Those of the levels at which an expert acts that is changed: at others every score is 0, and weighs in the mean.

    Raises CheckpointError where an expert that is changed is asked at none: every score would say that of it.
    """
    boundary = pair.boundary
    if boundary is None:
        return tuple(timesteps)
    asked = {expert_at(t, boundary) for t in timesteps}
    if not asked >= {*pair.experts}:
        raise CheckpointError(
            f"{', '.join({*pair.experts} - asked)} of the base is changed, and membership would ask {', '.join(asked)}"
        )
    return tuple(t for t in timesteps if expert_at(t, boundary) in pair.experts)


class Both:
    """The losses of both models on the pictures of a question.

    ``widens``: the audit can go on in a wider precision, so that a loss that is not finite is raised as NotFiniteError;
    else it is kept, and its picture has no score.
    """

    def __init__(
        self, job: Job, workspace: Workspace, spool: Spool, pair: ModelPair, question: Question, batch_size: int,
        widens: bool, tell: Tell,
    ) -> None:  # fmt: skip
        self.workspace, self.pair, self.question = workspace, pair, question
        self.widens, self.tell, self.spool = widens, tell, spool
        self.timesteps = _asked(pair, question.effort.timesteps)
        batch = batch_size or batch_to_sample(pair, 1)
        self.base, self.tuned = Side(pair, False, batch), Side(pair, True, batch)
        self.model = _model_id(job, pair, question.codec)
        self.sets = {one.reference_id: name for name, pictures in question.sets.items() for one in pictures}
        self._recall()

    def _recall(self) -> None:
        kept = self.workspace.rows(
            "SELECT reference_id, view, timestep, noise, loss FROM base_losses "
            "WHERE model = ? AND list_contains(?::VARCHAR[], reference_id)",
            [self.model, self.question.ids],
        )
        self.base.take(kept)
        self.batches = 0
        for rows in self.spool.read():
            self.tuned.take(row for row in rows.to_pylist() if row["model"] == self.model)
            self.batches += 1

    def fill(self, items: Sequence[Item], noises: range) -> None:
        """Measure what is not known of ``items``, slice by slice."""
        spots = [(t, number) for t in self.timesteps for number in noises]
        sides = self.base, self.tuned
        lacking = [item for item in items if any(side.lacks(item, spots) for side in sides)]
        for start in range(0, len(lacking), SLICE):
            self.tell("membership", len(items) - len(lacking) + start, len(items))
            part = lacking[start : start + SLICE]
            latents = self.latents(part)
            for side in sides:
                rows = [row for row, item in enumerate(part) if side.lacks(item, spots)]
                if rows:
                    some = latents[rows].to(self.pair.device, self.pair.dtype)
                    self._keep(side, side.measure([part[row] for row in rows], some, self.timesteps, noises))

    def latents(self, items: Sequence[Item]) -> torch.Tensor:
        """The kept latents float32 [N, ...] of ``items``, on the CPU."""
        ids = sorted({one for one, _ in items})
        found = {(one.reference_id, one.view): one.latents for one in self._read(ids)}
        return torch.from_numpy(np.stack([found[item] for item in items]))

    def _read(self, ids: Sequence[str]) -> Iterable[Any]:
        return read_latents(self.workspace, self.question.codec, ids)

    def _keep(self, side: Side, rows: list[dict[str, Any]]) -> None:
        bad = {row["reference_id"] for row in rows if not np.isfinite(row["loss"])}
        if bad and self.widens:
            raise NotFiniteError(f"predictions for {len(bad)} reference pictures are not finite")
        rows = [{**row, "model": self.model} for row in rows]
        if side.tuned:
            self.spool.add(self.batches, pa.Table.from_pylist(rows, schema=SPOOLED))
            self.batches += 1
        else:
            self.workspace.append(
                "base_losses", [{**row, "reference_set": self.sets[row["reference_id"]]} for row in rows]
            )

    def rank(self, item: Item) -> float:
        """The score of ``item`` so far, to be sorted by; what has none comes last."""
        found = float(scores(*self._of(item))[0])
        return found if np.isfinite(found) else -np.inf

    def _of(self, item: Item) -> tuple[np.ndarray, np.ndarray]:
        """The losses float64 [1, timesteps, noises] of base and fine-tuned model: of the base more may be known."""
        base, tuned = self.base.of(item, self.timesteps), self.tuned.of(item, self.timesteps)
        noises = min(base.shape[1], tuned.shape[1])
        return base[None, :, :noises], tuned[None, :, :noises]

    def row(self, reference_id: str) -> dict[str, Any]:
        """The picture's row of memberships: of its view with the highest score."""
        items = [(reference_id, view) for view in VIEWS]
        best = max(items, key=self.rank)
        base, tuned = self._of(best)
        finite = all(np.isfinite(self.rank(item)) for item in items)
        return {
            "reference_id": reference_id,
            "score": float(scores(base, tuned)[0]) if finite else None,
            "view": best[1],
            "base_loss": float(base.mean()),
            "tuned_loss": float(tuned.mean()),
            "timesteps": list(self.timesteps),
            "by_timestep": [float(one) for one in scores(base[0], tuned[0])],
            "evaluations": sum(2 * self._of(item)[0].size for item in items),
            "caveat": None if finite else "a model's answer to it is not finite: it has no score",
        }


def _model_id(job: Job, pair: ModelPair, codec: str) -> str:
    """16 hex digits: what the base's losses depend on."""
    said = json.dumps([job.base.revision, codec, NAMES[pair.dtype], job.settings.embedded_guidance])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
