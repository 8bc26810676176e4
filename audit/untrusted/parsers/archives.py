"""Training sets as zip archives: which members are pictures, and one of them at a time, decoded."""

from __future__ import annotations

import os
import zipfile
from typing import Any

from audit.untrusted.child import Item, RefusedError
from audit.untrusted.parsers.pictures import decode, write_pixels

_SMALL = 1 << 20  # bytes that a bomb is not worth
_MAX_TEXT_BYTES = 100_000
_opened: dict[str, zipfile.ZipFile] = {}  # the last archive, by the parent's name of it: its directory is read once


def members(item: Item) -> list[list[int | None]]:
    """(number of a picture, number of its text or None), by name. Limits: ``members``, and ``endings`` of pictures."""
    archive = _archive(item)
    files = [(number, one) for number, one in enumerate(archive.infolist()) if not one.is_dir()]
    most = item.said["members"]
    if len(files) > most:
        raise RefusedError(f"the training set holds {len(files)} files, at most {most} are read")
    texts = {one.filename.rpartition(".")[0]: number for number, one in files if one.filename.lower().endswith(".txt")}
    endings = tuple(item.said["endings"])
    return [
        [number, texts.get(one.filename.rpartition(".")[0])]
        for number, one in sorted(files, key=lambda pair: pair[1].filename)
        if one.filename.lower().endswith(endings)
    ]


def member(item: Item) -> dict[str, Any]:
    """One picture's unpacked bytes (number), size and caption, its pixels beside it; no size where it is none.

    Limits: ``bytes`` of a picture, ``ratio`` of unpacked to packed, ``left`` of unpacked bytes.
    """
    archive, said = _archive(item), item.said
    data = _read(archive, said["number"], said["bytes"], said["ratio"])
    if len(data) > said["left"]:
        raise RefusedError(f"the training set unpacks to more than {said['unpacked'] >> 30} GiB")
    answer: dict[str, Any] = {"unpacked": len(data), "size": None, "caption": ""}
    try:
        picture = decode(data)
    except ValueError:
        return answer
    if said["text"] is not None:
        text = _read(archive, said["text"], _MAX_TEXT_BYTES, said["ratio"])
        answer["caption"] = text.decode("utf-8", "replace")
    write_pixels(picture, item)
    return {**answer, "size": list(picture.size)}


def _archive(item: Item) -> zipfile.ZipFile:
    key = item.said["key"]
    if key not in _opened:
        for archive in _opened.values():
            archive.close()
        _opened.clear()
        try:
            _opened[key] = zipfile.ZipFile(os.fdopen(os.dup(item.files[0].fileno()), "rb"))
        except MemoryError:
            raise
        except Exception as error:  # decompressors raise anything on damaged archives
            raise RefusedError(_unreadable(error)) from error
    return _opened[key]


def _read(archive: zipfile.ZipFile, number: int, limit: int, ratio: int) -> bytes:
    """A member's bytes; its declared size is not believed."""
    info = archive.infolist()[number]
    try:
        with archive.open(info) as file:
            data = file.read(limit + 1)
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedError(_unreadable(error)) from error
    if len(data) > limit or (len(data) > _SMALL and len(data) > ratio * max(1, info.compress_size)):
        raise RefusedError("the training set holds a file that unpacks to far more than it should")
    return data


def _unreadable(error: Exception) -> str:
    return f"the training set is no readable zip ({str(error)[:100]})"


PARSERS = {"members": members, "member": member}
