"""Where one reference lies among others: a histogram as inline SVG, which needs no script and prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from audit.report.facts import AuditFacts
from audit.text import printable

WIDTH, HEIGHT, BASELINE, TOP = 320, 96, 78, 16  # of the picture, in its own units
BINS = 24
LEAST, MOST = -1.0, 1.0  # of a score or a cosine; what is lower stands at the end


@dataclass(frozen=True)
class Place:
    """One value among ``others`` of its kind: decoys, or only other references, which tell nothing of chance.

    ``why_no_p`` is why nothing follows from the decoys, where that is so; ``span`` the least and the highest value of
    all references of the set and the others.
    """

    value: float
    others: np.ndarray
    span: tuple[float, float]
    are_decoys: bool
    p: float | None
    why_no_p: str | None

    @property
    def above(self) -> int:
        """How many of the others are lower."""
        return int((self.others < self.value).sum())


class Places:
    """Where the references of a report lie, by their membership "score" or by "similarity" to the nearest extraction.

    Among the decoys of their set that have such a value, else among the other references of their set.
    """

    def __init__(self, facts: AuditFacts) -> None:
        self._decoys = facts.decoys
        self._chances = {one.reference_id: one for one in facts.chances}
        by_set: dict[tuple[str, str], list[float]] = {}
        for one in facts.chances:
            for kind, value in (("score", one.score), ("similarity", one.similarity)):
                if value is not None and math.isfinite(value):
                    by_set.setdefault((one.reference_set, kind), []).append(value)
        self._values = {key: np.sort(values) for key, values in by_set.items()}

    def of(self, reference_id: str, kind: str) -> Place | None:
        """The place of a reference; None where it has no such value, or there is nothing beside it."""
        one = self._chances.get(reference_id)
        if one is None:
            return None
        value, p = (one.score, one.membership_p) if kind == "score" else (one.similarity, one.extraction_p)
        if value is None or not math.isfinite(value):
            return None
        mine = self._values[one.reference_set, kind]
        decoys = np.array(self._decoys.get(one.reference_set, ([], []))[1 if kind == "score" else 0])
        others = decoys if len(decoys) else np.delete(mine, np.searchsorted(mine, value))
        if not len(others):
            return None
        both = np.concatenate([mine, others])
        why = (one.caveat or one.uncalibrated) if len(decoys) else None
        span = float(both.min()), float(both.max())
        return Place(value, others, span, bool(len(decoys)), p if why is None else None, why)


def histogram(place: Place, title: str, description: str) -> Markup:
    """The SVG of a place among others; ``title`` and ``description`` are what is read aloud."""
    shown, mark = np.clip([*place.others, place.value], LEAST, MOST), place.value
    low, high = (float(one) for one in np.clip(place.span, LEAST, MOST))
    room = max(high - low, 0.02) * 0.04
    low, high = low - room, high + room
    counts, edges = np.histogram(shown[:-1], BINS, (low, high))
    most = max(int(counts.max()), 1)

    def across(value: float) -> float:
        return round(WIDTH * (value - low) / (high - low), 1)

    bars = [
        f'<rect class="bar" x="{across(left) + 0.5:.1f}" y="{BASELINE - tall:.1f}" '
        f'width="{WIDTH / BINS - 1:.1f}" height="{tall:.1f}"/>'
        for count, left in zip(counts, edges, strict=False)
        if (tall := (BASELINE - TOP - 6) * int(count) / most)
    ]
    at = across(float(shown[-1]))
    anchor = "start" if at < WIDTH / 4 else "end" if at > 3 * WIDTH / 4 else "middle"
    less = "≤ " if place.span[0] < LEAST else ""
    said, more = (escape(printable(one)) for one in (title, description))
    return Markup(
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f"<title>{said}</title><desc>{more}</desc>{''.join(bars)}"
        f'<line class="axis" x1="0" y1="{BASELINE}" x2="{WIDTH}" y2="{BASELINE}"/>'
        f'<line class="mark" x1="{at}" y1="{TOP}" x2="{at}" y2="{BASELINE}"/>'
        f'<path class="mark" d="M{at - 5:.1f} {TOP}h10l-5 7z"/>'
        f'<text class="mark" x="{at}" y="{TOP - 4}" text-anchor="{anchor}">{mark:+.2f}</text>'
        f'<text x="0" y="{HEIGHT - 4}">{less}{low + room:+.2f}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{high - room:+.2f}</text></svg>'
    )
