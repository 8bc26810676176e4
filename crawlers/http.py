"""The one HTTP session of the crawlers: bounded, polite, and careful with tokens and addresses.

Retries are urllib3's, connection reuse and redirects are requests'; what is added here is a rate limit a host, the
RateLimit headers (IETF draft-ietf-httpapi-ratelimit-headers), which hosts and addresses may be talked to, and caps.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.response import BaseHTTPResponse
from urllib3.util.retry import Retry

from audit.errors import BrokeOffError, CrawlError, FetchError
from audit.states import ItemState
from audit.untrusted.wire import check_values
from crawlers.addresses import check_address as check_address
from crawlers.addresses import check_url as check_url
from crawlers.addresses import is_loopback, public_only
from crawlers.addresses import shown as shown
from crawlers.items import time_of
from crawlers.pauses import check_pause

log = logging.getLogger(__name__)
USER_AGENT = f"lora-audit/{version('lora-audit')} (audit of training images; +https://arxiv.org/abs/2410.03039)"
MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_JSON_VALUES = 4_000_000
MAX_WAIT = 300.0  # s; no header of a server makes us wait longer
BACKOFF = (1.0, 30.0)  # s; the first and the longest wait after 429, 5xx and connection errors
RETRIED = frozenset({429, 500, 502, 503, 504, 520, 522, 524})


@dataclass(frozen=True)
class Token:
    """A bearer token that cannot be printed by accident."""

    value: str = field(repr=False)

    def __str__(self) -> str:
        return "<token>"


def read_token(variable: str, file: Path | None) -> Token | None:
    """The token in ``file``, else in the environment ``variable``, else None.

    Raises CrawlError where the file cannot be read, or others than its owner can read it.
    """
    if file is not None:
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & 0o077:
                raise CrawlError(f"{file} can be read by others (mode {mode:04o}): run 'chmod 600 {file}'")
            with file.open() as opened:
                text = opened.read(4096).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CrawlError(f"the token file {file} cannot be read: {error}") from error
    else:
        text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[\x21-\x7e]{1,1000}", text):
        raise CrawlError(f"{file or variable} does not hold a token: one line of printable characters without spaces")
    return Token(text)


class RateLimit:
    """At most ``per_second`` requests a second to a host, and pauses that the host asks for. Safe between threads."""

    def __init__(self, per_second: float) -> None:
        self.interval = 1 / per_second if per_second > 0 else 0.0
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def wait(self, host: str) -> None:
        """Sleep until the next request to ``host`` is due."""
        with self._lock:
            now = time.monotonic()
            due = max(now, self._next.get(host, 0.0))
            self._next[host] = due + self.interval
        if due > now:
            time.sleep(due - now)

    def note(self, host: str, headers: Mapping[str, str]) -> None:
        """Hold requests to ``host`` back where its headers say that none are left."""
        pause = pause_asked(headers)
        if pause > 0:
            with self._lock:
                self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + pause)


def pause_asked(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the RateLimit headers, 0 where requests are left; at most MAX_WAIT.

    Both forms of the IETF draft are read (``"api";r=0;t=12`` and ``limit=10, remaining=0, reset=12``), and the older
    RateLimit-Remaining / -Reset with or without X-.
    """
    text = headers.get("RateLimit", "")
    left = re.search(r"\b(?:r|remaining)=(\d{1,9})\b", text)
    reset = re.search(r"\b(?:t|reset)=(\d{1,12})\b", text)
    found = [(left.group(1), reset.group(1))] if left and reset else []
    for prefix in ("", "X-"):
        pair = headers.get(f"{prefix}RateLimit-Remaining", ""), headers.get(f"{prefix}RateLimit-Reset", "")
        if all(re.fullmatch(r"\d{1,12}", part) for part in pair):
            found.append(pair)
    waits = [float(reset) for left, reset in found if int(left) == 0]
    waits = [wait - time.time() if wait > 1e9 else wait for wait in waits]  # some give the time of day instead
    return min(MAX_WAIT, max([0.0, *waits]))


