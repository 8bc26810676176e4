"""How text leaves the command line: everything that is printed passes ``printable``, by ``say`` or a console."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from audit.text import printable


def say(text: object = "", lines: bool = False) -> None:
    """Print ``text`` on stdout after ``printable``: one line, unless it is ours and has ``lines``."""
    typer.echo(printable(text, lines))


class SafeConsole(Console):
    """A console that makes every string printable before it renders it: of lines, cells, titles and headings."""

    def render_str(self, text: str, **options: Any) -> Text:
        """``text`` as Rich renders it, after ``printable``; a name like ":x:" stays what it is."""
        options["emoji"] = False
        return super().render_str(printable(text), **options)
