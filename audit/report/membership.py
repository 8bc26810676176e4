"""What a report says of membership: the score of each reference, among those of its set. No verdict follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audit.references.latents import codec_id

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]
MEASURED_BY = "'lora-audit scan' and 'lora-audit run' measure it"


@dataclass(frozen=True)
class Member:
    """One reference with its score; ``above`` is how many of the ``others`` of its set have a lower one."""

    reference_set: str
    reference_id: str
    name: str
    score: float | None
    above: int | None
    others: int
    view: str
    base_loss: float
    tuned_loss: float
    evaluations: int
    caveat: str | None


@dataclass(frozen=True)
class Denoised:
    """What the models make of one reference under noise, as pictures in WebP; ``thumbnail`` is the reference, a PNG."""

    reference_set: str
    reference_id: str
    view: str
    timestep: int
    steps: int
    w: float
    noised: bytes
    base_estimate: bytes
    tuned_estimate: bytes
    base_replay: bytes
    tuned_replay: bytes
    evaluations: int
    thumbnail: bytes


@dataclass(frozen=True)
class Unmeasured:
    """A set of which no reference has a score, and why."""

    reference_set: str
    reason: str


def members_of(ask: Ask, audit_id: str, descriptor: str, sets: Sequence[str]) -> list[Member]:
    """The references of ``sets`` that were measured, set by set, the highest score first."""
    rows = ask(
        """SELECT m.reference_set, m.reference_id, r.name, m.score, m.view, m.base_loss, m.tuned_loss, m.evaluations,
            m.caveat,
            CASE WHEN m.score IS NOT NULL THEN
                count(m.score) OVER one - rank() OVER (one ORDER BY m.score DESC NULLS LAST) END AS above,
            greatest(count(m.score) OVER one - 1, 0) AS others
        FROM memberships AS m JOIN "references" AS r USING (reference_set, reference_id)
        WHERE m.audit_id = ? AND r.descriptor_name = ? AND list_contains(?::VARCHAR[], m.reference_set)
        WINDOW one AS (PARTITION BY m.reference_set)
        ORDER BY m.reference_set, m.score DESC NULLS LAST, r.name""",
        [audit_id, descriptor, list(sets)],
    )
    return [Member(**row) for row in rows]


def denoised_of(ask: Ask, audit_id: str, descriptor: str, sets: Sequence[str]) -> list[Denoised]:
    """The pictures that were made of references of ``sets``; none of a reference of which no picture is kept now."""
    rows = ask(
        """SELECT d.* EXCLUDE (audit_id), r.thumbnail
        FROM denoised AS d JOIN "references" AS r USING (reference_set, reference_id)
        WHERE d.audit_id = ? AND r.descriptor_name = ? AND list_contains(?::VARCHAR[], d.reference_set)
        AND r.thumbnail IS NOT NULL""",
        [audit_id, descriptor, list(sets)],
    )
    return [Denoised(**row) for row in rows]


def unmeasured_of(
    ask: Ask, sets: Sequence[str], members: Sequence[Member], base_revision: str, resolution: int | None
) -> list[Unmeasured]:
    """Those of ``sets`` without a score, and why."""
    missing = [name for name in sets if name not in {one.reference_set for one in members}]
    rows = ask(
        "SELECT DISTINCT reference_set FROM latents WHERE codec = ? AND list_contains(?::VARCHAR[], reference_set)",
        [codec_id(base_revision, resolution), missing],
    )
    there = {row["reference_set"] for row in rows}
    none = (
        "there is nothing to compare: no latents of its pictures are kept for this base model "
        "('lora-audit references add' keeps them with --base)"
    )
    return [Unmeasured(name, f"it was not asked for: {MEASURED_BY}" if name in there else none) for name in missing]
