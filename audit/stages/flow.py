"""The stages of a run, in order: ours, and those of other packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from audit.errors import ConfigError
from audit.registry import Registry
from audit.stages.entry import StageEntry

if TYPE_CHECKING:
    from audit.config import Config
    from audit.engine.work import Stage

STAGES: Registry[StageEntry] = Registry(StageEntry, "audit.stages", "STAGE", "lora_audit.stages")


def flow(config: Config) -> list[Stage]:
    """The stages that every job of a run goes through. Raises ConfigError for one that follows none that is there."""
    return [entry.make(config) for entry in in_order(list(STAGES.values()))]


def in_order(entries: list[StageEntry]) -> list[StageEntry]:
    """``entries`` each behind the one that it follows; the later of the list directly behind it."""
    found: list[StageEntry] = []

    def place(after: str | None) -> None:
        for entry in reversed([one for one in entries if one.after == after]):
            found.append(entry)
            place(entry.name)

    place(None)
    if lost := [entry for entry in entries if entry not in found]:
        raise ConfigError(
            f"the stage {lost[0].name!r} is to follow {lost[0].after!r}, which there is not (there are: "
            f"{', '.join(entry.name for entry in found)})"
        )
    return found
