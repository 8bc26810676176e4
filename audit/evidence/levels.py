"""At which noise levels membership asks a base whose two experts share them: where those are that were changed.

A base of one network is asked at a tenth, three and five tenths of Stable Diffusion's schedule (TIMESTEPS). Of two
experts the one for little noise is asked there, as far as these levels are its own, and the one for much noise at the
same tenths of its own part of the schedule: at levels of the other expert the changed model answers as the base does,
and every score would be 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from audit.choices import Expert
from audit.evidence.effort import TIMESTEPS
from audit.evidence.membership import SCALE, flow_share
from audit.models.experts import PAIR


@cache
def edge(boundary: float) -> int:
    """The first level (thousandths of the schedule) of the expert for much noise; SCALE where it has none.

    ``boundary`` is the share of the steps from which on it is asked, which of a flow is the share of noise.
    """
    return next((t for t in range(SCALE) if flow_share(t) >= boundary), SCALE)


def timesteps_of(boundary: float | None, experts: Iterable[Expert] = ()) -> tuple[int, ...]:
    """The levels (thousandths) for a checkpoint that changes ``experts``; none named: it may be any of them."""
    if boundary is None:
        return TIMESTEPS
    first, wanted = edge(boundary), {*experts} or {*PAIR}
    found: set[int] = set()
    if wanted & {Expert.low_noise, Expert.both}:
        found |= {*TIMESTEPS} if TIMESTEPS[-1] < first else {round(first * t / SCALE) for t in TIMESTEPS}
    if wanted & {Expert.high_noise, Expert.both}:
        own = {first + round((SCALE - 1 - first) * t / SCALE) for t in TIMESTEPS}
        found |= {*TIMESTEPS} if TIMESTEPS[0] >= first else own
    return tuple(sorted(found))


def expert_at(t: int, boundary: float) -> Expert:
    """Which expert is asked at a level."""
    return Expert.high_noise if t >= edge(boundary) else Expert.low_noise
