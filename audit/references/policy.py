"""What is to be made of a set: known-good or to be found, how near is near, and from when until when it is in force.

A policy is read when an audit is matched, and kept with what was found (``set_chances.policy``): another one changes
nothing of that, until it is matched again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import duckdb

from audit.descriptors.pdq import MATCH_DISTANCE, PdqDescriptor
from audit.errors import ReferenceSetError
from audit.states import Role, SetKind
from audit.storable import storable
from audit.workspace import Workspace

MOST_TEXT = 2000  # characters of notes and of the owner's name
FIELDS = ("role", "threshold", "pdq_distance", "expires_at", "disabled_until", "owner", "notes", "sets")


@dataclass(frozen=True)
class Policy:
    """The policy of one set. ``deny``: its pictures are to be found. ``allow``: it is of known-good pictures, and
    references that are copies of these are no match, of the sets ``sets``, or of any.

    ``threshold`` is the cosine by ``threshold_of`` alone, as it carries over to no other descriptor; None for its own,
    as of ``pdq_distance``, in bits.
    """

    reference_set: str
    role: Role = Role.deny
    threshold: float | None = None
    threshold_of: str | None = None
    pdq_distance: int | None = None
    expires_at: datetime | None = None
    disabled_until: datetime | None = None
    owner: str | None = None
    notes: str | None = None
    sets: list[str] | None = None
    set_at: datetime | None = None

    def out_of_force(self, now: datetime) -> str | None:
        """Why it is not in force; None where it is."""
        if self.expires_at is not None and now >= self.expires_at:
            return f"has expired, on {_told(self.expires_at)}"
        if self.disabled_until is not None and now < self.disabled_until:
            return f"is disabled until {_told(self.disabled_until)}"
        return None

    def cosine(self, descriptor: str, own: float) -> float:
        """The cosine from which a picture counts, by ``descriptor``, whose ``own`` one is used where none is set."""
        if self.threshold is not None and self.threshold_of == descriptor:
            return self.threshold
        if self.pdq_distance is not None and descriptor == PdqDescriptor().name:
            return 1 - self.pdq_distance / 128
        return own

    @property
    def bits(self) -> int:
        """How many bits of PDQ may differ."""
        return MATCH_DISTANCE if self.pdq_distance is None else self.pdq_distance

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            name: _told(value) if isinstance(value, datetime) else value for name, value in asdict(self).items()
        }  # fmt: skip


@dataclass(frozen=True)
class Applied:
    """What a set was matched by: its own policy, None where it had none, and how many of its references each allow
    bank has silenced, the policy of the bank beside it.
    """

    policy: dict[str, Any] | None = None
    silenced: dict[str, int] = field(default_factory=dict)
    banks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_text(self) -> str | None:
        """As JSON; None where there is nothing to say."""
        if self.policy is None and not self.banks:
            return None
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_text(cls, text: str | None) -> Applied:
        """Read back; nothing for what is none of ours."""
        try:
            said = json.loads(text or "{}")
            return cls(said.get("policy"), dict(said.get("silenced", {})), dict(said.get("banks", {})))
        except (ValueError, TypeError, AttributeError):
            return cls()

    @property
    def threshold(self) -> float | None:
        """The set's own cosine, None for the descriptor's."""
        value = (self.policy or {}).get("cosine")
        return float(value) if isinstance(value, int | float) else None

    @property
    def bits(self) -> int:
        """How many bits of PDQ may differ."""
        value = (self.policy or {}).get("pdq_distance")
        return MATCH_DISTANCE if value is None else int(value)


def _told(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")


def _policy(row: dict[str, Any]) -> Policy:
    return Policy(**{**row, "role": Role(row["role"])})


def policies_in(connection: duckdb.DuckDBPyConnection) -> dict[str, Policy]:
    """The policies of all sets that have one."""
    rows = connection.sql("SELECT * FROM policies").to_arrow_table().to_pylist()
    return {row["reference_set"]: _policy(row) for row in rows}


def policies(workspace: Workspace) -> dict[str, Policy]:
    """The policies of all sets that have one."""
    return {row["reference_set"]: _policy(row) for row in workspace.rows("SELECT * FROM policies")}


def set_policy(workspace: Workspace, name: str, **changes: Any) -> Policy:
    """Change what FIELDS say of the set ``name``, and leave what is not in ``changes`` as it is; the policy then.

    Raises ReferenceSetError for a set that is not there, and for what cannot be.
    """
    described = workspace.rows(
        "SELECT descriptor_name, coalesce(any_value(kind), 'reference') AS kind FROM \"references\" "
        "WHERE reference_set = ? GROUP BY ALL ORDER BY ALL",
        [name],
    )
    if not described:
        raise ReferenceSetError(f"there is no reference set {name!r}: add it first")
    if described[0]["kind"] == SetKind.background:
        raise ReferenceSetError(f"{name} are decoys, which have no policy: --of and --drawn say what they are for")
    before = policies(workspace).get(name, Policy(name))
    changed = replace(before, **changes, set_at=datetime.now(UTC))
    if changes.get("threshold") is not None:
        by = changes.get("threshold_of") or (described[0]["descriptor_name"] if len(described) == 1 else None)
        if by not in {row["descriptor_name"] for row in described}:
            there = ", ".join(row["descriptor_name"] for row in described)
            raise ReferenceSetError(f"a cosine holds for one descriptor: {name} is described by {there}; name it")
        changed = replace(changed, threshold_of=by)
    elif changed.threshold is None:
        changed = replace(changed, threshold_of=None)
    _check(changed, workspace)
    workspace.write("policies", name, [asdict(changed)])
    return changed


def _check(one: Policy, workspace: Workspace) -> None:
    name = one.reference_set
    if one.threshold is not None and not 0 < one.threshold <= 1:
        raise ReferenceSetError(f"{name}: threshold {one.threshold} is no cosine above 0 and up to 1")
    if one.pdq_distance is not None and not 0 <= one.pdq_distance <= MATCH_DISTANCE:
        raise ReferenceSetError(
            f"{name}: a PDQ distance of {one.pdq_distance} bits: it is from 0 to {MATCH_DISTANCE}, what is further "
            "apart is not searched for"
        )
    for what in ("owner", "notes"):
        if len(getattr(one, what) or "") > MOST_TEXT:
            raise ReferenceSetError(f"{name}: {what} have more than {MOST_TEXT} characters")
    if one.sets and one.role is not Role.allow:
        raise ReferenceSetError(f"{name}: only an allow bank (--role allow) is for other sets (--of)")
    known = {row["reference_set"] for row in workspace.rows('SELECT DISTINCT reference_set FROM "references"')}
    for other in one.sets or ():
        if other not in known or other == name:
            raise ReferenceSetError(f"{name}: there is no other reference set {storable(other)!r}")


def clear_policy(workspace: Workspace, name: str) -> None:
    """Let the set ``name`` have no policy."""
    workspace.remove("policies", name)


def require_in_force(workspace: Workspace, names: Sequence[str]) -> None:
    """Raise ReferenceSetError for a set that is not to be matched now: an audit would pass for one without a match."""
    known = policies(workspace) if names else {}
    now = datetime.now(UTC)
    for name in names:
        one = known.get(str(name))
        if one is None:
            continue
        if one.role is Role.allow:
            raise ReferenceSetError(
                f"{name} is an allow bank, of known-good pictures: it silences by itself, and is not matched with"
            )
        if (why := one.out_of_force(now)) is not None:
            raise ReferenceSetError(
                f"the reference set {name} {why}: leave it out, or 'lora-audit references policy {name} "
                "--expires never --disable-until never'"
            )
