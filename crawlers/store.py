"""Files from strangers on their way into the workspace: streamed, hashed, checked, and only then in place.

A stored file is named by the SHA256 of its tensors and their layout, so that the same tensors are stored once, however
often a source rewrites the header. What fails the checks is kept apart in ``checkpoints/quarantined``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import requests

from audit.errors import BrokeOffError, CheckpointError, FetchError
from audit.files import make_folder, private_file
from audit.models.checkpoint import hash_file, identity_of, layout_of
from audit.models.formats.detect import Format, detect_format
from audit.models.formats.gguf_header import GGUF_MAGIC
from audit.models.formats.headers import is_gguf, read_any_header
from audit.models.formats.scaling import CONFIG_NAME, with_config_beside
from audit.models.safetensors_header import MAX_HEADER_BYTES, Header, refuse_other_formats
from audit.similar import Attempt, attempt
from audit.states import ItemState
from audit.workspace import Workspace
from crawlers.http import Session, check_status, shown
from crawlers.items import WITHOUT_GGUF, Item, clean_name, gguf_refusal

MAX_FILE_BYTES = 8 * 1024**3
CHUNK = 1 << 20
TRIES = 6
NO_SKETCH = Attempt(None)


@dataclass(frozen=True)
class Stored:
    """A file that passed the header check and is in place. ``note`` says what is odd about it, if anything."""

    header: Header
    sha256: str
    tensors_sha256: str
    identity: str
    format: Format | None
    note: str | None
    sketch: Attempt = NO_SKETCH


class StreamingHash:
    """SHA256 of a safetensors file and of its tensor bytes alone, fed in pieces as they arrive.

    Of a GGUF file, where the package that reads it is installed, the whole alone: where its tensors begin is not known
    before its header is read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.restart()

    def restart(self) -> None:
        """Forget everything that was fed."""
        self.bytes = 0
        self._whole, self._tensors = hashlib.sha256(), hashlib.sha256()
        self._start: bytes | None = b""  # None once the place where the tensors start is known
        self._data_start = 0

    def add(self, piece: bytes) -> None:
        """Take the next bytes. Raises CheckpointError as soon as they cannot be the start of a file that is read."""
        self._whole.update(piece)
        self.bytes += len(piece)
        if self._start is not None:
            self._start = piece = self._start + piece
            if len(piece) < 64:
                return
            self._data_start = 8 + self._header_length(piece[:64])
            self._start = None
        skip = max(0, self._data_start - (self.bytes - len(piece)))
        if skip < len(piece):
            self._tensors.update(memoryview(piece)[skip:])

    def _header_length(self, start: bytes) -> int:
        if start.startswith(GGUF_MAGIC):
            if gguf_refusal(".gguf"):
                raise CheckpointError(f"{self.name} is {WITHOUT_GGUF}")
            return 1 << 62
        refuse_other_formats(self.name, len(start), start)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.name} declares a header of {length} bytes (at most {MAX_HEADER_BYTES} are read): it is "
                "damaged, not a safetensors file, or made to exhaust memory"
            )
        return length

    def results(self) -> tuple[str, str]:
        """(SHA256 of the file, SHA256 of the tensor bytes; of a GGUF file that of none)."""
        return self._whole.hexdigest(), self._tensors.hexdigest()


