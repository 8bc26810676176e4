"""A folder of this machine that strangers can write to: its files, none of its links, nothing outside.

Links are named and not followed, neither when the folder is listed nor, should one take a file's place later, when the
file is opened. Pipes and devices are no files.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from audit.storable import storable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A file: bytes, and time of writing in nanoseconds since 1970."""

    size: int
    mtime_ns: int


def list_inside(root: Path) -> tuple[dict[str, Found], list[str]]:
    """(files below ``root`` by their relative path, links among them), none whose name or folder begins with ".".

    Bytes of names that are no UTF-8 are surrogates, as in Python's own. A folder within that cannot be read is passed
    over with a warning. Raises OSError where ``root`` cannot be listed.
    """
    files: dict[str, Found] = {}
    links: list[str] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            if not folder:
                raise
            if not isinstance(error, FileNotFoundError):  # else removed meanwhile
                log.warning("%s cannot be listed: %s", storable(folder), error.strerror)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif (found := _found(entry)) is not None:
                files[path] = found
    return files, sorted(links)


def _found(entry: os.DirEntry[str]) -> Found | None:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return Found(found.st_size, found.st_mtime_ns)


def open_inside(root: Path, path: str) -> IO[bytes]:
    """Open the file ``path`` below ``root`` for reading. Raises OSError for what is no file, or behind a link."""
    *folders, name = path.split("/")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            there = os.open(_plain(folder), flags | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = there
        handle = os.open(_plain(name), flags | os.O_NONBLOCK, dir_fd=here)  # a pipe would wait for its writer
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is no file")
    return os.fdopen(handle, "rb")


def _plain(name: str) -> str:
    if name in ("", ".", ".."):
        raise OSError(f"{name!r} is no name of a file")
    return name
