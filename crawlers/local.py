"""One checkpoint file of this machine as a source of its own, for ``lora-audit catalog add FILE``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from audit.claims.captions import Caption
from audit.errors import CheckpointError, FetchError
from audit.files import private_file
from audit.models.formats.scaling import MAX_CONFIG_BYTES, config_beside
from audit.states import ItemState
from crawlers.catalog import Catalog, Outcome
from crawlers.items import Item, clean_name
from crawlers.source import Page
from crawlers.store import hash_stream


class LocalFile:
    """Copies one file into the store. Its item id is that of its content."""

    name = "file"

    def __init__(self, catalog: Catalog, path: Path, captions: list[str]) -> None:
        self.catalog, self.path, self.captions = catalog, path, captions

    def items(self) -> list[Item]:
        """The one item. Raises FetchError where the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = self.path.stat().st_size
        except OSError as error:
            raise FetchError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return [
            Item(
                item_id=f"file:{sha256}",
                source=self.name,
                model_id=sha256,
                version_id=sha256,
                name=clean_name(self.path.name),
                download_url="",
                claimed_bytes=size,
                claimed_sha256=sha256,
                captions=tuple(Caption(text, "user", 1.0) for text in self.captions),
            )
        ]

    def query(self) -> dict[str, Any]:
        """A single file has no query."""
        return {}

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        """The one item."""
        yield Page(self.items(), state)

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        """There is one page."""
        return True

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        """Nothing to go on from."""
        return {}

    def enrich(self, item: Item) -> Item:
        """There is nothing more to ask."""
        return item

    def check(self, row: dict[str, Any]) -> list[Item]:
        """The file as it is now."""
        return self.items()

    def requests(self) -> int:
        """None are made."""
        return 0

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Copy it into the store, hashing on the way."""
        part = self.catalog.store.part(item)
        try:
            with self.path.open("rb") as stream, private_file(part) as to:
                hashed = hash_stream(stream, item.name, to, self.catalog.store.max_bytes)
        except CheckpointError as error:
            part.unlink(missing_ok=True)
            raise FetchError(str(error), ItemState.refused) from None
        tell(hashed.bytes)
        beside = config_beside(self.path)
        config = None if beside is None else beside.read_bytes()[: MAX_CONFIG_BYTES + 1]
        stored = self.catalog.store.adopt(part, item.name, *hashed.results(), None, config)
        return Outcome(ItemState.stored, None, stored)
