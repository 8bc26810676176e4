"""What a kind of input is: where its seeds come from, how one is made of a random generator, and what reads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import ClassVar

from audit.errors import AuditError

UNFORESEEN = "unforeseen "  # how the crawlers record an error that nobody foresaw (audit.faults)


class FindingError(Exception):
    """A promise that an input has shown to be broken, though nothing was raised."""


class Kind:
    """One kind of input. It is made once in a worker, with an empty folder for its files.

    ``share`` is how many of a million inputs are of it, ``memory`` by how many MiB a worker may grow over all of them,
    ``patience`` how many seconds an input may take.
    """

    name: ClassVar[str]
    share: ClassVar[int]
    memory: ClassVar[int] = 256
    patience: ClassVar[float] = 10.0
    refusals: ClassVar[tuple[type[Exception], ...]] = (AuditError,)

    def __init__(self, place: Path) -> None:
        self.place = place

    def make(self, choose: Random) -> bytes:
        """An input: the same for the same generator."""
        raise NotImplementedError

    def check(self, data: bytes) -> None:
        """Read the input as the product does. Raises one of ``refusals`` where it is refused."""
        raise NotImplementedError


def no_surprise(recorded: Iterable[str | None]) -> None:
    """Raise FindingError where a recorded reason tells of an error that nobody foresaw."""
    for reason in recorded:
        if reason and UNFORESEEN in reason:
            raise FindingError(reason)
