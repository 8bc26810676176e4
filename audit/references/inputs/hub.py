"""Data sets of the Hugging Face Hub, at a commit: their Parquet files, tars and pictures, one file after the other."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from audit.config import CrawlSettings
from audit.descriptors.pictures import SUFFIXES
from audit.errors import CrawlError, FetchError, ReferenceSetError
from audit.references.folder import SkippedImage
from audit.references.inputs import parquet, tars, web
from audit.references.inputs.given import Given, Pictures
from audit.references.inputs.metadata import metadata_text
from audit.storable import path_as_text

if TYPE_CHECKING:
    from crawlers.http import Session

NAMED = re.compile(r"hf:(?:datasets/)?([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})@([^:]+)(?::(.{1,500}))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_FILES = 200_000
MOST_BYTES = 16 << 30  # of a file, which is on the disk while it is read


@dataclass(frozen=True)
class DataSet:
    """A data set at a commit, and the folder or file of it that is meant ("" for all)."""

    name: str
    commit: str
    below: str


def named(text: str) -> DataSet | None:
    """What "hf:owner/name@COMMIT" or "hf:owner/name@COMMIT:folder" names; None for other texts.

    Raises ReferenceSetError where no commit is given: another revision can be another data set tomorrow.
    """
    if not text.startswith("hf:"):
        return None
    found = NAMED.fullmatch(text)
    if found is None or not COMMIT.fullmatch(found[2]):
        raise ReferenceSetError(
            f"{text[:200]!r} names no data set at a commit: write hf:owner/name@COMMIT, 40 hex digits"
        )
    return DataSet(found[1], found[2], (found[3] or "").strip("/"))


def hub_pictures(data: DataSet, how: CrawlSettings, known: Mapping[str, str] | None = None) -> Pictures:
    """The pictures of a data set. Raises ReferenceSetError where it cannot be had, or holds none."""
    from crawlers.http import Session, read_token

    host = urlsplit(how.hub_endpoint).netloc
    token = read_token("HF_TOKEN", how.token_file)
    session = Session([host], token, how.rate, how.allow_private, how.retries, connections=how.downloads)
    label = f"hf:{data.name}@{data.commit}"
    try:
        url = f"{how.hub_endpoint}/api/datasets/{quote(data.name)}/revision/{data.commit}"
        files = _files(session.get_json(url), data, label)
    except (CrawlError, FetchError) as error:
        raise ReferenceSetError(f"{label} cannot be had: {error}") from error
    taken = [one for one in files if _is_taken(one)]
    if not taken:
        where = f" below {data.below}" if data.below else ""
        raise ReferenceSetError(f"{label} holds no pictures, Parquet files or tars{where}")
    passed = [
        SkippedImage(path_as_text(one), f"the ending {PurePosixPath(one).suffix} is no picture's")
        for one in files
        if not _is_taken(one)
    ]
    base = f"{how.hub_endpoint}/datasets/{quote(data.name)}/resolve/{data.commit}"
    return Pictures(label, _given(session, base, taken, known or {}), None, passed)


def _files(answer: Any, data: DataSet, label: str) -> list[str]:
    """The paths of the files, sorted."""
    if not isinstance(answer, dict) or answer.get("sha") != data.commit or not isinstance(answer.get("siblings"), list):
        raise ReferenceSetError(f"{label}: the hub answers for another commit")
    names = [one.get("rfilename") for one in answer["siblings"] if isinstance(one, dict)]
    if len(names) > MOST_FILES:
        raise ReferenceSetError(f"{label} has {len(names)} files: name a folder of it, hf:owner/name@COMMIT:folder")
    below = data.below
    return sorted(
        one for one in names
        if isinstance(one, str) and one.isprintable() and not {"", ".", ".."} & set(one.split("/"))
        and (not below or one == below or one.startswith(f"{below}/"))
    )  # fmt: skip


def _is_taken(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in {".parquet", ".tar", *SUFFIXES}


def _given(session: Session, base: str, files: list[str], known: Mapping[str, str]) -> Iterator[Given]:
    for name in files:
        label, url = path_as_text(name), f"{base}/{quote(name)}"
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            about = metadata_text({"file": label})
            try:
                if label in known:
                    yield Given(label, metadata=about, digest=known[label])
                else:
                    yield Given(label, web.fetched(session, url), about)
            except (CrawlError, FetchError, ValueError) as error:
                yield Given(label, refused=str(error)[:300])
            continue
        folder = f"{PurePosixPath(label).parent}/" if "/" in label else ""
        with tempfile.TemporaryDirectory(prefix="lora-audit-") as place:
            path = Path(place) / PurePosixPath(name).name
            _download(session, url, path)
            yield from (
                tars.given_in(path, folder)
                if path.suffix.lower() == ".tar"
                else parquet.parquet_pictures(path, prefix=folder).given
            )


def _download(session: Session, url: str, path: Path) -> None:
    """Raises ReferenceSetError: a data set without one of its files is not that data set."""
    from crawlers.http import check_status, shown

    held = 0
    try:
        with session.open(url) as response, path.open("wb") as file:
            check_status(response)
            for piece in response.iter_content(1 << 20):
                held += len(piece)
                if held > MOST_BYTES:
                    raise ReferenceSetError(f"{shown(url)} has more than {MOST_BYTES >> 30} GiB")
                file.write(piece)
    except (CrawlError, FetchError, OSError) as error:
        raise ReferenceSetError(f"{shown(url)} cannot be had: {error}; the same command goes on") from error
