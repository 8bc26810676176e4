"""A folder of whole, immutable files: on a local or shared disk, or below a prefix of S3-compatible storage.

A file appears complete or not at all. On a disk it is written under a temporary name, synced and renamed; on S3 it is
prepared in a temporary file and sent as one object. Keys are relative paths with "/".

What is written is its owner's alone, whatever the umask: files 0600, folders 0700. Folders that were there keep their
mode.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pyarrow import fs

from audit.conditional import ConditionalObjects
from audit.errors import WorkspaceError
from audit.locations import is_remote as is_remote
from audit.locations import parse_s3
from audit.locations import shown as shown

T = TypeVar("T")
S3_TRIES = 5
PART = ".part"  # how the names of unfinished files end; they begin with "."
ABANDONED = 3600.0  # s without a write after which an unfinished file has no owner
FILE_MODE, FOLDER_MODE = 0o600, 0o700


@dataclass(frozen=True)
class Entry:
    """One file of a folder: its key, bytes, and time of writing (Unix seconds)."""

    key: str
    size: int
    modified: float


def make_folder(folder: Path) -> None:
    """Create ``folder`` and those above it that are missing, each for its owner alone, whatever the umask."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        try:
            one.mkdir(FOLDER_MODE)
        except FileExistsError:  # another process was quicker
            if not one.is_dir():
                raise
        else:
            one.chmod(FOLDER_MODE)  # a umask may have taken the owner's rights, too


@contextmanager
def private_file(path: Path, mode: str = "wb") -> Iterator[IO[bytes]]:
    """The binary file ``path`` opened by ``mode``: its owner's alone before its first byte, also if it was there."""
    with open(path, mode, opener=lambda name, flags: os.open(name, flags, FILE_MODE)) as file:
        os.fchmod(file.fileno(), FILE_MODE)
        yield file


@contextmanager
def _complete_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A temporary file beside ``path`` and its path; what is written to it is on disk when the block goes on to place
    it, and it is gone afterwards. Raises WorkspaceError where the disk is full or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=PART)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, FILE_MODE)
            yield file, temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise WorkspaceError(
                f"no disk space to write {path}: free some, then run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise WorkspaceError(f"{path} cannot be written ({error.strerror}): choose another --workspace") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on disk, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems know no such thing
        pass
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path, place: Callable[[], Path] | None = None) -> Iterator[IO[bytes]]:
    """A binary file that appears at ``path`` only once it is complete and on disk.

    ``place`` names, once the content is complete, another path of the same folder. Raises WorkspaceError where the disk
    is full or the folder cannot be written; nothing is left behind.
    """
    with _complete_file(path) as (file, temporary):
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(place() if place else path)
        _sync_folder(path.parent)


def create_file(path: Path, content: bytes) -> bool:
    """Create ``path`` with ``content`` unless it is there; whether this call did. Of many callers one does.

    A hard link appears whole or not at all, also on NFS, where the answer can be lost: the link count tells. Raises
    WorkspaceError where the file system has no hard links.
    """
    with _complete_file(path) as (file, temporary):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise WorkspaceError(
                    f"{path.parent} is on a file system without hard links, which keep two writers apart: choose "
                    "another --workspace"
                ) from error
            if os.fstat(file.fileno()).st_nlink != 2:
                raise
        created = os.fstat(file.fileno()).st_nlink == 2
        _sync_folder(path.parent)
    return created


