"""The Hugging Face Hub: which adapter files its models have, and their download."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import hf_hub_url

from audit import metrics
from audit.claims.captions import Caption
from audit.config import CrawlSettings
from audit.errors import CrawlError, FetchError
from audit.faults import is_of_the_item, reason_of_fault
from audit.models.checkpoint import ADAPTER_NAME
from audit.models.formats.scaling import CONFIG_NAME, MAX_CONFIG_BYTES
from audit.models.hub import is_hub_id
from audit.states import ItemState
from crawlers.catalog import Catalog, Outcome
from crawlers.crawl import with_passed_over
from crawlers.http import Session, Token, check_url, is_of_the_request, read_token
from crawlers.hub_api import HubApi, gated
from crawlers.items import (
    PICKLE,
    Claim,
    Item,
    clean_name,
    count_in_prose,
    dict_of,
    gguf_refusal,
    hex_of,
    list_of,
    text_of,
    time_of,
)
from crawlers.source import Page, Source, SourceKind, asked, known_query
from crawlers.triage import left_out, tensors_of

log = logging.getLogger(__name__)
ENDPOINT = "https://huggingface.co"
# How the hub and its client call an order; the first is the usual one.
ORDERS = {"last_modified": "lastModified", "created_at": "createdAt", "downloads": "downloads", "likes": "likes"}
FILES_A_MODEL = 100  # adapters; what a repository has beyond is named among what was passed over
UNSAFE = ("unsafe", "suspicious", "infected")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_PATH = 1000


@dataclass(frozen=True)
class HuggingFaceQuery:
    """What is listed. ``since`` ends the listing at models last modified before it."""

    filters: tuple[str, ...] = asked(
        ("lora",), "Tags, such as lora or base_model:adapter:ID. Repeat for several.", option="filter"
    )
    author: str | None = asked(None, "Only this user's or organisation's.")
    search: str | None = asked(None, "Words in the model's name.")
    since: datetime | None = asked(None, "Only what is newer (UTC).")
    families: tuple[str, ...] = asked(
        (), "Only download files whose tensors are those of this family, such as sdxl; told by their header. Repeat.",
        option="family",
    )  # fmt: skip


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
        requests_per_second: float = 10.0,
    ) -> None:
        self.catalog, self.asked, self.endpoint = catalog, query or HuggingFaceQuery(), endpoint.rstrip("/")
        parts = urlsplit(self.endpoint)
        if not parts.netloc or "@" in parts.netloc:
            raise CrawlError(f"{endpoint!r} is not the URL of a hub: give one such as {ENDPOINT}")
        check_url(self.endpoint)
        self.session = Session(
            [parts.netloc], token, requests_per_second, allow_private, count=metrics.count_request(self.name)
        )
        self.api = HubApi(self.endpoint, self.session)

    def query(self) -> dict[str, Any]:
        """What identifies the crawl's state."""
        return {"endpoint": self.endpoint, **known_query(vars(self.asked))}

    def requests(self) -> int:
        """HTTP requests so far."""
        return self.session.requests

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        """Models, the last modified first, down to where the last whole crawl began.

        An interrupted crawl lists again from the newest, and passes over what is known without another request. Where
        a page of it answers 400 or 5xx for ever, the listing goes on in other orders, which reach what lies behind it.
        """
        until = max(filter(None, (time_of(state.get("complete_until")), self.asked.since)), default=None)
        seen: set[str] = set()
        top: str | None = None
        for order in ORDERS:
            try:
                for models, endless in self._listed(order):
                    times = [found for model in models if (found := time_of(model.get("lastModified")))]
                    if top is None:
                        top = max(times).isoformat() if times else None
                    fresh = [model for model in models if until is None or _modified(model, until) >= until]
                    items, failed = self._items_of(model for model in fresh if _id(model) not in seen)
                    seen |= set(map(_id, models))
                    passed_over = (*failed, *endless)
                    state = with_passed_over({**state, "top": top}, passed_over)
                    yield Page(items, state, passed_over)
                    if order == next(iter(ORDERS)) and len(fresh) < len(models):
                        return
                return
            except FetchError as error:
                if not seen or not is_of_the_request(error):
                    raise
                what = f"the listing by {order} ends early (HTTP {error.status}, {len(seen)} models seen)"
                state = with_passed_over(state, (what,))
                yield Page([], state, (what,))

    def _listed(self, order: str) -> Iterator[tuple[list[dict[str, Any]], tuple[str, ...]]]:
        """All models in an order, a page at a time. Raises FetchError."""
        asked = {
            "filter": list(self.asked.filters), "author": self.asked.author, "search": self.asked.search,
            "sort": ORDERS[order],
        }  # fmt: skip
        return self.api.listing({name: value for name, value in asked.items() if value})

    def _items_of(self, models: Iterable[dict[str, Any]]) -> tuple[list[Item], tuple[str, ...]]:
        """The items of models, and the models that cannot be read."""
        items: list[Item] = []
        failed: list[str] = []
        for model in models:
            try:
                items += self._items(model)
                if (left := len(_weights(model)) - FILES_A_MODEL) > 0:
                    failed.append(f"{self.name} model {_id(model)}: {left} of its files are passed over")
            except Exception as error:
                if not is_of_the_item(error):
                    raise
                what = f"{self.name} model {_id(model) or 'without an id'}"
                failed.append(f"{what} was passed over: {reason_of_fault(error, what, log)}")
        return items, tuple(failed)

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        """``pages`` ends by itself."""
        return False

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        """The next crawl goes down to the newest model of this one."""
        return {"complete_until": state.get("top") or state.get("complete_until")}

    def _items(self, model: dict[str, Any]) -> list[Item]:
        """One item a weight file; pickles are named only where there is nothing else."""
        model_id, commit = _id(model), hex_of(model.get("sha"), 40)
        if not is_hub_id(model_id) or commit is None:
            return []
        names = _files(model)
        paths = _weights(model)
        paths.sort(key=lambda name: (name != "pytorch_lora_weights.safetensors", name.count("/"), name))
        others = [name for name in names if name.lower().endswith(PICKLES)]
        chosen = paths[:FILES_A_MODEL] or others[:1]
        tags = [tag for tag in list_of(model.get("tags"), 1000) if isinstance(tag, str)]
        card = dict_of(model.get("cardData"))
        captions = [Caption(text_of(card.get("instance_prompt")), "instance_prompt", 0.9)]
        for example in list_of(card.get("widget"), 20):
            captions.append(Caption(text_of(dict_of(example).get("text")), "widget", 0.5))
        bases = card.get("base_model")
        tagged = [tag.removeprefix("base_model:adapter:") for tag in tags if "base_model:adapter:" in tag]
        named = [
            text_of(base, 200)
            for base in [*(bases[:10] if isinstance(bases, list) else [bases]), *tagged[:10]]
            if isinstance(base, str)
        ]
        counted = count_in_prose(card.get("description"))
        shared: dict[str, Any] = {
            "source": self.name,
            "model_id": model_id,
            "version_id": commit,
            "title": model_id,
            "page_url": f"{self.endpoint}/{model_id}",
            "uploader": text_of(model.get("author"), 100) or model_id.partition("/")[0],
            "tags": tuple(text_of(tag, 100) for tag in tags[:100]),
            "license": text_of(card.get("license"), 100),
            "nsfw": "not-for-all-audiences" in tags,
            "published_at": time_of(model.get("lastModified")),
            "base_models": tuple(Claim(base, "base_model") for base in dict.fromkeys(filter(None, named[:10]))),
            "n0": (counted,) if counted else (),
            "captions": tuple(caption for caption in captions if caption.text),
        }
        return [
            Item(
                item_id=f"huggingface:{model_id}:{path}",
                name=clean_name(path),
                download_url=hf_hub_url(model_id, path, revision=commit, endpoint=self.endpoint),
                refusal=gguf_refusal(path) if path in paths else PICKLE,
                **shared,
            )
            for path in chosen
        ]

    def enrich(self, item: Item) -> Item:
        """With size, SHA256 and security status of the file: a request a file that is new."""
        found = self.api.file(item.model_id, self._path(item), item.version_id)
        if not found:
            return replace(item, missing="this file is no longer part of the model")
        if self.asked.families and item.refusal is None:
            tensors = tensors_of(self.session, None, item.download_url)
            item = replace(item, left=left_out(tensors, self.asked.families))
        size, security = found.get("size"), text_of(dict_of(found.get("securityFileStatus")).get("status"), 40)
        return replace(
            item,
            claimed_bytes=size if type(size) is int and 0 <= size < 2**62 else None,
            claimed_sha256=hex_of(dict_of(found.get("lfs")).get("oid"), 64),
            refusal=item.refusal or ("the hub's scan calls it unsafe" if security in UNSAFE else None),
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
            if error.state != ItemState.gone:
                raise
            return [replace(item, missing="deleted or made private at the source") for item in known]
        listed = {item.item_id for item in items}
        gone = [item for item in known if item.item_id not in listed]
        return [*items, *(replace(item, missing="this file is no longer part of the model") for item in gone)]

    def one(self, model_id: str, revision: str | None = None) -> list[Item]:
        """The items of one model. Raises FetchError."""
        return self._items(self.api.model(model_id, revision))

    def _configuration(self, item: Item) -> bytes | None:
        """PEFT's adapter_config.json in the folder of an adapter that PEFT saved, at its commit; None without one."""
        path = self._path(item)
        if path.rpartition("/")[2] != ADAPTER_NAME:
            return None
        beside = f"{path.removesuffix(ADAPTER_NAME)}{CONFIG_NAME}"
        url = hf_hub_url(item.model_id, beside, revision=item.version_id, endpoint=self.endpoint)
        try:
            return self.session.get_bytes(url, MAX_CONFIG_BYTES)
        except FetchError as error:
            if error.state == ItemState.gone:
                return None
            raise

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Download the file at its commit.

        By our own session, not by hf_hub_download: that one begins anew after a kill.
        """
        try:
            config = self._configuration(item)
            stored = self.catalog.store.download(self.session, item, tell, config)
        except FetchError as error:
            if error.status in (401, 403):
                raise gated(item.model_id) from None
            raise
        if item.claimed_sha256 and stored.sha256 != item.claimed_sha256:
            return Outcome(ItemState.stored, "the hub states another SHA256 than the file's", stored)
        return Outcome(ItemState.stored, stored.note, stored)


def is_path(name: str) -> bool:
    """Whether ``name`` can be a file's path in a repository: printable, without "." and ".." and empty folders."""
    return 0 < len(name) <= MAX_PATH and name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def _files(model: dict[str, Any]) -> list[str]:
    """The paths of a repository's files."""
    files = (dict_of(sibling).get("rfilename") for sibling in list_of(model.get("siblings"), 5000))
    return [name for name in files if isinstance(name, str) and is_path(name)]


def _weights(model: dict[str, Any]) -> list[str]:
    """Those of them that may be adapters."""
    return [name for name in _files(model) if name.lower().endswith((".safetensors", ".gguf"))]


def _id(model: dict[str, Any]) -> str:
    return text_of(model.get("id"))


def _modified(model: dict[str, Any], otherwise: datetime) -> datetime:
    return time_of(model.get("lastModified")) or otherwise


def reference_of(text: str) -> dict[str, str] | None:
    """What a model page URL, or owner/name with or without @commit, names, as arguments of ``HuggingFace.one``."""
    page = re.fullmatch(
        r"https://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/(?:tree|blob)/([0-9a-f]{40}))?.*", text
    )
    name = re.fullmatch(r"(?:huggingface:|hf:)?([^@:/]+/[^@:/]+)(?:@([0-9a-f]{40}))?(?::.*)?", text)
    match = page or name
    if not match or not is_hub_id(match.group(1)):
        return None
    return {"model_id": match.group(1), **({"revision": match.group(2)} if match.group(2) else {})}


class HuggingFaceKind(SourceKind):
    """Crawl the Hugging Face Hub. Gated models need the token of an account with access, in HF_TOKEN.

    [bold]Example[/bold]: lora-audit crawl huggingface --filter lora --filter
    base_model:adapter:stable-diffusion-v1-5/stable-diffusion-v1-5 --since 2026-11-01
    """

    name, title = "huggingface", "Hugging Face"
    asks = HuggingFaceQuery
    settings = ("token_file", "allow_private")
    endpoint = "hub_endpoint"

    def open(self, catalog: Catalog, how: CrawlSettings, asked: HuggingFaceQuery | None = None) -> Source:
        """Its API."""
        return HuggingFace(catalog, asked, how.hub_endpoint, read_token("HF_TOKEN", how.token_file), how.allow_private)

    def named(self, text: str) -> dict[str, str] | None:
        """A model's page, or owner/name."""
        return reference_of(text)


SOURCE = HuggingFaceKind()
