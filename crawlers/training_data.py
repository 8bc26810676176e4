"""The uploader's own training set, where the source has it: the answer key for an audit of that checkpoint.

The archive is a zip from a stranger. Nothing in it names a path here: pictures are read one by one within bounds,
decoded in a child process, and written again as PNG under a number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from audit.claims.captions import clean_text
from audit.descriptors.base import to_png
from audit.descriptors.pictures import MOST_PIXEL_BYTES, SUFFIXES, pixels_of
from audit.errors import FetchError
from audit.files import Files
from audit.states import ItemState
from audit.untrusted.pool import RefusedError, Reply, pool
from audit.workspace import Workspace
from crawlers.http import Session, check_status, shown
from crawlers.items import Item

log = logging.getLogger(__name__)
MAX_ARCHIVE_BYTES = 1024**3
MAX_MEMBERS = 5000
MAX_PICTURES = 1000
MAX_PICTURE_BYTES = 50 * 1024**2
MAX_UNPACKED_BYTES = 4 * 1024**3
MAX_RATIO = 200  # unpacked to packed; pictures hardly compress at all
MAX_SET_PIXELS = 4_000_000_000  # of all its pictures together
MAX_SET_SECONDS = 1800  # to read all its pictures
MAX_CAPTION_TEXT = 100_000
PICTURES = tuple(sorted(SUFFIXES))


@dataclass(frozen=True)
class GroundTruth:
    """A training set: its folder in ``ground-truth/``, how many pictures it has, and their captions, each once."""

    folder: str
    pictures: int
    captions: tuple[str, ...]


def fetch_ground_truth(workspace: Workspace, session: Session, item: Item) -> GroundTruth:
    """Download and unpack the training set of ``item``, unless it is there.

    Raises FetchError where it is no zip of pictures within the bounds.
    """
    assert item.ground_truth_url is not None
    key = hashlib.sha256(json.dumps([item.source, item.model_id, item.version_id]).encode()).hexdigest()[:32]
    folder = f"ground-truth/{key}"
    known = workspace.files.read(f"{folder}/source.json")
    if known is not None:
        return _ground_truth(key, json.loads(known)["pictures"])
    with tempfile.TemporaryFile() as archive:
        _download(session, item.ground_truth_url, archive)
        pictures = unpack(archive, workspace.files, folder)
    said = {"item_id": item.item_id, "license": item.license, "pictures": pictures}
    workspace.files.write(f"{folder}/source.json", json.dumps(said).encode())  # written last: the folder is complete
    return _ground_truth(key, pictures)


def _ground_truth(key: str, pictures: list[dict[str, str]]) -> GroundTruth:
    captions = dict.fromkeys(picture["caption"] for picture in pictures if picture["caption"])
    return GroundTruth(key, len(pictures), tuple(captions)[:100])


def _download(session: Session, url: str, to: IO[bytes]) -> None:
    with session.open(url, headers={"Accept-Encoding": "identity"}) as response:
        check_status(response)
        if "text/html" in response.headers.get("Content-Type", ""):
            raise FetchError(
                f"{shown(response.url)} answers with a web page instead of the training set", ItemState.failed
            )
        size = 0
        for piece in response.iter_content(1 << 20):
            size += len(piece)
            if size > MAX_ARCHIVE_BYTES:
                raise FetchError(f"the training set is larger than {MAX_ARCHIVE_BYTES >> 20} MiB", ItemState.refused)
            to.write(piece)


def unpack(archive: IO[bytes], files: Files, folder: str) -> list[dict[str, str]]:
    """Write the pictures of a zip to ``folder`` as 0001.png and so on; each with its caption, where a .txt has it.

    The zip is read and its pictures are decoded in child processes. Raises FetchError for what is no zip, is encrypted,
    exceeds a bound, or holds no picture.
    """
    with ExitStack() as stack:
        try:
            archive.fileno()
        except OSError:  # in memory: a child is given a file
            held = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(archive, held)
            archive = held
        archive.flush()  # the child reads the file, not what is still to be written to it
        return _Unpacking(archive, files, folder).all()


class _Unpacking:
    """One training set on its way, with what it has taken so far."""

    def __init__(self, archive: IO[bytes], files: Files, folder: str) -> None:
        self.archive, self.files, self.folder = archive, files, folder
        self.key = secrets.token_hex(16)  # by which a child knows the archive that it has open
        self.left, self.pixels, self.seconds = MAX_UNPACKED_BYTES, 0, 0.0
        self.found: list[dict[str, str]] = []

    def all(self) -> list[dict[str, str]]:
        """The pictures, written. Raises FetchError."""
        try:
            reply = self._ask("members", members=MAX_MEMBERS, endings=list(PICTURES))
        except RefusedError as error:
            raise _refused(error) from None
        for number, text in _numbers(reply.answer):
            if len(self.found) == MAX_PICTURES:
                raise FetchError(f"the training set holds more than {MAX_PICTURES} pictures", ItemState.refused)
            self._one(number, text)
        if not self.found:
            raise FetchError("the training set holds no picture that can be read", ItemState.refused)
        return self.found

    def _one(self, number: int, text: int | None) -> None:
        limits = {"bytes": MAX_PICTURE_BYTES, "ratio": MAX_RATIO, "left": self.left, "unpacked": MAX_UNPACKED_BYTES}
        began = time.monotonic()
        try:
            reply = self._ask("member", number=number, text=text, **limits)
        except RefusedError as error:
            if error.by_child:
                raise _refused(error) from None
            log.warning("a picture of the training set is passed over: %s", error)
            return
        finally:
            self._count_seconds(time.monotonic() - began)
        size, caption = self._checked(reply.answer)
        if size is None:
            return
        picture = pixels_of(size, reply.data)
        self.pixels += picture.width * picture.height
        if self.pixels > MAX_SET_PIXELS:
            raise FetchError(f"the training set has more than {MAX_SET_PIXELS // 10**6} megapixels", ItemState.refused)
        name = f"{len(self.found) + 1:04d}.png"
        self.files.write(f"{self.folder}/{name}", to_png(picture))
        self.found.append({"file": name, "caption": clean_text(caption)})

    def _ask(self, parser: str, **said: Any) -> Reply:
        return pool().ask(parser, {"key": self.key, **said}, files=[self.archive], most=MOST_PIXEL_BYTES)

    def _count_seconds(self, seconds: float) -> None:
        self.seconds += seconds
        if self.seconds > MAX_SET_SECONDS:
            raise FetchError(f"the training set takes more than {MAX_SET_SECONDS} s to read", ItemState.refused)

    def _checked(self, answer: Any) -> tuple[list[int] | None, str]:
        """Size and caption of a child's answer; its unpacked bytes are counted. Raises FetchError where it is none."""
        unpacked = answer.get("unpacked") if isinstance(answer, dict) else None
        if type(unpacked) is not int or not 0 <= unpacked <= self.left or not isinstance(answer.get("caption"), str):
            raise FetchError("the training set is refused: what parses it gives no picture", ItemState.refused)
        self.left -= unpacked
        return answer.get("size"), answer["caption"][:MAX_CAPTION_TEXT]


def _numbers(answer: Any) -> list[tuple[int, int | None]]:
    """(number of a picture, number of its text) of a child's answer. Raises FetchError where it is none."""
    try:
        found = [(picture, text) for picture, text in answer]
    except (TypeError, ValueError):
        found = [(-1, None)]
    if len(found) > MAX_MEMBERS or not all(
        type(picture) is int and picture >= 0 and (text is None or type(text) is int) for picture, text in found
    ):
        raise FetchError("the training set is refused: what parses it gives no list of files", ItemState.refused)
    return found


def _refused(error: RefusedError) -> FetchError:
    return FetchError(str(error) if error.by_child else f"the training set is {error}", ItemState.refused)
