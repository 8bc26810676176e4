"""Where a workspace or a folder of uploads is: a path, or ``s3://KEY:SECRET@bucket/prefix?option=value``."""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SCHEME = "s3://"
_WORDS = re.compile(r"[^\s'\"<>]+")
_URL = re.compile(r"(?i:https?)://\S+")
_PORT = re.compile(r"\d{1,5}(?:[/?#]|$)")


@dataclass(frozen=True)
class S3Location:
    """The parts of a URL of object storage. ``bucket`` is empty where it names none; secrets are never printed."""

    bucket: str
    prefix: str
    key: str | None = field(repr=False)
    secret: str | None = field(repr=False)
    options: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """``bucket/prefix``."""
        return f"{self.bucket}{self.prefix}".rstrip("/")


def is_remote(location: str) -> bool:
    """Whether ``location`` is a URL of object storage."""
    return location[: len(SCHEME)].lower() == SCHEME


def parse_s3(location: str) -> S3Location:
    """The parts of a URL of object storage.

    A secret may hold "/" as it is, as those of AWS do, but "@" only as %40: the first "@" ends the credentials. A
    colon in its first part begins a secret, since no bucket's name has one.
    """
    rest = location[len(SCHEME) :]
    key, secret = None, None
    first = re.split(r"[/?#@]", rest, maxsplit=1)[0]
    if ":" in first or rest.startswith(f"{first}@"):
        credentials, _, rest = rest.partition("@")  # without "@" there is a secret and no bucket
        name, _, hidden = credentials.partition(":")
        key, secret = unquote(name) or None, unquote(hidden)
    parts = urlsplit("//" + rest)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    return S3Location(parts.netloc, parts.path, key, secret, options)


def without_credentials(text: str) -> str:
    """``text`` whose URLs have neither user nor password."""
    return _WORDS.sub(lambda one: _bare(one[0]), text) if "@" in text else text


def _bare(word: str) -> str:
    """``word`` without what stands before "@" in its URLs: up to the path, or with a secret that has "/" in it.

    Such a secret is told from a port by what stands behind the colon. Every part is looked at once. Of a URL that was
    taken for the path of a file, one slash is left.
    """
    if "@" not in word or ":/" not in word:
        return word
    found: list[str] = []
    ats = [one.start() for one in re.finditer("@", word)]
    place = 0
    while (scheme := word.find(":/", place)) >= 0:
        begun = scheme + (3 if word.startswith("://", scheme) else 2)
        found.append(word[place:begun])
        place = begun
        following = bisect.bisect_left(ats, place)
        if following == len(ats):
            break
        at = ats[following]
        end = at
        for mark in "/?#":  # the first one ends before the next ":/", so that nothing is looked at often
            end = found_at if (found_at := word.find(mark, place, end)) >= 0 else end
        colon = word.find(":", place, end)
        if end == at or (colon >= 0 and not _PORT.match(word, colon + 1, at)):
            place = at + 1
    return "".join(found) + word[place:]


def shown_url(text: str) -> str:
    """A URL of the web without user, password and fragment, and with a hash for its query, which may sign it.

    What is none is only without credentials.
    """
    if not _URL.fullmatch(text):
        return without_credentials(text)
    place, _, query = text.partition("#")[0].partition("?")
    told = f"?{hashlib.sha256(query.encode(errors='replace')).hexdigest()[:12]}" if query else ""
    return without_credentials(place) + told


def shown_urls(value: Any) -> Any:
    """``value`` with every text in it, also within lists and tables, as ``shown_url`` shows it."""
    return _texts(shown_url, value)


def plain_without_credentials(value: Any) -> Any:
    """``value`` with every text in it, also within lists and tables, without the credentials of URLs."""
    return _texts(without_credentials, value)


def _texts(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_texts(change, one) for one in value)
    if isinstance(value, dict):
        return {_texts(change, name): _texts(change, one) for name, one in value.items()}
    return value


def shown(location: str) -> str:
    """A location without credentials and options, for messages and tables."""
    if not is_remote(location):
        return location
    try:
        parts = parse_s3(location)
    except ValueError:  # of a host in brackets that is none
        return f"{SCHEME}..."
    return f"{SCHEME}{parts.bucket}{parts.prefix}"
