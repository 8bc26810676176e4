"""Pictures made rows of the table of references: decoded, described, hashed and made small, a few at a time."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from audit.descriptors.base import to_png
from audit.descriptors.pdq import pdq_hash
from audit.descriptors.pictures import MAX_FILE_BYTES, ahead, open_image, read_picture
from audit.errors import ReferenceSetError
from audit.evidence.kind import look_of
from audit.faults import reason_of_fault
from audit.references.folder import SkippedImage
from audit.references.inputs.given import Given
from audit.references.parts import LAYOUTS, crops

if TYPE_CHECKING:
    from audit.descriptors import Descriptor

log = logging.getLogger(__name__)
SMALLEST_SIDE = 16  # pixels: below it neither the descriptor nor PDQ says anything
THUMBNAIL = 256
CHUNK = 64  # pictures that are described together; of each no more is kept than that takes
WAITING = 2  # chunks for each process


@dataclass(frozen=True)
class Seen:
    """A picture that is there: the SHA256 of its file, its name, and its metadata as JSON text."""

    digest: str
    name: str
    metadata: str | None


@dataclass
class Described:
    """What came of a chunk: the pictures in it, each file once; ``rows`` of those that had none yet, by the SHA256 of
    the file, without what a set says of all of its pictures; what was passed over; and (name, seconds) of each.
    """

    seen: list[Seen] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[SkippedImage] = field(default_factory=list)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    given: int = 0


@dataclass(frozen=True)
class Wanted:
    """How pictures are described: by which descriptor, its ``source`` as it is loaded, with small pictures or without;
    ``known`` are the SHA256 of files, bytes, that have a row; ``layout`` names the parts that are described as well.
    """

    name: str
    source: str
    thumbnails: bool
    known: Collection[bytes] = frozenset()
    layout: str | None = None


@dataclass(frozen=True)
class _Prepared:
    """All that is kept of a picture: what the descriptor needs, of the whole and then of its parts, and its row without
    the vectors.
    """

    prepared: list[np.ndarray]
    row: dict[str, Any]


@dataclass(frozen=True)
class _Opened:
    given: Given
    digest: str
    picture: Image.Image | ValueError | None  # None: it has a row
    seconds: float


def describe(chunk: list[Given], descriptor: Descriptor, wanted: Wanted) -> Described:
    """What comes of a chunk. Raises what the descriptor raises where it describes none: then it is what fails."""
    found = Described(given=len(chunk))
    fresh: dict[str, _Prepared | Exception] = {}
    names: dict[str, str] = {}
    for opened in ahead(partial(_open, known=wanted.known), chunk):
        name = opened.given.name
        found.seconds.append((name, opened.seconds))
        if isinstance(opened.picture, ValueError):
            found.skipped.append(SkippedImage(name, str(opened.picture)))
            continue
        if opened.digest in names:
            found.skipped.append(SkippedImage(name, f"the same file as {names[opened.digest]}"))
            continue
        names[opened.digest] = name
        if opened.picture is not None:
            fresh[opened.digest] = _prepared(opened.picture, descriptor, wanted)
        found.seen.append(Seen(opened.digest, name, opened.given.metadata))
    found.rows, failed = _vectors(fresh, names, descriptor)
    found.skipped += failed.values()
    found.seen = [one for one in found.seen if one.digest not in failed]
    return found


def _open(given: Given, known: Collection[bytes]) -> _Opened:
    began, digest = time.monotonic(), ""
    picture: Image.Image | ValueError | None = None
    try:
        if given.refused is not None:
            raise ValueError(given.refused)
        if given.digest is not None:
            return _Opened(given, given.digest, None, 0.0)
        data = read_picture(given.source) if isinstance(given.source, Path) else given.source
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES // 1_000_000} MB")
        digest = hashlib.sha256(data).hexdigest()
        if bytes.fromhex(digest) not in known:
            picture = open_image(data)
            if min(picture.size) < SMALLEST_SIDE:
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"{size} pixels are too few: the least is {SMALLEST_SIDE} a side")
    except ValueError as error:
        picture = error
    return _Opened(given, digest, picture, time.monotonic() - began)


def _prepared(picture: Image.Image, descriptor: Descriptor, wanted: Wanted) -> _Prepared | Exception:
    """What to keep of ``picture``, which is made small; the error where that fails."""
    try:
        prepared = [descriptor.prepare(one) for one in (picture, *crops(picture, wanted.layout))]
        packed, quality = pdq_hash(picture)
        width, height = picture.size
        look = look_of(picture)
        if wanted.thumbnails:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return _Prepared(
            prepared,
            {"width": width, "height": height, "pdq": packed, "pdq_quality": quality, "look": look,
             "thumbnail": to_png(picture) if wanted.thumbnails else None, "parts_layout": wanted.layout},
        )  # fmt: skip
    except Exception as error:
        return error


def _vectors(
    fresh: dict[str, _Prepared | Exception], names: dict[str, str], descriptor: Descriptor
) -> tuple[dict[str, dict[str, Any]], dict[str, SkippedImage]]:
    """Rows by SHA256, and why there is none; a picture that cannot be described costs itself."""
    good = {digest: one for digest, one in fresh.items() if isinstance(one, _Prepared)}
    failed = {digest: one for digest, one in fresh.items() if isinstance(one, Exception)}
    vectors: dict[str, np.ndarray] = {}
    if good:
        try:
            described = descriptor.describe_prepared([part for one in good.values() for part in one.prepared])
            vectors = dict(zip(good, described.reshape(len(good), -1, described.shape[1]), strict=True))
        except Exception:
            for digest, one in good.items():
                try:
                    vectors[digest] = descriptor.describe_prepared(one.prepared)
                except Exception as error:
                    failed[digest] = error
    if failed and not vectors:
        raise next(iter(failed.values()))
    passed = {
        digest: SkippedImage(
            names[digest], f"cannot be described ({reason_of_fault(failure, names[digest], log)[:200]})"
        )
        for digest, failure in failed.items()
    }
    rows = {
        digest: {
            "reference_id": digest,
            "name": names[digest],
            **good[digest].row,
            "descriptor": whole,
            "parts": parts.reshape(-1) if len(parts) else None,
        }
        for digest, (whole, *rest) in vectors.items()
        for parts in [np.array(rest)]
    }
    return rows, passed


def at_once(layout: str | None) -> int:
    """How many pictures a chunk has, with their parts."""
    return CHUNK // (1 + len(LAYOUTS[layout])) if layout else CHUNK


# Several processes


_mine: tuple[Descriptor, Wanted] | None = None


def described(
    chunks: Iterable[list[Given]], descriptor: Descriptor, wanted: Wanted, workers: int = 1
) -> Iterator[Described]:
    """What comes of each chunk, in order; by this process, or by several, each of one thread, that load the descriptor
    themselves. Raises ReferenceSetError where one of them ends: what was given back before is not lost.
    """
    if workers <= 1:
        for chunk in chunks:
            yield describe(chunk, descriptor, wanted)
        return
    waiting: deque[Future[Described]] = deque()
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(wanted,)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_describe, chunk))
                if len(waiting) > WAITING * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ReferenceSetError(
                "a process that describes pictures has ended before its time, for lack of memory perhaps: the same "
                "command goes on where it was; give it fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(wanted: Wanted) -> None:
    global _mine
    import torch

    from audit.descriptors import load_descriptor

    torch.set_num_threads(1)
    descriptor = load_descriptor(wanted.source, "cpu")
    if descriptor.name != wanted.name:
        raise ReferenceSetError(f"the descriptor {wanted.source} is {descriptor.name} now, and was {wanted.name}")
    _mine = descriptor, wanted


def _describe(chunk: list[Given]) -> Described:
    if _mine is None:
        raise ReferenceSetError("a process that describes pictures has no descriptor")
    return describe(chunk, *_mine)
