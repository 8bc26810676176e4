"""Progress: who does long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int], None]  # (what is done, how much of it, of how much)


def quiet(what: str, done: int, total: int) -> None:
    """Tell nobody."""