def s3_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """Arrow's S3 file system and the path "bucket/prefix" of ``s3://bucket/prefix?endpoint_override=...``.

    Credentials are Arrow's usual ones (environment, profile, instance role), or KEY:SECRET@ in the URL. The options
    endpoint_override, scheme, region and allow_bucket_creation are Arrow's. Raises WorkspaceError for others.
    """
    try:
        parts = parse_s3(location)
    except ValueError as error:
        raise WorkspaceError(f"{shown(location)} is not understood ({error})") from error
    options = parts.options
    unknown = set(options) - {"endpoint_override", "scheme", "region", "allow_bucket_creation"}
    if unknown or not parts.bucket:
        raise WorkspaceError(f"{shown(location)} is not understood ({', '.join(sorted(unknown)) or 'no bucket'})")
    arguments: dict[str, Any] = {
        name: options[name] for name in ("endpoint_override", "scheme", "region") if name in options
    }
    if parts.key:
        arguments |= {"access_key": parts.key, "secret_key": parts.secret}
    arguments["allow_bucket_creation"] = options.get("allow_bucket_creation") == "true"
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=S3_TRIES)
    try:
        system = fs.S3FileSystem(retry_strategy=retry, connect_timeout=10, request_timeout=60, **arguments)
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{shown(location)} cannot be opened: {str(error)[:300]}") from error
    return system, parts.path


def _make_empty(path: Path) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY, FILE_MODE)
    try:
        os.fchmod(handle, FILE_MODE)
    finally:
        os.close(handle)


def _remove_old(path: Path, age: float) -> None:
    with suppress(FileNotFoundError, PermissionError):
        if abs(time.time() - path.stat().st_mtime) >= age:
            path.unlink()


