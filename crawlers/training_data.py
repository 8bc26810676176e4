"""The uploader's own training set, where the source has it: the answer key for an audit of that checkpoint.

The archive is a zip from a stranger. Nothing in it names a path here: pictures are read one by one within bounds,
decoded, and written again as PNG under a number.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from dataclasses import dataclass
from typing import IO

from audit.descriptors import open_image
from audit.descriptors.base import to_png
from audit.descriptors.pictures import SUFFIXES
from audit.errors import AuditError, FetchError
from audit.extraction.captions import clean_text
from audit.files import Files
from audit.storage import Workspace
from crawlers.http import Session, check_status, shown
from crawlers.items import Item

MAX_ARCHIVE_BYTES = 1024**3
MAX_MEMBERS = 5000
MAX_PICTURES = 1000
MAX_PICTURE_BYTES = 50 * 1024**2
MAX_UNPACKED_BYTES = 4 * 1024**3
MAX_RATIO = 200  # unpacked to packed; pictures hardly compress at all
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
            raise FetchError(f"{shown(response.url)} answers with a web page instead of the training set", "failed")
        size = 0
        for piece in response.iter_content(1 << 20):
            size += len(piece)
            if size > MAX_ARCHIVE_BYTES:
                raise FetchError(f"the training set is larger than {MAX_ARCHIVE_BYTES >> 20} MiB", "refused")
            to.write(piece)


def unpack(archive: IO[bytes], files: Files, folder: str) -> list[dict[str, str]]:
    """Write the pictures of a zip to ``folder`` as 0001.png and so on; each with its caption, where a .txt has it.

    Raises FetchError for what is no zip, is encrypted, exceeds a bound, or holds no picture.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            return _unpack(opened, files, folder)
    except AuditError:
        raise
    except Exception as error:  # decompressors raise anything on damaged archives
        raise FetchError(f"the training set is no readable zip ({str(error)[:100]})", "refused") from error


def _unpack(opened: zipfile.ZipFile, files: Files, folder: str) -> list[dict[str, str]]:
    members = [one for one in opened.infolist() if not one.is_dir()]
    if len(members) > MAX_MEMBERS:
        raise FetchError(f"the training set holds {len(members)} files, at most {MAX_MEMBERS} are read", "refused")
    texts = {one.filename.rpartition(".")[0]: one for one in members if one.filename.lower().endswith(".txt")}
    left = MAX_UNPACKED_BYTES
    found: list[dict[str, str]] = []
    for member in sorted(members, key=lambda one: one.filename):
        if not member.filename.lower().endswith(PICTURES):
            continue
        if len(found) == MAX_PICTURES:
            raise FetchError(f"the training set holds more than {MAX_PICTURES} pictures", "refused")
        data = _read(opened, member, MAX_PICTURE_BYTES)
        left -= len(data)
        if left < 0:
            raise FetchError(f"the training set unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB", "refused")
        try:
            picture = open_image(data)
        except ValueError:
            continue
        number = f"{len(found) + 1:04d}.png"
        files.write(f"{folder}/{number}", to_png(picture))
        text = texts.get(member.filename.rpartition(".")[0])
        caption = _read(opened, text, 100_000).decode("utf-8", "replace") if text else ""
        found.append({"file": number, "caption": clean_text(caption)})
    if not found:
        raise FetchError("the training set holds no picture that can be read", "refused")
    return found


def _read(opened: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """A member's bytes; its declared size is not believed. Raises FetchError over the limit or for a bomb."""
    with opened.open(member) as file:
        data = file.read(limit + 1)
    if len(data) > limit or (len(data) > 1 << 20 and len(data) > MAX_RATIO * max(1, member.compress_size)):
        raise FetchError("the training set holds a file that unpacks to far more than it should", "refused")
    return data
