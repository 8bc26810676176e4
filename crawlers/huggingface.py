"""The Hugging Face Hub, by its own client: https://huggingface.co/docs/huggingface_hub. Files come by our session."""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, ModelInfo, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

from audit import metrics
from audit.errors import CrawlError, FetchError
from audit.extraction.captions import Caption
from audit.models.base import HUB_ID
from crawlers.catalog import Catalog, Outcome
from crawlers.crawl import Page, with_passed_over
from crawlers.http import (
    BACKOFF,
    MAX_WAIT,
    RETRIED,
    USER_AGENT,
    PatientRetry,
    Session,
    Token,
    check_address,
    check_url,
    is_loopback,
    is_of_the_request,
    pause_asked,
)
from crawlers.items import Claim, Item, clean_name, count_in_prose, dict_of, list_of, text_of, time_of

ENDPOINT = "https://huggingface.co"
PAGE = 100
ORDERS = ("last_modified", "created_at", "downloads", "likes")  # the first is the usual one
FILES_A_MODEL = 8
EXPAND = ["author", "cardData", "disabled", "gated", "lastModified", "private", "sha", "siblings", "tags"]
UNSAFE = ("unsafe", "suspicious", "infected")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_PATH = 1000


@dataclass(frozen=True)
class HuggingFaceQuery:
    """What is listed. ``since`` ends the listing at models last modified before it."""

    filters: tuple[str, ...] = ("lora",)
    author: str | None = None
    search: str | None = None
    since: datetime | None = None


