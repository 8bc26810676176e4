"""A source: a list of files in a text file, a path a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.config import CrawlSettings
from crawlers.catalog import Catalog, Outcome
from crawlers.items import Item
from crawlers.local import LocalFile
from crawlers.source import Page, Source, SourceKind, asked


@dataclass(frozen=True)
class ToyQuery:
    """The list, and which of its lines."""

    location: str = asked("", "A text file with a path a line.", argument=True, metavar="LIST")
    containing: str | None = asked(None, "Only lines with this text.")


class ToySource:
    """Takes the files one after the other."""

    name = "toy"

    def __init__(self, catalog: Catalog, asked: ToyQuery) -> None:
        self.catalog, self.asked = catalog, asked
        lines = Path(asked.location).read_text().splitlines()
        self.files = [LocalFile(catalog, Path(one), []) for one in lines if (asked.containing or "") in one]

    def query(self) -> dict[str, Any]:
        return {"location": self.asked.location, "containing": self.asked.containing}

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        for file in self.files:
            yield Page(file.items(), state)

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        return False

    def enrich(self, item: Item) -> Item:
        return item

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        return {}

    def check(self, row: dict[str, Any]) -> list[Item]:
        return []

    def requests(self) -> int:
        return 0

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        [file] = [one for one in self.files if one.items()[0].item_id == item.item_id]
        return file.fetch(item, tell)


class ToyKind(SourceKind):
    """Take in the files of a list.

    [bold]Example[/bold]: lora-audit crawl toy list.txt --containing monet
    """

    name = "toy"
    asks = ToyQuery
    remote = False

    def open(self, catalog: Catalog, how: CrawlSettings, asked: ToyQuery | None = None) -> Source:
        """The list as it is now."""
        return ToySource(catalog, asked or ToyQuery())


SOURCE = ToyKind()
