"""What a source of checkpoints is: a file in ``crawlers/sources``, or an entry point of another package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from audit.config import CrawlSettings
from audit.registry import Registry
from crawlers.catalog import Catalog, Outcome
from crawlers.items import Item


def asked(default: Any, text: str, **more: Any) -> Any:
    """A field of what a source is asked for: its help, and as for settings ``option``, ``metavar``, ``min``, ``max``.

    ``argument`` makes it an argument of the command.
    """
    return field(default=default, metadata={"help": text, **more})


def known_query(asked: dict[str, Any]) -> dict[str, Any]:
    """A query without the families that are not asked for: it is then the crawl of before there were any."""
    return {name: value for name, value in asked.items() if name != "families" or value}


@dataclass(frozen=True)
class Page:
    """Items of one answer of the source. ``state`` is what the crawl needs to go on behind it.

    ``passed_over`` names the parts of the listing that the source could not answer.
    """

    items: list[Item]
    state: dict[str, Any]
    passed_over: tuple[str, ...] = ()


class Source(Protocol):
    """Where checkpoints are listed and fetched from."""

    name: str

    def query(self) -> dict[str, Any]:
        """Everything that decides what is listed; it identifies the crawl's state."""

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        """Pages from where ``state`` left off; an empty state starts at the newest."""

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        """Whether the pages behind ``page`` hold nothing new, when it had ``new`` new or changed items."""

    def enrich(self, item: Item) -> Item:
        """``item`` with claims that cost further requests; asked for new and changed items only."""

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a crawl that has seen everything: the next one starts at the newest again."""

    def check(self, row: dict[str, Any]) -> list[Item]:
        """What the source now has in place of the catalog's ``row``; items with ``missing`` where it is gone."""

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Get the item's file into the store. Raises FetchError."""

    def requests(self) -> int:
        """HTTP requests so far."""


class SourceKind(ABC):
    """A place that checkpoints come from. Its docstring is the help of ``lora-audit crawl NAME``.

    ``title`` is what people call it, where that is not its name. ``asks`` is a dataclass whose fields become the
    options of that command; ``settings`` are those of the configuration's group ``crawl`` that it heeds beside the
    common ones; ``endpoint`` is the one that its ``--endpoint`` sets. ``remote``: its items have pages that can be
    asked about again. ``looks_again``: it can be watched.
    """

    name: ClassVar[str]
    title: ClassVar[str | None] = None
    asks: ClassVar[type]
    settings: ClassVar[tuple[str, ...]] = ()
    endpoint: ClassVar[str | None] = None
    remote: ClassVar[bool] = True
    looks_again: ClassVar[bool] = False

    @abstractmethod
    def open(self, catalog: Catalog, how: CrawlSettings, asked: Any = None) -> Source:
        """The source, ``asked`` (an ``asks``) for its listing; None for single items. Raises CrawlError."""

    def named(self, text: str) -> dict[str, str] | None:
        """What a page's URL or a name means here, for ``find``; None where it is none of this source's."""
        return None

    def find(self, source: Any, named: dict[str, str]) -> list[Item]:
        """The items of what ``named`` has understood. Raises FetchError."""
        found: list[Item] = source.one(**named)
        return found

    def remark(self, source: Any) -> str | None:
        """What a person should hear after a crawl, None where there is nothing to say."""
        return None


SOURCES: Registry[SourceKind] = Registry(SourceKind, "crawlers.sources", "SOURCE", "lora_audit.sources")
