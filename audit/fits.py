"""How much fits into a device's memory at once: work in slices that are halved where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, TypeVar

from audit.devices import Fault, fault_of, release
from audit.errors import DeviceMemoryError

R = TypeVar("R")


class Sliceable(Protocol):
    """A list, a range, a tensor's rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


S = TypeVar("S", bound=Sliceable)


class Fits:
    """How much of each kind of work fits into memory at once, as a worker has learnt it.

    A kind is anything hashable, such as ("decode", family, latent shape, dtype). Kept for as long as the worker lives:
    what did not fit once is not tried again at every audit.
    """

    def __init__(self) -> None:
        self._most: dict[Hashable, int] = {}
        self._remembered: dict[Hashable, Any] = {}

    def remember(self, what: Hashable, compute: Callable[[], R]) -> R:
        """What ``compute`` finds, computed once."""
        if what not in self._remembered:
            self._remembered[what] = compute()
        return self._remembered[what]

    def most(self, kind: Hashable, start: int) -> int:
        """How many items of ``kind`` to take at once; ``start`` where nothing is known yet."""
        return max(1, min(start, self._most.get(kind, start)))

    def slices(self, kind: Hashable, items: S, work: Callable[[S], R], start: int, where: Any) -> Iterator[tuple[S, R]]:
        """``work`` on ``items`` in slices that fit, with the slice: halved where memory runs out, going on from there.

        Finished slices are not done again. Raises DeviceMemoryError where a single item does not fit.
        """
        done = 0
        while done < len(items):
            part = items[done : done + self.most(kind, start)]
            reason = ""
            try:
                result = work(part)
            except Exception as error:
                if fault_of(error) is not Fault.memory:
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                release(where, error)
            if reason:  # outside the except clause: nothing holds what the failed attempt has allocated
                release(where)
                if len(part) == 1:
                    raise DeviceMemoryError(
                        f"not one image fits into the memory of {where}: use a device with more, a smaller "
                        f"--resolution or a smaller model ({reason})"
                    )
                self._most[kind] = len(part) // 2
                continue
            yield part, result
            del result
            done += len(part)
