"""The safe opening of pictures from strangers: they are decoded in a child process, within limits.

How, and what is refused, is in ``audit.untrusted.parsers.pictures``; here are its calls. Pictures are decoded ahead of
whoever works on them, so that the boundary costs no time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from audit.untrusted.parsers.pictures import FORMATS as FORMATS
from audit.untrusted.parsers.pictures import HEIF_SUFFIXES as HEIF_SUFFIXES
from audit.untrusted.parsers.pictures import (
    MAX_EXIF_TAGS,
    MAX_FILE_BYTES,
    MAX_METADATA_BYTES,
    MAX_PIXELS,
    MAX_PROFILE_BYTES,
    MAX_SAMPLE_BYTES,
    MAX_SCANNED_PIXELS,
    MAX_SCANS,
    MAX_SIDE,
)
from audit.untrusted.parsers.pictures import SUFFIXES as SUFFIXES
from audit.untrusted.pool import RefusedError, Reply, pool

__all__ = [
    "FORMATS", "HEIF_SUFFIXES", "MAX_EXIF_TAGS", "MAX_FILE_BYTES", "MAX_METADATA_BYTES", "MAX_PIXELS",
    "MAX_PROFILE_BYTES", "MAX_SAMPLE_BYTES", "MAX_SCANNED_PIXELS", "MAX_SCANS", "MAX_SIDE", "SUFFIXES", "ahead",
    "open_image", "opened_ahead", "pixels_of", "read_picture",
]  # fmt: skip
MOST_PIXEL_BYTES = 3 * MAX_PIXELS
AHEAD = 2  # pictures that are decoded while one is worked on
One = TypeVar("One")
Made = TypeVar("Made")


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file. Raises ValueError where it is larger than MAX_FILE_BYTES or cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES // 1_000_000} MB")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"not a readable picture ({error.strerror or error})") from error


def open_image(source: Path | bytes) -> Image.Image:
    """A picture from a stranger as RGB: upright, on white where it is transparent, bounded in bytes and pixels.

    Raises ValueError saying what is wrong with it, and nothing else of the picture's own; BoundaryError where no
    process can be started to decode it in.
    """
    data = read_picture(source) if isinstance(source, Path) else source
    try:
        return _picture(pool().ask("picture", {}, data, most=MOST_PIXEL_BYTES + MAX_PROFILE_BYTES))
    except RefusedError as error:
        named = f"{source.name} is " if isinstance(source, Path) and not error.by_child else ""
        raise ValueError(f"{named}{error}") from error


def _picture(reply: Reply) -> Image.Image:
    answer = reply.answer if isinstance(reply.answer, dict) else {}
    profile = answer.get("profile")
    if type(profile) is not int or not 0 <= profile <= len(reply.data):
        raise RefusedError("refused: what decodes it gives no picture", by_child=False)
    end = len(reply.data) - profile
    picture = pixels_of(answer.get("size"), memoryview(reply.data)[:end])
    if profile:
        picture.info["icc_profile"] = bytes(reply.data[end:])
    return picture


def pixels_of(size: Any, data: memoryview | bytearray) -> Image.Image:
    """The RGB picture of a child's answer. Raises RefusedError where the bytes are not those of its size."""
    fits = isinstance(size, list) and len(size) == 2 and all(type(one) is int and 0 < one <= MAX_SIDE for one in size)
    if not fits or 3 * size[0] * size[1] != len(data):
        raise RefusedError("refused: what decodes it gives no picture", by_child=False)
    return Image.frombytes("RGB", (size[0], size[1]), data)


@dataclass(frozen=True)
class Opened:
    """A file that was opened ahead: its bytes, its picture or why it is none, and the seconds that took."""

    path: Path
    data: bytes
    picture: Image.Image | ValueError
    seconds: float


def _opened(path: Path) -> Opened:
    began = time.monotonic()
    data = b""
    picture: Image.Image | ValueError
    try:
        data = read_picture(path)
        picture = open_image(data)
    except ValueError as error:
        picture = error
    return Opened(path, data, picture, time.monotonic() - began)


def opened_ahead(paths: Iterable[Path]) -> Iterator[Opened]:
    """Each file as ``open_image`` opens it, in order; the next ones are decoded meanwhile."""
    yield from ahead(_opened, paths)


def ahead(make: Callable[[One], Made], of: Iterable[One]) -> Iterator[Made]:
    """What ``make`` gives for each of ``of``, in order, which threads do for the next ones meanwhile."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="pictures") as threads:
        try:
            for one in of:
                waiting.append(threads.submit(make, one))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
