"""A platform's own uploads: a folder, or a prefix of S3-compatible storage (pyarrow.fs), watched or looked at once.

On a disk links are named and not followed, and a file that a link has taken the place of is not read (``inside.py``).
A file counts once it is complete: its size and time have stayed the same between two looks, and its header accounts
for every byte. A JSON sidecar (``name.safetensors.json`` or ``name.json``) may say who uploaded it and what it is:
``{"uploader": ..., "caption": ... or "captions": [...], "base_model": ..., "training_images": N, "title": ...,
"url": ..., "license": ..., "tags": [...], "nsfw": true}``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pyarrow import fs

from audit.errors import CheckpointError, CrawlError, FetchError
from audit.extraction.captions import Caption, TrainingImages
from audit.files import is_remote, private_file, s3_filesystem, shown
from crawlers.catalog import Catalog, Outcome
from crawlers.crawl import Page
from crawlers.inside import list_inside, open_inside
from crawlers.items import Claim, Item, clean_name, list_of, text_of
from crawlers.store import hash_stream

PAGE = 100
WEIGHTS = (".safetensors",)
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_SIDECAR_BYTES = 1024**2


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system and path of a folder or ``s3://bucket/prefix?endpoint_override=...`` (Arrow's S3 options).

    Raises CrawlError where it does not exist or cannot be reached.
    """
    try:
        if is_remote(location):
            system, path = s3_filesystem(location)
        else:
            system, path = fs.LocalFileSystem(), str(Path(location).resolve())
        kind = system.get_file_info(path).type
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=False))
    except (OSError, ValueError) as error:
        raise CrawlError(f"{shown(location)} cannot be opened: {str(error)[:200]}") from error
    if kind != fs.FileType.Directory and not found:
        raise CrawlError(f"{shown(location)} is not a folder, or holds nothing")
    return system, path.rstrip("/")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


