"""What the policies of sets have done to a question, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from audit.descriptors.pdq import MATCH_DISTANCE
from audit.references.policy import Applied

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]


def applied_of(ask: Ask, audit_id: str, sets: Sequence[str]) -> dict[str, Applied]:
    """What each of ``sets`` was matched by; those alone of which there is something to say."""
    rows = ask(
        "SELECT reference_set, policy FROM set_chances WHERE audit_id = ? AND policy IS NOT NULL "
        "AND list_contains(?::VARCHAR[], reference_set) ORDER BY reference_set",
        [audit_id, list(sets)],
    )
    return {row["reference_set"]: Applied.of_text(row["policy"]) for row in rows}


def by_policies(applied: Mapping[str, Applied], references: int, own: float, came_out: Sequence[str]) -> Iterator[str]:
    """Sentences of a verdict on so many ``references``; ``own`` is the descriptor's threshold, and ``came_out`` the
    allow banks that silence what came out, each as often as it does.
    """
    for name, one in applied.items():
        if one.threshold is not None:
            yield (
                f"By the policy of the set {name}, its pictures count as alike from similarity {one.threshold:.2f}, "
                f"where the descriptor's own threshold is {own:.2f}."
            )
        if one.bits != MATCH_DISTANCE:
            yield f"By that of {name}, PDQ agrees where {one.bits} bits differ or fewer."
    counts = Counter[str]()
    for one in applied.values():
        counts.update({bank: number for bank, number in one.silenced.items() if number})
    counts |= Counter(came_out)
    if not counts:
        return
    banks = ", ".join(f"{number} by the allow bank {bank}" for bank, number in sorted(counts.items()))
    yield (
        f"Of your {references} reference picture{'s' if references != 1 else ''} some are silenced, as copies of "
        f"known-good pictures: {banks}. Of these nothing is said, neither for nor against; "
        f"{len(came_out) or 'none'} of them came out of the model."
    )
