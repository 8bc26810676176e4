"""Pictures of the web: lists of URLs, asked for by the crawlers' session, within its limits."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from audit.config import CrawlSettings
from audit.descriptors.pictures import MAX_FILE_BYTES
from audit.errors import CrawlError, FetchError, ReferenceSetError
from audit.locations import shown_url
from audit.references.inputs.given import Given, Pictures
from audit.references.inputs.metadata import metadata_text
from audit.storable import storable

if TYPE_CHECKING:
    from crawlers.http import Session

SUFFIXES = (".txt", ".csv")
MOST_LINES = 1_000_000
MOST_URL = 2000  # characters
MOST_SECONDS = 300.0  # that a picture may take
COLUMN = "url"


@dataclass(frozen=True)
class Listed:
    """A line of a list: its URL, what else it says, and what is wrong with it."""

    url: str
    about: dict[str, str]
    wrong: str | None = None

    @property
    def name(self) -> str:
        """The URL as it may be shown: what may be secret in it is not."""
        return storable(shown_url(self.url))[:MOST_URL]


def is_urls(path: Path) -> bool:
    """Whether ``path`` is a list of URLs: text whose first line is one, or CSV with a column url."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = next((line for line in islice(file, 1000) if line.strip() and not line.startswith("#")), "")
    if path.suffix.lower() == ".csv":
        return COLUMN in [one.strip().lower() for one in next(csv.reader([first]), [])]
    return first.strip().lower().startswith(("https://", "http://"))


def urls_in(path: Path) -> list[Listed]:
    """The URLs of a list, each once. Raises ReferenceSetError where it cannot be read, is too long, or has none."""
    found: dict[str, Listed] = {}
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for number, about in enumerate(_lines(path, file), start=1):
                url = about.pop(COLUMN, "").strip()
                if number > MOST_LINES:
                    raise ReferenceSetError(f"{path} has more than {MOST_LINES} lines: add it as several sets")
                if url and url not in found:
                    found[url] = Listed(url[: MOST_URL + 1], about, _wrong(url))
    except (OSError, csv.Error) as error:
        raise ReferenceSetError(f"{path} cannot be read: {error}") from error
    if not any(one.wrong is None for one in found.values()):
        raise ReferenceSetError(f"{path} holds no URLs")
    return list(found.values())


def _lines(path: Path, file: Iterator[str]) -> Iterator[dict[str, str]]:
    if path.suffix.lower() == ".csv":
        for row in csv.DictReader(file):
            yield {str(name).strip().lower(): value for name, value in row.items() if isinstance(value, str) and value}
        return
    for line in file:
        if line.strip() and not line.startswith("#"):
            yield {COLUMN: line.strip()}


def _wrong(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is parsed here
    except ValueError:
        return "it is no URL"
    if len(url) > MOST_URL or parts.scheme not in ("https", "http") or not parts.hostname or not url.isprintable():
        return "it is no URL of the web"
    return None


def url_pictures(path: Path, how: CrawlSettings, known: Mapping[str, str] | None = None) -> Pictures:
    """The pictures that a list names; of ``known`` names, with the SHA256 of the file, nothing is asked for again."""
    from crawlers.http import Session

    listed = urls_in(path)
    hosts = {urlsplit(one.url).netloc for one in listed if one.wrong is None}
    session = Session(hosts, None, how.rate, how.allow_private, how.retries, connections=how.downloads)
    return Pictures(str(path), _given(listed, session, how.downloads, known or {}), len(listed))


def _given(listed: list[Listed], session: Session, threads: int, known: Mapping[str, str]) -> Iterator[Given]:
    """In order; the next few are asked for meanwhile."""
    ask = partial(_one, session=session, known=known)
    remaining = iter(listed)
    with ThreadPoolExecutor(threads, thread_name_prefix="urls") as pool:
        waiting = [pool.submit(ask, one) for one in islice(remaining, 2 * threads)]
        try:
            while waiting:
                found = waiting.pop(0).result()
                waiting += [pool.submit(ask, one) for one in islice(remaining, 1)]
                yield found
        finally:
            for future in waiting:
                future.cancel()


def _one(listed: Listed, session: Session, known: Mapping[str, str]) -> Given:
    try:
        metadata = metadata_text({**listed.about, "url": listed.name})
        if listed.wrong is not None:
            raise ValueError(listed.wrong)
        if listed.name in known:
            return Given(listed.name, metadata=metadata, digest=known[listed.name])
        return Given(listed.name, fetched(session, listed.url), metadata)
    except (ValueError, CrawlError, FetchError) as error:
        return Given(listed.name, refused=str(error)[:300])


def fetched(session: Session, url: str) -> bytes:
    """The bytes at ``url``, at most those of a picture. Raises CrawlError, and ValueError for what is too much."""
    from crawlers.http import check_status

    began, found = time.monotonic(), bytearray()
    with session.open(url) as response:
        check_status(response)
        for piece in response.iter_content(1 << 16):
            found += piece
            if len(found) > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES // 1_000_000} MB")
            if time.monotonic() - began > MOST_SECONDS:
                raise ValueError(f"it takes more than {MOST_SECONDS:.0f} s")
    return bytes(found)
