"""A platform's own uploads: a folder, or a prefix of S3-compatible storage (pyarrow.fs), watched or looked at once.

On a disk links are named and not followed, and a file that a link has taken the place of is not read (``inside.py``).
A file counts once it is complete: its size and time have stayed the same between two looks, and its header accounts
for every byte. A JSON sidecar (``name.safetensors.json`` or ``name.json``) may say who uploaded it and what it is:
``{"uploader": ..., "caption": ... or "captions": [...], "base_model": ..., "training_images": N, "title": ...,
"url": ..., "license": ..., "tags": [...], "nsfw": true}``.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from audit.claims.captions import N0, Caption
from audit.config import CrawlSettings
from audit.errors import CheckpointError, FetchError
from audit.faults import is_of_the_item, reason_of_fault
from audit.files import private_file, shown
from audit.models.checkpoint import ADAPTER_NAME
from audit.models.formats.scaling import CONFIG_NAME, MAX_CONFIG_BYTES
from audit.states import ItemState
from audit.storable import path_as_text, path_of_text
from audit.untrusted.documents import parse_json
from crawlers.catalog import Catalog, Outcome
from crawlers.inside import Found
from crawlers.items import PICKLE, Claim, Item, clean_name, gguf_refusal, list_of, text_of
from crawlers.places import open_location
from crawlers.source import Page, Source, SourceKind, asked
from crawlers.store import hash_stream

log = logging.getLogger(__name__)
PAGE = 100
WEIGHTS = (".safetensors", ".gguf")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_SIDECAR_BYTES = 1024**2


@dataclass(frozen=True)
class FolderQuery:
    """Where it is, and when a file counts as complete."""

    location: str = asked("", "A folder, or s3://bucket/prefix.", argument=True, metavar="DIR")
    settle: float = asked(2.0, "Seconds a file must stay as it is before it counts as complete.", min=0)


class Folder:
    """Lists and copies weight files below ``location``; those that a look finds unfinished wait for the next one."""

    name = "folder"

    def __init__(self, catalog: Catalog, location: str, settle: float = 2.0) -> None:
        self.catalog, self.location, self.settle = catalog, location, settle
        self.place = open_location(location)
        root = f"{self.place.kind}:{self.place.root}"
        self.key = hashlib.sha256(root.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        self._links: list[str] = []
        self._looks = 0
        self.unfinished: list[str] = []

    def query(self) -> dict[str, Any]:
        """What identifies the crawl's state."""
        return {"root": self.key}

    def requests(self) -> int:
        """How many times the folder was listed."""
        return self._looks

    def _look(self) -> dict[str, Found]:
        self._looks += 1
        try:
            files, self._links = self.place.files()
            return files
        except OSError as error:
            raise FetchError(f"{shown(self.location)} cannot be listed: {str(error)[:200]}") from error

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        """The complete files that are new or changed since they were recorded, in order of their names."""
        files = self._look()
        known = self._known()
        weights = {
            path: info
            for path, info in sorted(files.items())
            if path.lower().endswith(WEIGHTS + PICKLES) and known.get(self._item_id(path)) != self._version(files, path)
        }
        settled = weights
        if weights and self.settle:
            time.sleep(self.settle)
            after = self._look()
            settled = {path: info for path, info in weights.items() if path in after and after[path] == info}
        self.unfinished = sorted(map(path_as_text, set(weights) - set(settled)))
        paths = list(settled)
        for start in range(0, max(1, len(paths)), PAGE):
            chunk = paths[start : start + PAGE]
            links = self._links if start == 0 else []
            failed = [f"{path_as_text(path)[-80:]}: a link, which is not followed" for path in links]
            yield Page(list(self._items(chunk, files, failed)), state, tuple(failed))

    def _items(self, paths: list[str], files: dict[str, Found], failed: list[str]) -> Iterator[Item]:
        for path in paths:
            try:
                yield self._item(path, files)
            except Exception as error:
                if not is_of_the_item(error):
                    raise
                what = f"folder: {path_as_text(path)}"
                failed.append(f"{what} was passed over: {reason_of_fault(error, what, log)}")

    def _known(self) -> dict[str, str]:
        rows = self.catalog.workspace.rows(
            "SELECT item_id, version_id FROM checkpoints WHERE source = 'folder' AND state <> 'failed' "
            "AND NOT starts_with(coalesce(reason, ''), 'a GGUF file') AND starts_with(item_id, ?)",
            [f"folder:{self.key}:"],
        )
        return {row["item_id"]: row["version_id"] for row in rows}

    def _item_id(self, path: str) -> str:
        return f"folder:{self.key}:{path_as_text(path)}"

    @staticmethod
    def _sidecar(files: Container[str], path: str) -> str | None:
        for name in (f"{path}.json", f"{path.rpartition('.')[0]}.json"):
            if name in files:
                return name
        return None

    def _version(self, files: dict[str, Found], path: str) -> str:
        """Size and time of the file and its sidecar: what shows that either has changed."""
        found = [files[path], *([files[side]] if (side := self._sidecar(files, path)) else [])]
        return "-".join(f"{info.size:x}.{info.mtime_ns:x}" for info in found)

    def _item(self, path: str, files: dict[str, Found]) -> Item:
        side = self._sidecar(files, path)
        said = self._read_sidecar(side, files[side].size) if side else {}
        if side is None and (link := self._sidecar(self._links, path)):
            said = {"refusal": f"its sidecar {clean_name(link)} is a link, which is not followed: put the file there"}
        captions = [said.get("caption"), *list_of(said.get("captions"), 50)]
        count = said.get("training_images")
        base = text_of(said.get("base_model"), 300)
        pickle = path.lower().endswith(PICKLES)
        return Item(
            item_id=self._item_id(path),
            source=self.name,
            model_id=path_as_text(path)[:300],
            version_id=self._version(files, path),
            name=clean_name(path_as_text(path)),
            download_url="",
            title=text_of(said.get("title"), 300),
            page_url=text_of(said.get("url"), 500),
            uploader=text_of(said.get("uploader"), 100),
            tags=tuple(filter(None, (text_of(tag, 100) for tag in list_of(said.get("tags"), 100)))),
            license=text_of(said.get("license"), 100),
            nsfw=said.get("nsfw") is True,
            published_at=datetime.fromtimestamp(files[path].mtime_ns / 1e9, UTC),
            base_models=(Claim(base, "sidecar"),) if base else (),
            n0=(N0(count, "sidecar"),) if type(count) is int and 0 < count < 10**6 else (),
            captions=tuple(Caption(text, "sidecar", 0.95) for text in map(text_of, captions) if text),
            claimed_bytes=files[path].size,
            refusal=PICKLE if pickle else said.get("refusal") or gguf_refusal(path),
        )

    def _read_sidecar(self, path: str, size: int) -> dict[str, Any]:
        """The sidecar's object; one that cannot be read refuses the item with the reason: it may name an opt-out."""
        try:
            if size > MAX_SIDECAR_BYTES:
                raise ValueError(f"{size} bytes are too many")
            with self.place.open(path) as stream:
                said = parse_json(stream.read(MAX_SIDECAR_BYTES))
            if not isinstance(said, dict):
                raise ValueError("it is not an object")
        except (OSError, ValueError) as error:
            name = clean_name(path_as_text(path))
            return {"refusal": f"its sidecar {name} cannot be read ({str(error)[:100]}): mend or remove it"}
        said.pop("refusal", None)
        return said

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        """A look sees everything."""
        return False

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        """Every look starts anew; what is known is in the tables."""
        return {"looked_at": datetime.now(UTC).isoformat()}

    def enrich(self, item: Item) -> Item:
        """There is nothing more to ask."""
        return item

    def check(self, row: dict[str, Any]) -> list[Item]:
        """Whether the row's file is still there."""
        known = self.catalog.items([row])[0]
        if not row["item_id"].startswith(f"folder:{self.key}:"):
            return [known]
        there = self.place.has(path_of_text(row["item_id"].split(":", 2)[2]))
        return [known if there else replace(known, missing="deleted from the folder")]

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Copy the file into the store, hashing on the way."""
        path = path_of_text(item.item_id.split(":", 2)[2])
        part = self.catalog.store.part(item)
        try:
            with self.place.open(path) as stream, private_file(part) as to:
                hashed = hash_stream(stream, item.name, to, self.catalog.store.max_bytes)
        except CheckpointError as error:
            part.unlink(missing_ok=True)
            raise FetchError(str(error), ItemState.refused) from None
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FetchError(f"{item.name} cannot be copied: {str(error)[:200]}", ItemState.failed) from error
        tell(hashed.bytes)
        config = self._configuration(path)
        if hashed.bytes != item.claimed_bytes:
            part.unlink()
            raise FetchError(f"{item.name} changed while it was read: the next look takes it", ItemState.failed)
        sha256, tensors = hashed.results()
        return Outcome(ItemState.stored, None, self.catalog.store.adopt(part, item.name, sha256, tensors, None, config))

    def _configuration(self, path: str) -> bytes | None:
        """PEFT's adapter_config.json beside an adapter that PEFT saved; None where there is none."""
        if path.rpartition("/")[2] != ADAPTER_NAME:
            return None
        try:
            with self.place.open(f"{path.removesuffix(ADAPTER_NAME)}{CONFIG_NAME}") as stream:
                return stream.read(MAX_CONFIG_BYTES + 1)  # a longer one is cut: it cannot be read, and that is said
        except OSError:
            return None


class FolderKind(SourceKind):
    """Take in a platform's own uploads, each with an optional JSON sidecar (docs/crawling.md has its fields).

    [bold]Example[/bold]: lora-audit crawl folder /srv/uploads --watch
    """

    name = "folder"
    asks = FolderQuery
    remote = False
    looks_again = True

    def open(self, catalog: Catalog, how: CrawlSettings, asked: FolderQuery | None = None) -> Source:
        """The folder as it is now."""
        wanted = asked or FolderQuery()
        return Folder(catalog, wanted.location, wanted.settle)

    def remark(self, source: Folder) -> str | None:
        """How many files are still being written."""
        count = len(source.unfinished)
        return f"{count} files are still being written: left for the next look" if count else None


SOURCE = FolderKind()
