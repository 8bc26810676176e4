"""Where uploads lie: a folder of this machine, whose files may have any bytes as names, or object storage."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from pyarrow import fs

from audit.errors import CrawlError
from audit.files import is_remote, s3_filesystem, shown
from audit.text import storable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A file: bytes, and time of writing in nanoseconds since 1970."""

    size: int
    mtime_ns: int


class Place(Protocol):
    """A folder by relative paths with "/"; bytes that are no UTF-8 are surrogates in them, as in Python's own."""

    kind: str
    root: str

    def files(self) -> dict[str, Found]:
        """All files below, but none whose name or folder begins with ".". Raises OSError."""

    def open(self, path: str) -> Any:
        """A file's content, a context manager with ``read``. Raises OSError."""

    def has(self, path: str) -> bool:
        """Whether there is a file ``path``. Raises OSError."""


class LocalPlace:
    """A folder of this machine. Links are followed, each folder is read once."""

    kind = "local"

    def __init__(self, root: str) -> None:
        self.root = root

    def files(self) -> dict[str, Found]:
        """All files below; a folder that cannot be read is passed over with a warning."""
        found: dict[str, Found] = {}
        read: set[tuple[int, int]] = set()
        for parent, folders, names in os.walk(self.root, onerror=self._unreadable, followlinks=True):
            inode = os.stat(parent)
            if (inode.st_dev, inode.st_ino) in read:
                folders.clear()
                continue
            read.add((inode.st_dev, inode.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                with suppress(OSError):  # a link that leads nowhere, or a file that has gone
                    seen = os.stat(f"{parent}/{name}")
                    if stat.S_ISREG(seen.st_mode) and not name.startswith("."):
                        found[os.path.relpath(f"{parent}/{name}", self.root)] = Found(seen.st_size, seen.st_mtime_ns)
        return found

    def _unreadable(self, error: OSError) -> None:
        if os.path.realpath(error.filename) == self.root:
            raise error
        log.warning("%s cannot be listed: %s", storable(str(error.filename)), error.strerror)

    def open(self, path: str) -> IO[bytes]:
        """A file's content."""
        return Path(self.root, path).open("rb")

    def has(self, path: str) -> bool:
        """Whether there is a file ``path``."""
        return Path(self.root, path).is_file()


class RemotePlace:
    """A prefix of object storage."""

    def __init__(self, system: fs.FileSystem, root: str) -> None:
        self.system, self.root, self.kind = system, root, system.type_name

    def files(self) -> dict[str, Found]:
        """All objects below."""
        found = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True, recursive=True))
        paths = {info.path[len(self.root) :].lstrip("/"): info for info in found if info.type == fs.FileType.File}
        return {
            path: Found(info.size, info.mtime_ns or 0)
            for path, info in paths.items()
            if not any(part.startswith(".") for part in path.split("/"))
        }

    def open(self, path: str) -> Any:
        """An object's content."""
        return self.system.open_input_stream(f"{self.root}/{path}")

    def has(self, path: str) -> bool:
        """Whether there is an object ``path``."""
        return bool(self.system.get_file_info(f"{self.root}/{path}").type == fs.FileType.File)


def open_location(location: str) -> Place:
    """The place of a folder or ``s3://bucket/prefix?endpoint_override=...`` (Arrow's S3 options).

    Raises CrawlError where it does not exist or cannot be reached.
    """
    try:
        if not is_remote(location):
            root = Path(location).resolve()
            if not root.is_dir():
                raise CrawlError(f"{shown(location)} is not a folder, or holds nothing")
            return LocalPlace(str(root))
        system, path = s3_filesystem(location)
        kind = system.get_file_info(path).type
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=False))
    except (OSError, ValueError) as error:
        raise CrawlError(f"{shown(location)} cannot be opened: {str(error)[:200]}") from error
    if kind != fs.FileType.Directory and not found:
        raise CrawlError(f"{shown(location)} is not a folder, or holds nothing")
    return RemotePlace(system, path.rstrip("/"))
