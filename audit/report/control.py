"""References that came out, and that the base alone draws as well: shown beside what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audit.report.verdict import Found

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]
MOST = 60  # that are shown


@dataclass(frozen=True)
class DrawnAlone:
    """One such reference, and the control generation nearest to it: ``image`` is None where no pixels are kept."""

    reference_set: str
    name: str
    similarity: float
    control_similarity: float
    caption: str
    image: bytes | None
    thumbnail: bytes | None


def drawn_alone_of(ask: Ask, audit_id: str, descriptor: str, common: Sequence[Found]) -> list[DrawnAlone]:
    """What is shown of the references ``common``, which the base alone draws as well."""
    wanted = common[:MOST]
    rows = ask(
        """SELECT c.reference_set, c.reference_id, g.caption, g.image, r.thumbnail
        FROM chances AS c JOIN control_generations AS g ON g.audit_id = c.audit_id AND g."index" = c.control_index
        JOIN "references" AS r USING (reference_set, reference_id)
        WHERE c.audit_id = ? AND r.descriptor_name = ? AND list_contains(?::VARCHAR[], c.reference_id)""",
        [audit_id, descriptor, [one.reference_id for one in wanted]],
    )
    known = {(row["reference_set"], row["reference_id"]): row for row in rows}
    pairs = [(one, known.get((one.reference_set, one.reference_id))) for one in wanted]
    return [
        DrawnAlone(one.reference_set, one.name, one.similarity or 0.0, one.control_similarity or 0.0, row["caption"],
                   row["image"], row["thumbnail"])
        for one, row in pairs if row is not None
    ]  # fmt: skip
