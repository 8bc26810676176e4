"""What can be added without touching this package: families, descriptors, sources, stages.

Ours are modules of one folder, a file each. Those of other packages are entry points of a group, named by what they are
called: ``[project.entry-points."lora_audit.families"] toy = "their_package.toy:TOY"``. Nothing is imported before the
first of them is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from audit.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """What is there of one kind, by name; ours in the order of their modules' names, then the others'.

    ``package``'s modules hold ours as the constant ``constant``; ``group`` is the entry points' of others. Raises
    ConfigError where another package's cannot be loaded, is of another kind, or takes a name that is taken.
    """

    def __init__(self, kind: Any, package: str, constant: str, group: str) -> None:
        self.kind, self.package, self.constant, self.group = kind, package, constant, group
        self._found: dict[str, T] | None = None
        self._own: frozenset[str] = frozenset()
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @property
    def ours(self) -> frozenset[str]:
        """The names of what comes with this package."""
        self._all()
        return self._own

    def forget(self) -> None:
        """Look again: a package has been installed meanwhile."""
        with self._lock:
            self._found = None

    def _all(self) -> dict[str, T]:
        with self._lock:
            if self._found is None:
                own = self._ours()
                self._own = frozenset(own)
                self._found = own | self._others(self._own)
            return self._found

    def _ours(self) -> dict[str, T]:
        found: dict[str, T] = {}
        package = importlib.import_module(self.package)
        for one in sorted(pkgutil.iter_modules(package.__path__), key=lambda one: one.name):
            module = importlib.import_module(f"{self.package}.{one.name}")
            if hasattr(module, self.constant):
                made: T = getattr(module, self.constant)
                found[str(made.name)] = made  # type: ignore[attr-defined]
        return found

    def _others(self, taken: frozenset[str]) -> dict[str, T]:
        found: dict[str, T] = {}
        for point in entry_points(group=self.group):
            where = f"the entry point {point.name!r} of {self.group} ({point.value})"
            try:
                made = point.load()
            except Exception as error:  # whatever another package does when it is imported
                raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {str(error)[:200]}") from error
            if not isinstance(made, self.kind):
                raise ConfigError(f"{where} is no {self.kind.__name__}")
            if made.name != point.name:
                raise ConfigError(f"{where} calls itself {made.name!r}")
            if point.name in taken or point.name in found:
                raise ConfigError(f"{where} takes a name that is taken: uninstall one of the two packages")
            found[point.name] = made
        return found