class PatientRetry(Retry):
    """Waits from BACKOFF[0] to BACKOFF[1] seconds with jitter, or what Retry-After says, bounded."""

    RETRY_AFTER_STATUS_CODES = frozenset({429, 503})
    unit = BACKOFF[0]

    def get_backoff_time(self) -> float:
        """Seconds before the next try."""
        errors = len([one for one in self.history if one.redirect_location is None])
        return min(BACKOFF[1], self.unit * 2 ** max(0, errors - 1) * random.uniform(1, 2))

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        """What the response asks for, at most MAX_WAIT."""
        try:
            wait = super().get_retry_after(response)
        except Exception:  # urllib3's InvalidHeader: a date or number that is none
            return None
        return None if wait is None else min(MAX_WAIT, wait)


class _Adapter(HTTPAdapter):
    """Applies the rate limit, and checks scheme and peer address of every hop, redirects included."""

    def __init__(
        self, limit: RateLimit, allow_private: bool, retry: Retry, connections: int, count: Callable[[int], None]
    ) -> None:
        self.limit, self.allow_private, self.count = limit, allow_private, count
        super().__init__(max_retries=retry, pool_connections=16, pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        if not self.allow_private:
            pools = {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}
            self.poolmanager.pool_classes_by_scheme = {scheme: public_only(pool) for scheme, pool in pools.items()}

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        url = request.url or ""
        check_url(url)
        host = urlsplit(url).netloc
        self.limit.wait(host)
        try:
            response = super().send(request, *args, **options)
        except (requests.RequestException, CrawlError):
            self.count(0)
            raise
        self.count(response.status_code)
        log.debug("%s %s: HTTP %d", request.method, shown(url), response.status_code)
        self.limit.note(host, response.headers)
        return response


class _Requests(requests.Session):
    """Keeps the token where a redirect leads to another of ``hosts`` on the same scheme, and drops it elsewhere."""

    def __init__(self, hosts: frozenset[str]) -> None:
        super().__init__()
        self.hosts = hosts

    def should_strip_auth(self, old_url: str, new_url: str) -> bool:
        old, new = urlsplit(old_url), urlsplit(new_url)
        if old.scheme == new.scheme and {old.netloc, new.netloc} <= self.hosts:
            return False
        return super().should_strip_auth(old_url, new_url)


class Session:
    """HTTP for one source. ``hosts`` (host or host:port) are the only ones asked; their redirects may lead elsewhere.

    The token goes to those hosts alone, in a header; it is dropped where a redirect leads to any other. Proxies and
    netrc of the environment are not used. ``count`` hears of the last status of every request, 0 for no answer. Safe
    between threads.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        token: Token | None = None,
        requests_per_second: float = 2.0,
        allow_private: bool = False,
        retries: int = 6,
        timeout: tuple[float, float] = (10.0, 60.0),
        connections: int = 8,
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.hosts = frozenset(hosts)
        self.timeout = timeout
        self.limit = RateLimit(requests_per_second)
        self.requests = 0
        self._count = threading.Lock()
        private = allow_private or all(is_loopback(urlsplit(f"//{host}").hostname) for host in self.hosts)
        retry = PatientRetry(
            total=retries, redirect=False, status_forcelist=RETRIED, allowed_methods=None, raise_on_status=False
        )
        self._session = _Requests(self.hosts)
        self._session.trust_env = False
        self._session.max_redirects = 5
        self._session.headers["User-Agent"] = USER_AGENT
        adapter = _Adapter(self.limit, private, retry, connections, count)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)
        self._authorization = {"Authorization": f"Bearer {token.value}"} if token else {}

    @contextmanager
    def open(
        self, url: str, params: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None,
        method: str = "GET", json_body: Any = None, form: Mapping[str, Any] | None = None,
    ) -> Iterator[requests.Response]:  # fmt: skip
        """A streamed response of any status. Raises FetchError for hosts that may not be asked or do not answer."""
        try:
            host = urlsplit(url).netloc
        except ValueError:
            host = ""
        if host not in self.hosts:
            raise FetchError(f"refused {shown(url)}: not a host of this source", ItemState.refused)
        with self._count:
            self.requests += 1
        try:
            response = self._session.request(
                method, url, params=params, headers={**self._authorization, **(headers or {})}, json=json_body,
                data=form, stream=True, timeout=self.timeout,
            )  # fmt: skip
        except CrawlError as error:
            raise FetchError(str(error), ItemState.refused) from error
        except requests.TooManyRedirects:
            raise FetchError(f"{shown(url)} redirects without end") from None
        except (requests.RequestException, ValueError) as error:  # ValueError: a redirect to what is no URL
            raise FetchError(f"{shown(url)} does not answer ({_cause(error)})") from None
        with response:
            try:
                yield response
            except (requests.RequestException, OSError) as error:
                raise BrokeOffError(f"{shown(url)} broke off ({_cause(error)})") from None

    def get_bytes(self, url: str, most: int) -> bytes:
        """The small document at ``url``. Raises FetchError; its state is "refused" for more than ``most`` bytes."""
        with self.open(url, headers={"Accept-Encoding": "identity"}) as response:
            check_status(response)
            body = bytearray()
            for chunk in response.iter_content(1 << 16):
                body += chunk
                if len(body) > most:
                    raise FetchError(f"{shown(url)} answers more than {most} bytes", ItemState.refused)
        return bytes(body)

    def get_json(self, url: str, params: Mapping[str, Any] | None = None, json_body: Any = None) -> Any:
        """The JSON document at ``url``, of at most MAX_JSON_BYTES; asked again twice where the answer breaks off.

        Raises FetchError; its state is "gone" for 404 and 410.
        """
        return self.get_page(url, params, json_body)[0]

    def get_page(
        self, url: str, params: Mapping[str, Any] | None = None, json_body: Any = None,
        form: Mapping[str, Any] | None = None, check: Callable[[requests.Response], None] | None = None,
    ) -> tuple[Any, str | None]:  # fmt: skip
        """As ``get_json``, with the page that the answer's Link header names as the next; ``check`` refuses answers."""
        for last in (False, False, True):
            try:
                return self._get_page(url, params, json_body, form, check or check_status)
            except BrokeOffError:
                if last:
                    raise
        raise AssertionError("unreachable")

    def _get_page(
        self, url: str, params: Mapping[str, Any] | None, json_body: Any, form: Mapping[str, Any] | None,
        check: Callable[[requests.Response], None],
    ) -> tuple[Any, str | None]:  # fmt: skip
        method = "GET" if json_body is None and form is None else "POST"
        with self.open(url, params, {"Accept": "application/json"}, method, json_body, form) as response:
            check(response)
            following = response.links.get("next", {}).get("url")
            body = bytearray()
            for chunk in response.iter_content(1 << 16):
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise FetchError(
                        f"{shown(url)} answers more than {MAX_JSON_BYTES >> 20} MiB of JSON", ItemState.refused
                    )
        try:
            check_values(body, MAX_JSON_VALUES)
            return json.loads(body), urljoin(url, following) if following else None
        except (ValueError, RecursionError) as error:
            raise FetchError(f"{shown(url)} answers no JSON ({str(error)[:80]})") from None


def is_of_the_request(error: FetchError) -> bool:
    """Whether the source answers, but not this (400, or an error of its own that all retries have met)."""
    return error.status == 400 or (error.status or 0) >= 500


def check_status(response: requests.Response) -> None:
    """Raise FetchError for a status of 400 and more, with what the status means."""
    status = response.status_code
    if status < 400:
        return
    check_pause(response, shown(response.url))
    what = {
        401: "wants a token, or refuses the one it got",
        403: "forbids it",
        404: "does not have it",
        410: "does not have it any more",
    }.get(status, "answers with an error")
    state = ItemState.gone if status in (404, 410) else ItemState.failed
    until = _deadline(response) if status in (401, 403) else None
    if until is not None:
        state, what = ItemState.later, f"gives it from {until:%Y-%m-%d %H:%M} UTC on"
    raise FetchError(f"{shown(response.url)} {what} (HTTP {status})", state, status=status, until=until)


def _deadline(response: requests.Response) -> datetime | None:
    """The end of an early access, which Civitai's refusals name as ``deadline``, where it is still to come."""
    if "json" not in response.headers.get("Content-Type", ""):
        return None
    try:
        said = json.loads(next(response.iter_content(1 << 14), b""))
    except (ValueError, RecursionError, requests.RequestException):
        return None
    until = time_of(said.get("deadline")) if isinstance(said, dict) else None
    return until if until and until > datetime.now(UTC) else None


def _cause(error: BaseException) -> str:
    """What went wrong underneath, without the URL that requests repeats in its messages."""
    reason = error.args[0] if error.args else error
    reason = getattr(reason, "reason", reason)
    return type(reason if isinstance(reason, BaseException) else error).__name__
