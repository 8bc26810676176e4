"""Numbered documents of a folder: each is created once, by one of all who try, and the highest number holds."""

from __future__ import annotations

import re
from contextlib import suppress

from audit.files import Files

NUMBER = re.compile(r"(\d{1,18})\.json")


class Chain:
    """Documents ``1.json``, ``2.json``, ... of ``folder``. Who wants to follow on number N creates N + 1."""

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.folder = files, folder

    def _key(self, number: int) -> str:
        return f"{self.folder}/{number:012d}.json"

    def numbers(self) -> list[int]:
        """The numbers there are, ascending."""
        found = (NUMBER.fullmatch(name) for name in self.files.names(self.folder))
        return sorted(int(match.group(1)) for match in found if match)

    def newest(self) -> int:
        """The highest number, 0 where there is none."""
        return max(self.numbers(), default=0)

    def has_more(self, number: int) -> bool:
        """Whether something has followed on ``number``, the highest a moment ago; quicker than to list them again."""
        return self.files.exists(self._key(number + 1))

    def read(self, number: int) -> bytes | None:
        """The document, None where it is gone."""
        return self.files.read(self._key(number))

    def add(self, number: int, content: bytes) -> bool:
        """Create document ``number``; False where another was first. No two callers may give the same content."""
        return self.files.create(self._key(number), content)

    def remove(self, number: int) -> None:
        """Remove a document that a later one has replaced."""
        with suppress(FileNotFoundError):
            self.files.remove(self._key(number))
