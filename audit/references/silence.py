"""Which references are known-good: copies of a picture that an allow bank holds, and of nothing else.

A reference is silenced where the descriptor's cosine to a picture of the bank reaches the threshold, which is never
below the descriptor's own, and PDQ agrees. Where the hash of either says nothing, so must that of the other. What the
model draws has no part in it: a picture that only resembles an allowed one stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from audit.descriptors.pdq import MATCH_DISTANCE, MIN_QUALITY
from audit.references.index import Bank, open_bank
from audit.references.index.bank import ROUNDING
from audit.references.policy import Applied, Policy, policies_in
from audit.states import Role
from audit.workspace import Workspace

AT_ONCE = 256  # pictures of an allow bank


@dataclass(frozen=True)
class Rule:
    """How one set is matched: from which cosine and up to how many bits, from which cosine of a control generation on
    the base alone draws as well, and which allow bank has silenced which reference, by id.
    """

    threshold: float
    control_threshold: float
    bits: int = MATCH_DISTANCE
    allowed: dict[str, str] = field(default_factory=dict)
    applied: Applied = field(default_factory=Applied)


def rules_of(
    connection: duckdb.DuckDBPyConnection,
    workspace: Workspace,
    descriptor: str,
    threshold: float,
    banks: dict[str, Bank],
) -> dict[str, Rule]:
    """The rules of the sets ``banks``, by the policies as they are now, over a connection that sees them.

    ``threshold`` is the audit's, by ``descriptor``.
    """
    known, now = policies_in(connection), datetime.now(UTC)
    there = connection.sql(
        'SELECT DISTINCT reference_set FROM "references" WHERE descriptor_name = ?', params=[descriptor]
    )
    described = {row[0] for row in there.fetchall()}
    allowing = [
        one for name, one in sorted(known.items())
        if one.role is Role.allow and name in described and one.out_of_force(now) is None
    ]  # fmt: skip
    opened = {one.reference_set: open_bank(connection, workspace, one.reference_set, descriptor) for one in allowing}
    found = {}
    for name, bank in banks.items():
        own = known.get(name)
        cosine = own.cosine(descriptor, threshold) if own else threshold
        allowed: dict[str, str] = {}
        counts: dict[str, int] = {}
        serving = [one for one in allowing if one.reference_set != name and (not one.sets or name in one.sets)]
        for one in serving:
            rows = silenced(bank, opened[one.reference_set], _least(one, descriptor, threshold), one.bits)
            mine = [str(value) for value in bank.ids.take(pa.array(rows)).to_pylist()]
            counts[one.reference_set] = len(mine)
            allowed |= {value: one.reference_set for value in mine if value not in allowed}
        said = None if own is None else own.as_json() | {"cosine": cosine if cosine != threshold else None}
        applied = Applied(said, counts, {one.reference_set: one.as_json() for one in serving})
        bits = own.bits if own else MATCH_DISTANCE
        found[name] = Rule(cosine, min(cosine, threshold), bits, allowed, applied)
    return found


def _least(one: Policy, descriptor: str, threshold: float) -> float:
    """An allow bank may be stricter than the descriptor, and never laxer."""
    return max(one.cosine(descriptor, threshold), threshold)


def silenced(bank: Bank, allowed: Bank, threshold: float, bits: int) -> np.ndarray:
    """The rows of ``bank`` that are copies of a picture in ``allowed``, int64, ascending."""
    found: list[np.ndarray] = []
    for start in range(0, len(allowed), AT_ONCE):
        vectors = allowed.vectors[start : start + AT_ONCE]
        near = np.flatnonzero(bank.best(vectors) >= threshold - ROUNDING)
        if len(near):
            cosines = bank.vectors[near].astype(np.float64) @ vectors.T.astype(np.float64)
            copies = (cosines >= threshold) & _hashes_agree(bank, near, allowed, start, len(vectors), bits)
            found.append(near[copies.any(axis=1)])
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def _hashes_agree(bank: Bank, rows: np.ndarray, allowed: Bank, start: int, number: int, bits: int) -> np.ndarray:
    """Booleans [rows, number]: the hashes are near, or neither of both says anything."""
    others = slice(start, start + number)
    mine, theirs = bank.quality[rows] >= MIN_QUALITY, allowed.quality[others] >= MIN_QUALITY
    apart = np.bitwise_count(bank.hashes[rows][:, None] ^ allowed.hashes[others][None]).sum(axis=2)
    both, neither = mine[:, None] & theirs[None], ~mine[:, None] & ~theirs[None]
    return (both & (apart <= bits)) | neither


def tables_of(rules: dict[str, Rule]) -> dict[str, pa.Table]:
    """The rules as tables for SQL: ``rules``, a row a set, and ``allowed``, a row a reference that is silenced."""
    each = [(name, one.threshold, one.control_threshold, one.bits) for name, one in rules.items()]
    allowed = [(name, *pair) for name, one in rules.items() for pair in one.allowed.items()]
    return {"rules": _table(each, _RULES), "allowed": _table(allowed, _ALLOWED)}


_RULES = pa.schema(
    [("reference_set", pa.string()), ("threshold", pa.float64()), ("control_threshold", pa.float64()),
     ("bits", pa.int32())]
)  # fmt: skip
_ALLOWED = pa.schema([("reference_set", pa.string()), ("reference_id", pa.string()), ("allowed_by", pa.string())])


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


def plain_rules(names: Sequence[str], threshold: float) -> dict[str, Rule]:
    """The rules of sets without a policy."""
    return {name: Rule(threshold, threshold) for name in names}
