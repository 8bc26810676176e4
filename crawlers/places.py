"""Where uploads lie: a folder of this machine, whose files may have any bytes as names, or object storage."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO, Any, Protocol

from pyarrow import fs

from audit.errors import CrawlError
from audit.files import is_remote, s3_filesystem, shown
from crawlers.inside import Found, list_inside, open_inside


class Place(Protocol):
    """A folder by relative paths with "/"; bytes that are no UTF-8 are surrogates in them, as in Python's own."""

    kind: str
    root: str

    def files(self) -> tuple[dict[str, Found], list[str]]:
        """All files below, and the links among them; none whose name or folder begins with ".". Raises OSError."""

    def open(self, path: str) -> Any:
        """A file's content, a context manager with ``read``. Raises OSError."""

    def has(self, path: str) -> bool:
        """Whether there is a file ``path``. Raises OSError."""


class LocalPlace:
    """A folder of this machine. Links are named and not followed (crawlers/inside.py)."""

    kind = "local"

    def __init__(self, root: str) -> None:
        self.root = root

    def files(self) -> tuple[dict[str, Found], list[str]]:
        """All files below, and the links."""
        return list_inside(Path(self.root))

    def open(self, path: str) -> IO[bytes]:
        """A file's content."""
        return open_inside(Path(self.root), path)

    def has(self, path: str) -> bool:
        """Whether there is a file ``path``; what may not be read is there, a link is not."""
        try:
            self.open(path).close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            return error.errno != errno.ELOOP
        return True


class RemotePlace:
    """A prefix of object storage."""

    def __init__(self, system: fs.FileSystem, root: str) -> None:
        self.system, self.root, self.kind = system, root, system.type_name

    def files(self) -> tuple[dict[str, Found], list[str]]:
        """All objects below; there are no links."""
        found = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True, recursive=True))
        paths = {info.path[len(self.root) :].lstrip("/"): info for info in found if info.type == fs.FileType.File}
        files = {
            path: Found(info.size, info.mtime_ns or 0)
            for path, info in paths.items()
            if not any(part.startswith(".") for part in path.split("/"))
        }
        return files, []

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
