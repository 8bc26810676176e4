"""Pictures of membership: references under noise, and what the base and the fine-tuned model make of that noise.

At once: either model's estimate of the picture, from the same noise. Step by step: the base alone, and the fine-tuned
model under model guidance. A picture that the fine-tuned model has learnt comes back from noise in which little is left
of it; where the base draws it as well, nothing follows. Both are given the empty caption, as for the score.

They are made of the highest scores of each set, and of its lowest to compare with, for a tenth of what membership may
take. The noise is laid where the pictures differ most to the eye, and is one of those that the score is measured with.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from audit.config import Method, StoredImages
from audit.errors import NotFiniteError
from audit.evidence.effort import BASE_PICTURES, REPLAY, TUNED_PICTURES, references_shown
from audit.evidence.membership import Level, level_of, noise_of, replay
from audit.sampling.guidance import extrapolate, weight_of

if TYPE_CHECKING:
    import numpy as np

    from audit.job import Job
    from audit.references.losses import Both, Item

log = logging.getLogger(__name__)
AT, NOISE = 500, 0  # thousandths of the schedule, where that is a level of the score, and the number of the noise
STEPS = REPLAY
MOST = 12  # references of a set
SIDE = 256  # pixels of a stored picture, at most
QUALITY = 90  # of WebP
PARTS = ("noised", "base_estimate", "tuned_estimate", "base_replay", "tuned_replay")


def denoised_of(
    job: Job, both: Both, rows: Mapping[str, Sequence[dict[str, Any]]]
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Rows of the table ``denoised`` by set, for the ``rows`` of memberships of each, and the evaluations spent.

    None where no picture is kept; references whose estimates are not finite have none.
    """
    if job.settings.stored_images is StoredImages.hashes_only:
        return {}, 0
    each = BASE_PICTURES + TUNED_PICTURES
    most = references_shown(job.settings.membership_evaluations)
    allowed = _with_thumbnails(both, list(rows))
    chosen = _chosen(rows, most, allowed)
    if not chosen:
        return {}, 0
    w = weight_of(replace(job.settings, method=Method.model_guidance), both.pair.effect.prediction)
    assert w is not None
    at = level_shown(both.timesteps)
    try:
        found = _pictures(both, [(row["reference_id"], row["view"]) for _, row in chosen], w, at)
    except NotFiniteError as error:  # the scores hold even so
        log.warning("%s: no pictures are made of what its models make of references: %s", job.name, error)
        return {}, len(chosen) * each
    made: dict[str, list[dict[str, Any]]] = {}
    for (name, row), pictures in zip(chosen, found, strict=True):
        if pictures is not None:
            about = {"audit_id": job.id, "reference_set": name, "reference_id": row["reference_id"]}
            how = {"view": row["view"], "timestep": at, "steps": STEPS, "w": w}
            made.setdefault(name, []).append({**about, **how, **pictures, "evaluations": each})
    return made, len(chosen) * each


def _with_thumbnails(both: Both, sets: Sequence[str]) -> set[tuple[str, str]]:
    """The references of ``sets`` of which a picture is kept: of the others none is to be stored."""
    rows = both.workspace.rows(
        'SELECT reference_set, reference_id FROM "references" WHERE thumbnail IS NOT NULL '
        "AND list_contains(?::VARCHAR[], reference_set)",
        [list(sets)],
    )
    return {(row["reference_set"], row["reference_id"]) for row in rows}


def _chosen(
    rows: Mapping[str, Sequence[dict[str, Any]]], most: int, allowed: set[tuple[str, str]]
) -> list[tuple[str, dict[str, Any]]]:
    """(set, row) of ``most`` references: of all sets in turn the highest score, the lowest, and the next ones down."""
    turns: list[tuple[int, str, dict[str, Any]]] = []
    for name in sorted(rows):
        scored = [one for one in rows[name] if one["score"] is not None and (name, one["reference_id"]) in allowed]
        ordered = sorted(scored, key=lambda one: (-one["score"], one["reference_id"]))
        in_turn = [*ordered[:1], *ordered[:0:-1][:1], *ordered[1:-1]][:MOST]
        turns += [(turn, name, one) for turn, one in enumerate(in_turn)]
    turns.sort(key=lambda one: one[:2])
    return [(name, one) for _, name, one in turns[:most]]


def level_shown(timesteps: Sequence[int]) -> int:
    """The level of the noise: AT, or the noisiest that the score is measured at, where the expert changed is asked."""
    return AT if AT in timesteps else max(timesteps)


@torch.inference_mode()
def _pictures(both: Both, items: Sequence[Item], w: float, at: int) -> list[dict[str, bytes] | None]:
    """The pictures of each item by their columns; None where an estimate is not finite."""
    pair, base = both.pair, both.base
    levels = [level_of(at * left // STEPS, pair.prediction_type, pair.scheduler) for left in range(STEPS, 0, -1)]
    latents = both.latents(items)
    made = pair.fits.slices(
        base.kind, latents, lambda some: denoise(both, some.to(pair.device), levels, w).cpu(), base.batch, pair.device
    )
    with pair.text_once():
        found = torch.cat([parts for _, parts in made])
    fine = torch.isfinite(found).flatten(1).all(dim=1)
    decoded = iter(pair.decode(found[fine].flatten(0, 1).to(pair.device))) if fine.any() else iter(())
    return [{part: webp(next(decoded)) for part in PARTS} if one else None for one in fine.tolist()]


def denoise(both: Both, latents: torch.Tensor, levels: Sequence[Level], w: float) -> torch.Tensor:
    """float32 [N, 5, ...] of latents [N, ...], which are on the device: what ``PARTS`` name, before it is decoded."""
    dtype = both.pair.dtype
    noise = noise_of(latents.shape[1:], levels[0].t, NOISE).to(latents.device)

    def base(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return both.base.predict(x.to(dtype), timestep).float()

    def tuned(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return both.tuned.predict(x.to(dtype), timestep).float()

    def guided(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return extrapolate(base(x, timestep), tuned(x, timestep), w)

    noised = levels[0].noised(latents, noise)
    base_estimate, base_replay = replay(base, noised, levels)
    tuned_estimate, _ = replay(tuned, noised, levels[:1])
    _, tuned_replay = replay(guided, noised, levels)
    return torch.stack([noised, base_estimate, tuned_estimate, base_replay, tuned_replay], dim=1)


def webp(pixels: np.ndarray) -> bytes:
    """WebP of uint8 [H, W, 3], made small."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
