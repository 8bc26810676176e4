"""Who does not want to be crawled: models and users, from a text file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from audit.errors import CrawlError
from audit.workspace import Workspace

OPT_OUT = re.compile(r"([a-z][\w-]{0,39}):(model|user):(\S.{0,200})")


class OptOuts:
    """Models and users that are left alone, from a text file: a line each, such as ``civitai:user:jane``.

    Raises CrawlError where the file cannot be read or holds a line that says neither.
    """

    def __init__(self, text: str = "", name: str = "the opt-out list") -> None:
        from crawlers.source import SOURCES  # they are made of what is here

        self.entries: set[str] = set()
        self._read_again: Callable[[], OptOuts] | None = None
        for number, line in enumerate(text.splitlines(), start=1):
            text = line.partition("#")[0].strip()
            match = OPT_OUT.fullmatch(text)
            if text and not (match and match[1] in SOURCES):
                raise CrawlError(
                    f"{name}, line {number}: {text[:80]!r} is neither SOURCE:model:ID nor SOURCE:user:NAME "
                    f"(sources: {', '.join(SOURCES)})"
                )
            if text:
                self.entries.add(text.casefold())

    @classmethod
    def read(cls, workspace: Workspace, path: Path | None) -> OptOuts:
        """The list in the file ``path``, else opt-out.txt of the workspace, else an empty one."""
        name = str(path) if path else f"{workspace.files}/opt-out.txt"
        try:
            content = path.read_bytes() if path else workspace.files.read("opt-out.txt")
            found = cls((content or b"").decode(), name)
        except (OSError, UnicodeDecodeError) as error:
            raise CrawlError(f"the opt-out list {name} cannot be read: {error}") from error
        found._read_again = lambda: cls.read(workspace, path)
        return found

    def as_it_is_now(self) -> OptOuts:
        """The list as its file is now, since who opts out does not wait for a crawl to end. Raises CrawlError."""
        return self if self._read_again is None else self._read_again()

    def covers(self, source: str, model_id: str, uploader: str | None) -> bool:
        """Whether the model or its uploader has opted out."""
        asked = {f"{source}:model:{model_id}", f"{source}:user:{uploader}"}
        return any(entry.casefold() in self.entries for entry in asked)