class HuggingFace:
    """Lists and fetches adapter files. Raises CrawlError for an endpoint that is none."""

    name = "huggingface"

    def __init__(
        self,
        catalog: Catalog,
        query: HuggingFaceQuery | None = None,
        endpoint: str = ENDPOINT,
        token: Token | None = None,
        allow_private: bool = False,
    ) -> None:
        self.catalog, self.asked, self.endpoint = catalog, query or HuggingFaceQuery(), endpoint.rstrip("/")
        parts = urlsplit(self.endpoint)
        if not parts.netloc or "@" in parts.netloc:
            raise CrawlError(f"{endpoint!r} is not the URL of a hub: give one such as {ENDPOINT}")
        check_url(self.endpoint)
        self._requests = 0
        disable_progress_bars()
        set_client_factory(self._client_factory(allow_private or is_loopback(parts.hostname)))
        agent = USER_AGENT.partition(" ")[0].partition("/")
        self.api = HfApi(
            endpoint=self.endpoint,
            token=token.value if token else False,  # False: the machine's own login is not used
            library_name=agent[0],
            library_version=agent[2],
        )
        self.session = Session([parts.netloc], token, 10.0, allow_private, count=metrics.count_request(self.name))

    def _client_factory(self, allow_private: bool) -> Callable[[], Any]:
        """The client's own factory with a check of every request, redirects included, before it is sent."""

        count = metrics.count_request(self.name)

        def check(request: Any) -> None:
            self._requests += 1
            check_url(str(request.url))
            if not allow_private:
                for found in socket.getaddrinfo(request.url.host, request.url.port or 443, type=socket.SOCK_STREAM):
                    check_address(str(found[4][0]))

        def factory() -> Any:
            client = default_client_factory()
            hooks = client.event_hooks
            hooks["request"] = [*hooks["request"], check]
            hooks["response"] = [*hooks["response"], lambda response: count(response.status_code)]
            client.event_hooks = hooks
            client.timeout = 60.0
            return client

        return factory

    def query(self) -> dict[str, Any]:
        """What identifies the crawl's state."""
        return {"endpoint": self.endpoint, **vars(self.asked)}

    def requests(self) -> int:
        """HTTP requests so far."""
        return self._requests + self.session.requests

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        """Models, the last modified first, down to where the last whole crawl began.

        The client's listing has no cursor to go on from: an interrupted crawl lists again from the newest, and passes
        over what is known without another request. Where a page of it answers 400 or 5xx for ever, the listing goes on
        in other orders, which reach what lies behind it.
        """
        until = max(filter(None, (time_of(state.get("complete_until")), self.asked.since)), default=None)
        seen: set[str] = set()
        top: str | None = None
        for order in ORDERS:
            try:
                for models in self._listed(order):
                    if top is None:
                        newest = max((m.last_modified for m in models if m.last_modified), default=None)
                        top = newest.isoformat() if newest else None
                    fresh = [m for m in models if until is None or m.last_modified is None or m.last_modified >= until]
                    items = [item for model in fresh if model.id not in seen for item in self._items(model)]
                    seen |= {model.id for model in models}
                    state = {**state, "top": top}
                    yield Page(items, state)
                    if order == ORDERS[0] and len(fresh) < len(models):
                        return
                return
            except FetchError as error:
                if not seen or not is_of_the_request(error):
                    raise
                what = f"the listing by {order} ends early (HTTP {error.status}, {len(seen)} models seen)"
                state = with_passed_over(state, (what,))
                yield Page([], state, (what,))

    def _listed(self, order: str) -> Iterator[list[ModelInfo]]:
        """All models in an order, PAGE at a time. Raises FetchError."""
        with _errors(self.endpoint):
            listing = iter(
                self.api.list_models(
                    filter=list(self.asked.filters) or None,
                    author=self.asked.author,
                    search=self.asked.search,
                    sort=order,  # type: ignore[arg-type]
                    expand=EXPAND,  # type: ignore[arg-type]
                )
            )
        while True:
            models = []
            try:
                with _errors(self.endpoint):
                    for model in islice(listing, PAGE):
                        models.append(model)
            except FetchError:
                if models:  # what came before the failing page
                    yield models
                raise
            yield models
            if len(models) < PAGE:
                return

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        """``pages`` ends by itself."""
        return False

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        """The next crawl goes down to the newest model of this one."""
        return {"complete_until": state.get("top") or state.get("complete_until")}

    def _items(self, model: ModelInfo) -> list[Item]:
        """One item a weight file; pickles are named only where there is nothing else."""
        if not HUB_ID.fullmatch(model.id) or not re.fullmatch(r"[0-9a-f]{40}", model.sha or ""):
            return []
        names = [sibling.rfilename for sibling in (model.siblings or [])[:5000]]
        paths = [name for name in names if name.lower().endswith(".safetensors") and is_path(name)]
        paths.sort(key=lambda name: (name != "pytorch_lora_weights.safetensors", name.count("/"), name))
        chosen = paths[:FILES_A_MODEL] or [n for n in names if n.lower().endswith(PICKLES) and is_path(n)][:1]
        # transformers' ModelCardData becomes a plain dictionary; its fields are whatever the author wrote
        card = model.card_data.to_dict() if model.card_data else {}
        captions = [Caption(text_of(card.get("instance_prompt")), "instance_prompt", 0.9)]
        for example in list_of(card.get("widget"), 20):
            captions.append(Caption(text_of(dict_of(example).get("text")), "widget", 0.5))
        bases = card.get("base_model")
        tagged = [tag.removeprefix("base_model:adapter:") for tag in model.tags or [] if "base_model:adapter:" in tag]
        named = [
            text_of(base, 200)
            for base in [*(bases if isinstance(bases, list) else [bases]), *tagged]
            if isinstance(base, str)
        ]
        counted = count_in_prose(card.get("description"))
        shared: dict[str, Any] = {
            "source": self.name,
            "model_id": model.id,
            "version_id": model.sha,
            "title": model.id,
            "page_url": f"{self.endpoint}/{model.id}",
            "uploader": model.author or model.id.partition("/")[0],
            "tags": tuple(text_of(tag, 100) for tag in (model.tags or [])[:100]),
            "license": text_of(card.get("license"), 100),
            "nsfw": "not-for-all-audiences" in (model.tags or []),
            "published_at": model.last_modified,
            "base_models": tuple(Claim(base, "base_model") for base in dict.fromkeys(filter(None, named[:10]))),
            "training_images": (counted,) if counted else (),
            "captions": tuple(caption for caption in captions if caption.text),
        }
        return [
            Item(
                item_id=f"huggingface:{model.id}:{path}",
                name=clean_name(path),
                download_url=hf_hub_url(model.id, path, revision=model.sha, endpoint=self.endpoint),
                refusal=None if path in paths else "a pickle: only safetensors is read, pickles can run code",
                **shared,
            )
            for path in chosen
        ]

    def enrich(self, item: Item) -> Item:
        """With size, SHA256 and security status of the file: a request a file that is new."""
        found = _patiently(
            lambda: self.api.get_paths_info(item.model_id, [self._path(item)], revision=item.version_id, expand=True),
            item.model_id,
        )
        if not found:
            return replace(item, missing="this file is no longer part of the model")
        file: Any = found[0]
        unsafe = file.security is not None and file.security.status in UNSAFE
        return replace(
            item,
            claimed_bytes=file.size,
            claimed_sha256=file.lfs.sha256 if file.lfs else None,
            refusal=item.refusal or ("the hub's scan calls it unsafe" if unsafe else None),
        )

    @staticmethod
    def _path(item: Item) -> str:
        return item.item_id.split(":", 2)[2]

    def check(self, row: dict[str, Any]) -> list[Item]:
        """Ask for the row's model again."""
        rows = self.catalog.workspace.rows(
            "SELECT * FROM checkpoints WHERE source = 'huggingface' AND model_id = ? AND state <> 'gone'",
            [row["model_id"]],
        )
        known = self.catalog.items(rows)
        try:
            items = self.one(row["model_id"])
        except FetchError as error:
            if error.state != "gone":
                raise
            return [replace(item, missing="deleted or made private at the source") for item in known]
        listed = {item.item_id for item in items}
        gone = [item for item in known if item.item_id not in listed]
        return [*items, *(replace(item, missing="this file is no longer part of the model") for item in gone)]

    def one(self, model_id: str, revision: str | None = None) -> list[Item]:
        """The items of one model. Raises FetchError."""
        return self._items(
            _patiently(
                lambda: self.api.model_info(model_id, revision=revision, expand=EXPAND),  # type: ignore[arg-type]
                model_id,
            )
        )

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Download the file at its commit.

        By our own session, not by hf_hub_download: that one begins anew after a kill.
        """
        try:
            stored = self.catalog.store.download(self.session, item, tell)
        except FetchError as error:
            if re.search(r"\(HTTP 40[13]\)", str(error)):
                raise _gated(item.model_id) from None
            raise
        if item.claimed_sha256 and stored.sha256 != item.claimed_sha256:
            return Outcome("stored", "the hub states another SHA256 than the file's", stored)
        return Outcome("stored", stored.note, stored)


def is_path(name: str) -> bool:
    """Whether ``name`` can be a file's path in a repository: printable, without "." and ".." and empty folders."""
    return 0 < len(name) <= MAX_PATH and name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def _gated(what: str) -> FetchError:
    return FetchError(
        f"{what} is gated or private: ask for access on its page, and give that account's token (HF_TOKEN)", "failed"
    )