class Files:
    """The files below ``location``; the folder need not exist yet. ``local`` is its path, None on object storage."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.local: Path | None = None
        self._objects: ConditionalObjects | None = None
        if is_remote(self.location):
            self.system, self.base = s3_filesystem(self.location)
        else:
            self.local = Path(location)
            self.system, self.base = fs.LocalFileSystem(), str(self.local)

    def __str__(self) -> str:
        return shown(self.location)

    def path(self, key: str) -> str:
        """The path of ``key`` for ``system``."""
        return f"{self.base}/{key}"

    @contextmanager
    def writing(self, key: str, name: Callable[[], str] | None = None) -> Iterator[IO[bytes]]:
        """A binary file that appears under ``key`` once it is complete. Raises WorkspaceError where it cannot.

        ``name`` gives it, once its content is complete, another key in the same folder.
        """
        if self.local is not None:
            local = self.local
            with whole_file(local / key, (lambda: local / name()) if name else None) as file:
                yield file
            return
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            place = name() if name else key
            self._patiently(lambda: self._send(file, place), place)

    def _send(self, file: IO[bytes], key: str) -> None:
        file.seek(0)
        with self.system.open_output_stream(self.path(key)) as stream:
            shutil.copyfileobj(file, stream, 8 << 20)

    def _patiently(self, call: Callable[[], T], key: str) -> T:
        """``call`` again where the storage fails in passing, beyond Arrow's own retries."""
        for attempt in range(3):
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                if attempt == 2:
                    raise WorkspaceError(f"{self}/{key} cannot be reached: {str(error)[:300]}") from error
                time.sleep(2.0**attempt)
        raise AssertionError("unreachable")

    def write(self, key: str, content: bytes) -> None:
        """Write ``content`` as the whole file ``key``."""
        with self.writing(key) as file:
            file.write(content)

    def create(self, key: str, content: bytes) -> bool:
        """Create ``key`` with ``content`` unless it is there; whether this call did: of many callers exactly one.

        No two callers may give the same content. Raises WorkspaceError where the storage cannot do this.
        """
        if self.local is not None:
            return create_file(self.local / key, content)
        if self._objects is None:
            self._objects = ConditionalObjects(self.location, self.system.region)
        try:
            if self._objects.create(key, content):
                return True
        except OSError as error:
            raise WorkspaceError(f"{self}/{key} cannot be created: {str(error)[:300]}") from error
        return self.read(key) == content  # it was this call, and the answer to its first try was lost

    def mark(self, key: str) -> None:
        """Make the empty file ``key``, without waiting until it is on disk."""
        if self.local is None:
            self.write(key, b"")
            return
        path = self.local / key
        try:
            _make_empty(path)
        except FileNotFoundError:
            make_folder(path.parent)
            _make_empty(path)

    def names(self, folder: str) -> list[str]:
        """The names of what is in ``folder``, in no order, without those that start with "."; quicker than ``list``."""
        if self.local is None:
            return [entry.key.rpartition("/")[2] for entry in self.list(folder)]
        try:
            return [name for name in os.listdir(self.local / folder) if not name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sweep(self, folder: str, age: float) -> None:
        """Remove unfinished files of dead processes in ``folder``: those not written to for ``age`` seconds."""
        if self.local is None:
            return
        for path in (self.local / folder).glob(f".*{PART}"):
            _remove_old(path, age)

    def tidy(self, age: float = ABANDONED) -> None:
        """Remove what killed writes have left anywhere: unfinished files not written to for ``age`` seconds."""
        for where, _, names in os.walk(self.scratch):
            for name in names:
                if name.startswith(".") and name.endswith(PART):
                    _remove_old(Path(where) / name, age)

    def read(self, key: str) -> bytes | None:
        """The content of ``key``, None where there is none."""
        try:
            if self.local is not None:
                return (self.local / key).read_bytes()
            return self._patiently(lambda: self._receive(key), key)
        except FileNotFoundError:
            return None

    def _receive(self, key: str) -> bytes:
        with self.system.open_input_stream(self.path(key)) as stream:
            return bytes(stream.read())

    def exists(self, key: str) -> bool:
        """Whether there is a file ``key``."""
        if self.local is not None:
            return (self.local / key).is_file()
        found = self._patiently(lambda: self.system.get_file_info(self.path(key)), key)
        return bool(found.type == fs.FileType.File)

    def list(self, folder: str, recursive: bool = False) -> list[Entry]:
        """The files of ``folder`` in order of their keys; those whose name starts with "." are left out."""
        selector = fs.FileSelector(
            self.path(folder) if folder else self.base, recursive=recursive, allow_not_found=True
        )
        found = self._patiently(lambda: self.system.get_file_info(selector), folder)
        cut = len(self.base) + 1
        entries = [
            Entry(info.path[cut:], info.size, (info.mtime_ns or 0) / 1e9)
            for info in found
            if info.type == fs.FileType.File and not info.base_name.startswith(".")
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def remove(self, key: str) -> None:
        """Remove the file ``key``; nothing happens where there is none."""
        if self.local is not None:
            (self.local / key).unlink(missing_ok=True)
            return
        try:
            self._patiently(lambda: self.system.delete_file(self.path(key)), key)
        except FileNotFoundError:
            return

    def remove_folder(self, folder: str) -> None:
        """Remove ``folder`` and everything in it; nothing happens where there is none."""
        if self.local is not None:
            shutil.rmtree(self.local / folder, ignore_errors=True)
            return
        for entry in self.list(folder, recursive=True):
            self.remove(entry.key)

    def adopt(self, path: Path, key: str) -> None:
        """Move the complete local file ``path`` to ``key``."""
        if self.local is not None:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            target = self.local / key
            make_folder(target.parent)
            path.chmod(FILE_MODE)
            path.replace(target)
            return
        with path.open("rb") as file:
            self._patiently(lambda: self._send(file, key), key)
        path.unlink()

    def fetch(self, key: str) -> Path:
        """A local file with the content of ``key``: itself on a disk, else a copy in the cache.

        Keys of fetched files must name their content: a copy is never asked for again. Raises FileNotFoundError.
        """
        if self.local is not None:
            path = self.local / key
            if not path.is_file():
                raise FileNotFoundError(key)
            return path
        copy = self.scratch / key
        if not copy.is_file():
            with whole_file(copy) as file:
                self._patiently(lambda: self._copy(key, file), key)
        return copy

    def _copy(self, key: str, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        with self.system.open_input_stream(self.path(key)) as stream:
            shutil.copyfileobj(stream, file, 8 << 20)

    @property
    def scratch(self) -> Path:
        """A local folder for unfinished files and copies: the folder itself on a disk, else a cache."""
        if self.local is not None:
            return self.local
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(cache) / "lora-audit" / self.base.replace("/", "_")
