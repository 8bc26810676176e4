"""The pictures that an audit was asked about, as its page lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audit.references.decoys import Questions
from audit.report.pages import is_large

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]
MOST = 1000  # that are listed of large sets

_ALL = """SELECT reference_set, reference_id, name, width, height FROM "references"
WHERE descriptor_name = ? AND list_contains(?::VARCHAR[], reference_set)
QUALIFY row_number() OVER (PARTITION BY reference_id ORDER BY reference_set, name) = 1
ORDER BY reference_set, name"""
_COUNT = """SELECT count(DISTINCT reference_id) AS n FROM "references"
WHERE descriptor_name = ? AND list_contains(?::VARCHAR[], reference_set)"""
_NEAREST = """WITH near AS (
    SELECT reference_set, reference_id, max(similarity) AS similarity FROM matches
    WHERE audit_id = ? AND list_contains(?::VARCHAR[], reference_set) GROUP BY ALL ORDER BY ALL
)
SELECT reference_set, reference_id, r.name, r.width, r.height FROM near
JOIN "references" AS r USING (reference_set, reference_id) WHERE r.descriptor_name = ?
QUALIFY row_number() OVER (PARTITION BY reference_id ORDER BY reference_set) = 1
ORDER BY near.similarity DESC, reference_set, r.name LIMIT ?"""


@dataclass(frozen=True)
class Reference:
    """One picture of the sets that were asked about."""

    reference_set: str
    reference_id: str
    name: str
    width: int | None
    height: int | None


def references_of(
    ask: Ask, audit_id: str, descriptor: str, sets: Sequence[str], questions: Questions
) -> tuple[int, list[Reference]]:
    """How many pictures the ``sets`` have, one in several sets once, and those that are listed.

    Of small sets these are all; of large ones the MOST that are nearest to what came out, of those in matches.
    """
    if not is_large(questions):
        found = [Reference(**row) for row in ask(_ALL, [descriptor, list(sets)])]
        return len(found), found
    counts = [number for number, _ in questions.pictures.values()]
    number = counts[0] if len(counts) == 1 else ask(_COUNT, [descriptor, list(sets)])[0]["n"]
    return number, [Reference(**row) for row in ask(_NEAREST, [audit_id, list(sets), descriptor, MOST])]