T = TypeVar("T")


def _patiently(call: Callable[[], T], what: str, tries: int = 6) -> T:
    """``call``, again after a wait where the hub is busy or out of reach: the client itself repeats listings alone."""
    for attempt in range(tries):
        try:
            with _errors(what):
                return call()
        except FetchError as error:
            if error.state != "failed" or error.wait is None or attempt == tries - 1:
                raise
            time.sleep(max(error.wait, PatientRetry.unit * min(BACKOFF[1], 2**attempt * random.uniform(1, 2))))
    raise AssertionError("unreachable")


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """The client's errors as FetchError, in words, without the request's URL and headers."""
    import httpx2

    try:
        yield
    except GatedRepoError:
        raise _gated(what) from None
    except DisabledRepoError:
        raise FetchError(f"{what} is disabled by the hub", "gone") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        raise FetchError(f"{what} is not there, or private", "gone") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        failure = FetchError(f"{what}: the hub answers with an error (HTTP {status})", "failed", status=status)
        if status in RETRIED:
            failure.wait = max(pause_asked(error.response.headers), _retry_after(error.response.headers))
        raise failure from None
    except CrawlError as error:
        raise FetchError(str(error), "refused") from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        failure = FetchError(f"{what} cannot be had from the hub ({type(error).__name__})", "failed")
        failure.wait = 0.0 if isinstance(error, httpx2.TransportError) else None
        raise failure from None


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "")
    return min(MAX_WAIT, float(text)) if re.fullmatch(r"\d{1,9}", text) else 0.0


def reference_of(text: str) -> dict[str, str] | None:
    """What a model page URL, or owner/name with or without @commit, names, as arguments of ``HuggingFace.one``."""
    page = re.fullmatch(
        r"https://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/(?:tree|blob)/([0-9a-f]{40}))?.*", text
    )
    name = re.fullmatch(r"(?:huggingface:|hf:)?([^@:]+/[^@:]+?)(?:@([0-9a-f]{40}))?(?::.*)?", text)
    match = page or name
    if not match or not HUB_ID.fullmatch(match.group(1)):
        return None
    return {"model_id": match.group(1), **({"revision": match.group(2)} if match.group(2) else {})}