class Store:
    """The ``checkpoints`` folder of a workspace."""

    def __init__(self, workspace: Workspace, max_bytes: int = MAX_FILE_BYTES) -> None:
        self.files = workspace.files
        self.max_bytes = max_bytes
        self._lock = threading.Lock()

    @staticmethod
    def key(identity: str) -> str:
        """The key of the file of ``identity``, in whichever format, which its first bytes show.

        Raises ValueError for anything but 64 hex digits.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", identity):
            raise ValueError(f"{identity!r} is not an identity")
        return f"checkpoints/{identity}.safetensors"

    @classmethod
    def config_key(cls, identity: str) -> str:
        """The key of the PEFT configuration that came with the file of ``identity``, where one did."""
        return f"{cls.key(identity).removesuffix('.safetensors')}.{CONFIG_NAME}"

    def fetch(self, identity: str) -> Path | None:
        """A local path of the file of ``identity``, what came with it beside it; None where it is not stored."""
        with suppress(FileNotFoundError):
            self.files.fetch(self.config_key(identity))
        try:
            return self.files.fetch(self.key(identity))
        except FileNotFoundError:
            return None

    def remove(self, identity: str) -> None:
        """Remove the file of ``identity``, and what came with it."""
        self.files.remove(self.key(identity))
        self.files.remove(self.config_key(identity))

    def part(self, item: Item) -> Path:
        """The unfinished download of ``item``."""
        parts = self.files.scratch / "checkpoints" / "parts"
        make_folder(parts)
        key = json.dumps([item.item_id, item.version_id, item.claimed_sha256])
        return parts / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.part"

    def download(
        self, session: Session, item: Item, tell: Callable[[int], None] | None = None, config: bytes | None = None
    ) -> Stored:
        """Download ``item`` to its place, going on where an earlier try stopped; ``tell`` hears of arriving bytes.

        ``config`` is PEFT's adapter_config.json, where it came with one.

        Where the source's SHA256 is not the file's, the file is fetched once more: if it arrives the same, the
        source's record is wrong and the file counts, with a note. Raises FetchError.
        """
        with _locked(self.part(item)) as part:
            hashed = self._complete(session, item, part, tell)
            sha256, tensors = hashed.results()
            note = None
            if item.claimed_sha256 and sha256 != item.claimed_sha256:
                if item.claimed_autov3 and tensors.startswith(item.claimed_autov3):
                    note = "the source states another SHA256 but the right tensor hash: the header was rewritten"
                else:
                    part.unlink()
                    again = self._complete(session, item, part, tell).results()
                    if again != (sha256, tensors) and again[0] != item.claimed_sha256:
                        part.unlink()
                        raise FetchError(
                            "the file arrives damaged: two downloads differ from each other", ItemState.failed
                        )
                    if again[0] != item.claimed_sha256:
                        note = "the SHA256 that the source states is not the file's, which arrived the same twice"
                    sha256, tensors = again
            return self.adopt(part, item.name, sha256, tensors, note, config)

    def adopt(
        self, part: Path, name: str, sha256: str, tensors_sha256: str, note: str | None = None,
        config: bytes | None = None,
    ) -> Stored:  # fmt: skip
        """Check the complete file ``part`` and move it into its place, or into quarantine.

        Raises FetchError (state "refused") where the header check fails, or its configuration cannot be read.
        """
        try:
            header = read_any_header(part)
        except CheckpointError as error:
            reason = str(error).replace(str(part), clean_name(name))
            self._quarantine(part, sha256, clean_name(name), reason)
            raise FetchError(reason, ItemState.refused) from None
        kind: Format | None = None
        try:
            kind, _ = detect_format(part, header)
        except CheckpointError as error:
            unknown = str(error).replace(str(part), clean_name(name))
            note = f"{note}; {unknown}" if note else unknown
        if config is not None and kind is Format.lora_peft:
            header = self._configured(part, name, header, config)
        if is_gguf(part):
            _, tensors_sha256 = hash_file(part, header)
        identity = identity_of(tensors_sha256, layout_of(header))
        adapter = kind is not None and kind.is_adapter
        sketch = attempt([(part, header)], clean_name(name)) if adapter else NO_SKETCH
        with self._lock:
            if config is not None and kind is Format.lora_peft:  # before the file, which makes it count
                self.files.write(self.config_key(identity), config)
            if self.files.exists(self.key(identity)):
                part.unlink()
            else:
                self.files.adopt(part, self.key(identity))
        return Stored(header, sha256, tensors_sha256, identity, kind, note, sketch)

    @staticmethod
    def _configured(part: Path, name: str, header: Header, config: bytes) -> Header:
        """``header`` with what the configuration says, as whoever opens the stored file will see it."""
        beside = part.with_name(f"{part.stem}.{CONFIG_NAME}")
        beside.write_bytes(config)
        try:
            return replace(header, metadata=with_config_beside(part, header.metadata))
        except CheckpointError as error:
            part.unlink()
            raise FetchError(str(error).replace(str(beside), f"{CONFIG_NAME} of {name}"), ItemState.refused) from None
        finally:
            beside.unlink()

    def _quarantine(self, part: Path, sha256: str, name: str, reason: str) -> None:
        apart = f"checkpoints/quarantined/{sha256}"
        said = {"name": name, "reason": reason, "bytes": part.stat().st_size}
        self.files.write(f"{apart}.json", json.dumps(said).encode())
        self.files.adopt(part, f"{apart}.bin")

    def _complete(self, session: Session, item: Item, part: Path, tell: Callable[[int], None] | None) -> StreamingHash:
        """Append to ``part`` until it is the whole file; the hash of all its bytes."""
        failure: FetchError | None = None
        for _ in range(TRIES):
            hashed = StreamingHash(item.name)
            try:
                if part.is_file():
                    with part.open("rb") as file:
                        while piece := file.read(CHUNK):
                            hashed.add(piece)
                self._one_try(session, item, part, hashed, tell)
                return hashed
            except CheckpointError as error:  # the start of the file shows what it is: nothing of it is kept
                part.unlink(missing_ok=True)
                raise FetchError(str(error), ItemState.refused) from None
            except _TryAgain as error:
                failure = error
        assert failure is not None
        raise FetchError(f"{failure}, {TRIES} times", ItemState.failed)

    def _one_try(
        self, session: Session, item: Item, part: Path, hashed: StreamingHash, tell: Callable[[int], None] | None
    ) -> None:
        have = hashed.bytes
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with session.open(item.download_url, headers=headers) as response:
                self._answer(response, item, part, hashed, tell)
        except BrokeOffError as error:
            raise _TryAgain(str(error)) from None

    def _answer(
        self, response: requests.Response, item: Item, part: Path, hashed: StreamingHash,
        tell: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        have, status, where = hashed.bytes, response.status_code, shown(response.url)
        if status == 416:
            total = re.fullmatch(r"bytes \*/(\d{1,15})", response.headers.get("Content-Range", ""))
            if total and int(total.group(1)) == have:
                return  # it was complete already
            part.unlink(missing_ok=True)
            raise _TryAgain(f"{where} has fewer bytes than were there before")
        if status in (400, 403) and response.history:
            raise _TryAgain(f"the link {where} has expired (HTTP {status})")  # the next try gets a fresh one
        check_status(response)
        if "text/html" in response.headers.get("Content-Type", ""):
            if "login" in response.url:
                raise FetchError("the download wants a login: set the source's token", ItemState.failed)
            raise FetchError(f"{where} answers with a web page instead of the file", ItemState.refused)
        first = 0
        # Some proxies compress what was asked for as it is: lengths and ranges are then those of the compressed bytes.
        packed = response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
        if status == 206 and packed:
            part.unlink(missing_ok=True)
            raise _TryAgain(f"{where} answers with a range of compressed bytes")
        if status == 206:
            got = re.match(r"bytes (\d{1,15})-", response.headers.get("Content-Range", ""))
            if not got or int(got.group(1)) != have:
                part.unlink(missing_ok=True)
                raise _TryAgain(f"{where} answers with another range than was asked")
            first = have
        length = response.headers.get("Content-Length", "")
        expected = first + int(length) if re.fullmatch(r"\d{1,15}", length) and not packed else None
        if expected is not None and expected > self.max_bytes:
            raise FetchError(f"{expected} bytes are more than the limit of {self.max_bytes}", ItemState.refused)
        if first == 0 and have:  # the range was ignored: the whole file comes
            hashed.restart()
        with private_file(part, "r+b" if first else "wb") as file:
            file.seek(first)
            file.truncate()
            self._receive(response, file, hashed, tell)
        if expected is not None and hashed.bytes != expected:
            raise _TryAgain(f"{where} broke off after {hashed.bytes} of {expected} bytes")

    def _receive(
        self, response: requests.Response, file: IO[bytes], hashed: StreamingHash, tell: Callable[[int], None] | None
    ) -> None:
        for piece in response.iter_content(CHUNK):
            hashed.add(piece)
            file.write(piece)
            if hashed.bytes > self.max_bytes:
                raise FetchError(f"more than the limit of {self.max_bytes} bytes arrive", ItemState.refused)
            if tell:
                tell(len(piece))


class _TryAgain(FetchError):
    """A download that broke off and can go on."""


@contextmanager
def _locked(part: Path) -> Iterator[Path]:
    """A part file that one thread of one process writes at a time."""
    lock = part.with_suffix(".lock")
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == lock.stat().st_ino:
                break
        os.close(handle)  # whoever held it before has removed it meanwhile
    try:
        yield part
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def hash_stream(file: IO[bytes], name: str, to: IO[bytes] | None, max_bytes: int) -> StreamingHash:
    """Read ``file`` to its end, hashing and copying it. Raises CheckpointError, and FetchError over ``max_bytes``."""
    hashed = StreamingHash(name)
    while piece := file.read(CHUNK):
        hashed.add(piece)
        if hashed.bytes > max_bytes:
            raise FetchError(f"more than the limit of {max_bytes} bytes", ItemState.refused)
        if to is not None:
            to.write(piece)
    return hashed
