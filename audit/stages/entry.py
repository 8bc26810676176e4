"""What a stage is in the list of a run: its name, what it comes after, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audit.config import Config
    from audit.engine.work import Stage


@dataclass(frozen=True)
class StageEntry:
    """The constant STAGE of a file of this folder, or an entry point of another package.

    ``after`` is the name of the stage that it follows, None for one that comes first; of several that follow the same,
    those of other packages come first, in the order of their names. ``make`` makes it for a configuration.
    """

    name: str
    after: str | None
    make: Callable[[Config], Stage]
