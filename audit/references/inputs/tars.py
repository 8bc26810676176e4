"""Tar files as webdataset and img2dataset write them: a picture, and beside it JSON and text of the same key.

They are read as a stream, header by header (POSIX.1-1988 "ustar", its extended headers of 2001, and GNU's long names);
nothing is unpacked to the disk, and names of members name nothing but the picture. Links, devices and the like are
passed over. A tar that is damaged or ends before its end mark is refused: what is missing would not be missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from audit.descriptors.pictures import MAX_FILE_BYTES, SUFFIXES
from audit.errors import ReferenceSetError
from audit.references.inputs.given import Given, Pictures
from audit.references.inputs.metadata import metadata_text
from audit.storable import path_as_text
from audit.untrusted.documents import parse_json

BLOCK = 512
MOST_NAMES = 64 << 10  # bytes of an extended header
MOST_BESIDE = 64 << 10  # bytes of JSON or text beside a picture
MOST_VALUE = 1000  # characters of a value in it; longer ones, such as EXIF, are left out
TYPES = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


def is_tar(path: Path) -> bool:
    """Whether ``path`` is a tar by its ending."""
    return path.suffix.lower() == ".tar" and path.is_file()


def tar_pictures(path: Path) -> Pictures:
    """The pictures of a tar."""
    return Pictures(str(path), given_in(path))


def given_in(path: Path, prefix: str = "") -> Iterator[Given]:
    """The pictures of a tar, with what stands beside them. Raises ReferenceSetError for one that is no whole tar."""
    label = f"{prefix}{path_as_text(path.name)}"
    try:
        with path.open("rb") as file:
            yield from _samples(_members(file, path), label)
    except OSError as error:
        raise ReferenceSetError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _Member:
    name: str
    data: bytes
    refused: str | None = None

    @property
    def key(self) -> str:
        """All before the first point of the file's name, as webdataset has it."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def suffix(self) -> str:
        return "." + self.name.rpartition("/")[2].rpartition(".")[2].lower()


def _samples(members: Iterator[_Member], label: str) -> Iterator[Given]:
    """Each picture once all of its key is read."""
    held: list[_Member] = []
    for one in members:
        if held and one.key != held[0].key:
            yield from _sample(held, label)
            held = []
        held.append(one)
    yield from _sample(held, label)


def _sample(members: list[_Member], label: str) -> Iterator[Given]:
    about: dict[str, Any] = {}
    wrong = None
    for one in members:
        if one.refused is not None:
            continue
        try:
            if one.suffix == ".json":
                said = parse_json(one.data)
                if not isinstance(said, dict):
                    raise ValueError("no object")
                about |= {name: value for name, value in said.items() if len(str(value)) <= MOST_VALUE}
            elif one.suffix == ".txt":
                about["text"] = one.data.decode("utf-8", "replace")[:MOST_VALUE]
        except ValueError as error:
            wrong = f"{path_as_text(one.name.rpartition('/')[2])} beside it is none ({str(error)[:100]})"
    for one in members:
        name = f"{label}/{path_as_text(one.name)}"
        if one.suffix not in SUFFIXES:
            if one.refused is not None:
                yield Given(name, refused=one.refused)
            continue
        if one.refused is not None or wrong is not None:
            yield Given(name, refused=one.refused or wrong)
            continue
        try:
            yield Given(name, one.data, metadata_text(about))
        except ValueError as error:
            yield Given(name, refused=str(error))


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    kind: bytes


def _members(file: IO[bytes], path: Path) -> Iterator[_Member]:
    whole = path.stat().st_size
    longer: dict[str, str] = {}
    while True:
        at = file.tell()
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ReferenceSetError(f"{path} ends at byte {at} without the end mark of a tar: it is not whole")
        if not block.strip(b"\0"):
            return
        header = _header(block, path, at)
        end = file.tell() + -(-header.size // BLOCK) * BLOCK
        if end > whole:
            raise ReferenceSetError(f"{path} ends within the member at byte {at}: it is not whole")
        if header.kind in (b"x", b"g", b"L", b"K"):
            if header.size > MOST_NAMES:
                raise ReferenceSetError(f"{path} has an extended header of {header.size} bytes at byte {at}")
            longer |= _longer(header.kind, file.read(header.size))
        else:
            if "size" in longer:
                size = longer["size"]
                if not size.isascii() or not size.isdigit() or len(size) > 15:
                    raise ReferenceSetError(f"{path} has a damaged extended header before byte {at}")
                header = replace(header, size=int(size))
                end = at + BLOCK + -(-header.size // BLOCK) * BLOCK
                if end > whole:
                    raise ReferenceSetError(f"{path} ends within the member at byte {at}: it is not whole")
            yield from _member(replace(header, name=longer.get("path", header.name)), file)
            longer = {}
        file.seek(end)


def _member(header: _Header, file: IO[bytes]) -> Iterator[_Member]:
    if header.kind == b"5":
        return
    found = _Member(header.name, b"")
    if header.kind not in (b"0", b"\0", b"7"):
        yield replace(found, refused=f"{TYPES.get(header.kind, 'no file')} in a tar is not followed")
    elif found.suffix in SUFFIXES:
        if header.size > MAX_FILE_BYTES:
            yield replace(found, refused=f"larger than {MAX_FILE_BYTES // 1_000_000} MB")
        else:
            yield replace(found, data=file.read(header.size))
    elif found.suffix in (".json", ".txt"):
        if header.size <= MOST_BESIDE:
            yield replace(found, data=file.read(header.size))
    else:
        yield replace(found, refused=f"the ending {path_as_text(found.suffix)[:20]} is no picture's")


def _header(block: bytes, path: Path, at: int) -> _Header:
    try:
        told = int(block[148:156].strip(b" \0") or b"0", 8)
        size = _number(block[124:136])
    except ValueError as error:
        raise ReferenceSetError(f"{path} is damaged at byte {at}, or no tar: {error}") from error
    sums = sum(block[:148]) + 8 * 32 + sum(block[156:])
    if told != sums:
        raise ReferenceSetError(f"{path} is damaged at byte {at}, or no tar (a compressed one is to be unpacked first)")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _Header(_text(prefix + b"/" + name if prefix else name), size, block[156:157])


def _number(field: bytes) -> int:
    """An octal number, or one in base 256 (GNU), of bytes."""
    if field[0] & 0x80:
        found = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        found = int(field.strip(b" \0") or b"0", 8)
    if not 0 <= found < 1 << 50:
        raise ValueError(f"a member of {found} bytes")
    return found


def _longer(kind: bytes, data: bytes) -> dict[str, str]:
    """What an extended header says of the next member: its path and size."""
    if kind == b"L":
        return {"path": _text(data.partition(b"\0")[0])}
    found: dict[str, str] = {}
    while kind == b"x" and data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or not len(length) < int(length) <= len(data):
            break
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if name in (b"path", b"size"):
            found[name.decode()] = _text(value)
        data = data[int(length) :]
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")[:1000]
