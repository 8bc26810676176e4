"""The way of an audit: our stages, and those that other packages add, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from audit.errors import ConfigError
from audit.registry import Registry


@dataclass(frozen=True)
class StageKind:
    """A stage, in one file, as its constant STAGE. ``after`` is the stage behind which it comes, None for the first.

    ``make`` makes it (``audit.engine.work.Stage``) for the reference sets that the question is about.
    """

    name: str
    after: str | None
    make: Callable[[Sequence[str]], Any]


STAGES: Registry[StageKind] = Registry(StageKind, "audit.stages", "STAGE", "lora_audit.stages")


def stages_for(references: Sequence[str]) -> list[Any]:
    """All stages in order. Raises ConfigError where one wants to come after a stage that is not there."""
    ordered = list(_behind(None))
    lost = [kind for kind in STAGES.values() if kind not in ordered]
    if lost:
        raise ConfigError(f"the stage {lost[0].name!r} is to come after {lost[0].after!r}, which is not there")
    return [kind.make(references) for kind in ordered]


def is_ours(name: str) -> bool:
    """Whether the stage called ``name`` comes with this package."""
    return name in STAGES.ours


def _behind(name: str | None) -> Iterator[StageKind]:
    """The stages behind ``name``, those of other packages before ours, each with what comes behind it."""
    following = [kind for kind in STAGES.values() if kind.after == name]
    for kind in sorted(following, key=lambda kind: is_ours(kind.name)):
        yield kind
        yield from _behind(kind.name)