class Folder:
    """Lists and copies weight files below ``location``; those that a look finds unfinished wait for the next one."""

    name = "folder"

    def __init__(self, catalog: Catalog, location: str, settle: float = 2.0) -> None:
        self.catalog, self.location, self.settle = catalog, location, settle
        self.system, self.root = open_location(location)
        self.key = hashlib.sha256(f"{self.system.type_name}:{self.root}".encode()).hexdigest()[:12]
        self._local = Path(self.root or "/") if isinstance(self.system, fs.LocalFileSystem) else None
        self._links: list[str] = []
        self._looks = 0
        self.unfinished: list[str] = []

    def query(self) -> dict[str, Any]:
        """What identifies the crawl's state."""
        return {"root": self.key}

    def requests(self) -> int:
        """How many times the folder was listed."""
        return self._looks

    def _look(self) -> dict[str, fs.FileInfo]:
        self._looks += 1
        try:
            if self._local is not None:
                files, links = list_inside(self._local)
                self._links = [path for path in links if not _is_hidden(path)]
            else:
                found = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True, recursive=True))
                cut = len(self.root)
                files = {info.path[cut:].lstrip("/"): info for info in found if info.type == fs.FileType.File}
        except OSError as error:
            raise FetchError(f"{shown(self.location)} cannot be listed: {str(error)[:200]}") from error
        return {path: info for path, info in files.items() if not _is_hidden(path)}

    def _open(self, path: str) -> IO[bytes]:
        """The file ``path`` for reading. Raises OSError."""
        if self._local is not None:
            return open_inside(self._local, path)
        return self.system.open_input_stream(f"{self.root}/{path}")

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
            settled = {
                path: info
                for path, info in weights.items()
                if path in after and (after[path].size, after[path].mtime) == (info.size, info.mtime)
            }
        self.unfinished = sorted(set(weights) - set(settled))
        paths = list(settled)
        for start in range(0, max(1, len(paths)), PAGE):
            chunk = paths[start : start + PAGE]
            links = self._links if start == 0 else []
            passed_over = tuple(f"{path[-80:]}: a link, which is not followed" for path in links)
            yield Page([self._item(path, files) for path in chunk], state, passed_over)

    def _known(self) -> dict[str, str]:
        rows = self.catalog.workspace.rows(
            "SELECT item_id, version_id FROM checkpoints WHERE source = 'folder' AND state <> 'failed' "
            "AND starts_with(item_id, ?)",
            [f"folder:{self.key}:"],
        )
        return {row["item_id"]: row["version_id"] for row in rows}

    def _item_id(self, path: str) -> str:
        return f"folder:{self.key}:{path}"

    @staticmethod
    def _sidecar(files: Container[str], path: str) -> str | None:
        for name in (f"{path}.json", f"{path.rpartition('.')[0]}.json"):
            if name in files:
                return name
        return None

    def _version(self, files: dict[str, fs.FileInfo], path: str) -> str:
        """Size and time of the file and its sidecar: what shows that either has changed."""
        found = [files[path], *([files[side]] if (side := self._sidecar(files, path)) else [])]
        return "-".join(f"{info.size:x}.{info.mtime_ns or 0:x}" for info in found)

    def _item(self, path: str, files: dict[str, fs.FileInfo]) -> Item:
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
            model_id=path[:300],
            version_id=self._version(files, path),
            name=clean_name(path),
            download_url="",
            title=text_of(said.get("title"), 300),
            page_url=text_of(said.get("url"), 500),
            uploader=text_of(said.get("uploader"), 100),
            tags=tuple(filter(None, (text_of(tag, 100) for tag in list_of(said.get("tags"), 100)))),
            license=text_of(said.get("license"), 100),
            nsfw=said.get("nsfw") is True,
            published_at=datetime.fromtimestamp((files[path].mtime_ns or 0) / 1e9, UTC),
            base_models=(Claim(base, "sidecar"),) if base else (),
            training_images=(TrainingImages(count, "sidecar"),) if type(count) is int and 0 < count < 10**6 else (),
            captions=tuple(Caption(text, "sidecar", 0.95) for text in map(text_of, captions) if text),
            claimed_bytes=files[path].size,
            refusal="a pickle: only safetensors is read, pickles can run code" if pickle else said.get("refusal"),
        )

    def _read_sidecar(self, path: str, size: int) -> dict[str, Any]:
        """The sidecar's object; one that cannot be read refuses the item with the reason: it may name an opt-out."""
        try:
            if size > MAX_SIDECAR_BYTES:
                raise ValueError(f"{size} bytes are too many")
            with self._open(path) as stream:
                said = json.loads(stream.read(MAX_SIDECAR_BYTES))
            if not isinstance(said, dict):
                raise ValueError("it is not an object")
        except (OSError, ValueError, RecursionError) as error:
            return {"refusal": f"its sidecar {clean_name(path)} cannot be read ({str(error)[:100]}): mend or remove it"}
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
        path = row["item_id"].split(":", 2)[2]
        there = self._is_there(path)
        return [known if there else replace(known, missing="deleted from the folder")]

    def _is_there(self, path: str) -> bool:
        if self._local is None:
            return bool(self.system.get_file_info(f"{self.root}/{path}").type == fs.FileType.File)
        try:
            open_inside(self._local, path).close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            return error.errno != errno.ELOOP  # a link is none of ours; what may not be read is there
        return True

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Copy the file into the store, hashing on the way."""
        path = item.item_id.split(":", 2)[2]
        part = self.catalog.store.part(item)
        try:
            with self._open(path) as stream, private_file(part) as to:
                hashed = hash_stream(stream, item.name, to, self.catalog.store.max_bytes)
        except CheckpointError as error:
            part.unlink(missing_ok=True)
            raise FetchError(str(error), "refused") from None
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FetchError(f"{item.name} cannot be copied: {str(error)[:200]}", "failed") from error
        tell(hashed.bytes)
        if hashed.bytes != item.claimed_bytes:
            part.unlink()
            raise FetchError(f"{item.name} changed while it was read: the next look takes it", "failed")
        sha256, tensors = hashed.results()
        return Outcome("stored", None, self.catalog.store.adopt(part, item.name, sha256, tensors))
