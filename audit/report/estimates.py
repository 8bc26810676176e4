"""What a report estimates where nobody knows: recovered keywords with their confidence, and N0 from the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from audit.recovery.counts import CountEstimate, estimate_count

Ask = Callable[[str, list[Any]], list[dict[str, Any]]]
KEYWORDS = 10  # that a report names
SOURCE = "recovered"  # how sources of recovered captions begin


@dataclass(frozen=True)
class RecoveredFacts:
    """How an audit's captions were recovered: the likeliest ``keywords`` (word, confidence, why), and what it cost."""

    method: str
    keywords: list[dict[str, Any]]
    captions: list[dict[str, Any]]
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Estimates:
    """What is estimated of an audit; None where its captions were told, and where nothing can be said of N0."""

    recovered: RecoveredFacts | None = None
    training_images: CountEstimate | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recovered": None if self.recovered is None else asdict(self.recovered),
            "training_images": None if self.training_images is None else asdict(self.training_images),
        }


def estimates_of(
    ask: Ask, audit_id: str, identity: str | None, base_revision: str, captions: Sequence[dict[str, Any]]
) -> Estimates:
    """The estimates of an audit that was sampled with ``captions``."""
    groups = ask("SELECT members FROM extractions WHERE audit_id = ? ORDER BY rank", [audit_id])
    texts = {one["caption"] for one in captions if one["source"].startswith(SOURCE)}
    found = _recovered(ask, identity, base_revision, texts) if texts else None
    return Estimates(found, estimate_count([one["members"] for one in groups]))


def _recovered(ask: Ask, identity: str | None, base_revision: str, texts: set[str]) -> RecoveredFacts | None:
    """The recovery that gave exactly these captions; None where the workspace has none of it any more."""
    rows = ask(
        "SELECT * FROM recoveries WHERE identity = ? AND base_revision = ? ORDER BY recovery_id, kind, rank",
        [identity, base_revision],
    )
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_id.setdefault(row["recovery_id"], []).append(row)
    for kept in by_id.values():
        captions = [one for one in kept if one["kind"] == "caption"]
        if {one["text"] for one in captions} == texts:
            named = [one for one in kept if one["kind"] == "keyword"][:KEYWORDS]
            keywords = [{"word": one["text"], "confidence": one["confidence"], "why": one["why"]} for one in named]
            said = [{"caption": one["text"], "confidence": one["confidence"]} for one in captions]
            return RecoveredFacts(kept[0]["method"], keywords, said, kept[0]["evaluations"], kept[0]["seconds"])
    return None
