"""Civitai's REST API v1 (https://github.com/civitai/civitai/wiki/REST-API-Reference) and what it does besides."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode, urlsplit

from audit import metrics
from audit.claims.captions import Caption
from audit.config import CrawlSettings, Prompts
from audit.errors import CrawlError, FetchError
from audit.faults import is_of_the_item, reason_of_fault
from audit.states import ItemState
from crawlers.catalog import Catalog, Outcome
from crawlers.civitai_answers import PROMPT_IMAGES
from crawlers.civitai_answers import prompts_of as prompts_of
from crawlers.civitai_answers import reference_of as reference_of
from crawlers.civitai_items import hosts_of, items_of
from crawlers.civitai_query import PAGE, Listed, ids_of
from crawlers.civitai_query import CivitaiQuery as CivitaiQuery
from crawlers.crawl import News, with_passed_over
from crawlers.http import Session, Token, is_of_the_request, read_token
from crawlers.items import Item, dict_of, list_of, text_of, time_of
from crawlers.source import Page, Source, SourceKind, known_query
from crawlers.training_data import fetch_ground_truth
from crawlers.triage import left_out, tensors_of

log = logging.getLogger(__name__)
ENDPOINT = "https://civitai.com/api/v1"
PART = 10  # models: of a page that fails as a whole
MOST_PARTS = 50  # page times limit may be 1000 at most
TAKEN = {"TakenDown": "taken down at the source", "Archived": "archived at the source: its files are gone there"}


class Civitai:
    """Lists and fetches LoRAs. Raises CrawlError for an endpoint that is none."""

    name = "civitai"

    def __init__(
        self,
        catalog: Catalog,
        query: CivitaiQuery | None = None,
        endpoint: str = ENDPOINT,
        token: Token | None = None,
        prompts: Prompts = Prompts.missing,
        ground_truth: bool = False,
        requests_per_second: float = 2.0,
        allow_private: bool = False,
        retries: int = 6,
    ) -> None:
        self.catalog, self.asked, self.endpoint = catalog, query or CivitaiQuery(), endpoint.rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise CrawlError(f"{endpoint!r} is not the URL of an API: give one such as {ENDPOINT}")
        self.scheme, self.path = parts.scheme, parts.path
        self.hosts = hosts_of(parts.netloc)
        self.session = Session(
            self.hosts, token, requests_per_second, allow_private, retries, count=metrics.count_request(self.name)
        )
        self.prompts, self.ground_truth = prompts, ground_truth
        self._prompts: tuple[str, list[str]] = "", []  # of the version asked for last: its files come together

    def query(self) -> dict[str, Any]:
        """What identifies the crawl's state."""
        return {"endpoint": self.endpoint, **known_query(asdict(self.asked))}

    def requests(self) -> int:
        """HTTP requests so far."""
        return self.session.requests

    def pages(self, state: dict[str, Any]) -> Iterator[Page]:
        """Pages of models; the end is an absent nextCursor, an empty page is not.

        A page that answers 400 or 5xx for ever is taken in parts, and the parts that cannot be had are passed over.
        """
        cursor = state.get("cursor")
        news = News(self.endpoint)
        while True:
            try:
                found = self._listed(cursor)
            except FetchError as error:
                if not is_of_the_request(error):
                    raise
                found = self._in_parts(cursor, error)
            following = found.following
            endless = news.note(found.models) if following is not None and following != cursor else ()
            state = with_passed_over(
                {**state, "cursor": following, "pages": state.get("pages", 0) + 1}, (*found.passed_over, *endless)
            )
            yield Page(found.items, state, (*found.passed_over, *endless))
            if following is None or endless:
                return
            if following == cursor:
                raise CrawlError(f"{self.endpoint} gives the same cursor twice: its listing cannot be followed")
            cursor = following

    def _listed(self, cursor: str | None, number: int | None = None) -> Listed:
        """The items at ``cursor`` and the next cursor; with ``number`` only those of that part of PART models."""
        parameters = [*self.asked.parameters(), *([("cursor", cursor)] if cursor else [])]
        if number is not None:
            parameters = [(name, str(PART) if name == "limit" else value) for name, value in parameters]
            parameters.append(("page", str(number)))
        answer = self.session.get_json(f"{self.endpoint}/models?{urlencode(parameters)}")
        metadata = dict_of(dict_of(answer).get("metadata"))
        models = list_of(dict_of(answer).get("items"))
        items: list[Item] = []
        failed: list[str] = []
        for model in map(dict_of, models):
            try:
                items += self._items(model, self.hosts[0])
            except Exception as error:
                what = f"{self.name} model {text_of(model.get('id'), 40) or 'without an id'}"
                if not is_of_the_item(error):
                    raise
                failed.append(f"{what} was passed over: {reason_of_fault(error, what, log)}")
        return Listed(items, text_of(metadata.get("nextCursor"), 2000) or None, tuple(failed), ids_of(models))

    def _in_parts(self, cursor: str | None, whole: FetchError) -> Listed:
        """What can be had of the page that fails with ``whole``, the cursor behind it, and what was passed over.

        Raises ``whole`` where the pages behind it fail as well: then it is not this page, but the source or the query.
        """
        behind = PAGE // PART + 1
        if not any(self._answers(cursor, number) for number in (behind, 2 * behind)):
            raise whole
        items: list[Item] = []
        passed_over: list[str] = []
        models: set[str] = set()
        for number in range(1, MOST_PARTS + 1):
            try:
                part = self._listed(cursor, number)
            except FetchError as error:
                if not is_of_the_request(error):
                    raise
                passed_over.append(
                    f"listing passed over {PART} models (HTTP {error.status}; part {number} behind cursor "
                    f"{cursor or 'none'})"
                )
                continue
            again = {item.item_id for item in items[-len(part.items) :]}
            if part.items and items and {item.item_id for item in part.items} <= again:
                raise whole  # the number is ignored: the same models come again and again
            items += part.items
            passed_over += part.passed_over
            models |= part.models
            if part.following is None or number * PART >= PAGE:
                return Listed(items, part.following, tuple(passed_over), frozenset(models))
        raise whole

    def _answers(self, cursor: str | None, number: int) -> bool:
        try:
            self._listed(cursor, number)
        except FetchError as error:
            if not is_of_the_request(error):
                raise
            return False
        return True

    def seen_all(self, state: dict[str, Any], page: Page, new: int) -> bool:
        """Newest first, after a crawl that saw everything, a page without anything new is the last that matters."""
        return bool(state.get("complete")) and self.asked.sort == "Newest" and len(page.items) > 0 and new == 0

    def finished(self, state: dict[str, Any]) -> dict[str, Any]:
        """Start at the newest next time, and stop where everything is known."""
        return {"complete": True}

    def _items(self, model: dict[str, Any], host: str) -> list[Item]:
        """One item a weight file of every version; a model without files that was taken down keeps its known items."""
        model_id = text_of(model.get("id"), 40)
        if not re.fullmatch(r"\d{1,18}", model_id):
            return []
        mode = text_of(model.get("mode"), 40)
        if mode in TAKEN:
            return self._missing(model_id, TAKEN[mode])
        if self.asked.since and not any(self._recent(dict_of(v)) for v in list_of(model.get("modelVersions"))):
            return []
        found: list[Item] = []
        for version in list_of(model.get("modelVersions"), 200):
            if isinstance(version, dict) and self._recent(version):
                found += items_of(model_id, model, version, f"{self.scheme}://{host}", self.ground_truth)
        return found

    def _recent(self, version: dict[str, Any]) -> bool:
        published = time_of(version.get("publishedAt")) or time_of(version.get("createdAt"))
        return self.asked.since is None or published is None or published >= self.asked.since

    def _missing(self, model_id: str, why: str) -> list[Item]:
        rows = self.catalog.workspace.rows(
            "SELECT * FROM checkpoints WHERE source = 'civitai' AND model_id = ? AND state <> 'gone'", [model_id]
        )
        return [replace(item, missing=why) for item in self.catalog.items(rows)]

    def enrich(self, item: Item) -> Item:
        """With the prompts of the version's example images, where they are asked for: a request a version.

        Where families are asked for, one of another family is left by what its header says: a request a file.
        """
        if self.asked.families:
            base = item.download_url.partition("/api/")[0] if "/api/" in item.download_url else ""
            about = f"{base}{self.path}/model-files/{item.item_id.rpartition(':')[2]}/tensor-metadata" if base else None
            tensors = tensors_of(self.session, about, item.download_url)
            if left := left_out(tensors, self.asked.families):
                return replace(item, left=left)
        if self.prompts == "never" or (self.prompts == "missing" and item.captions):
            return item
        if self._prompts[0] != item.version_id:
            parameters = {"modelVersionId": item.version_id, "limit": PROMPT_IMAGES, "withMeta": "true", "nsfw": "X"}
            answer = dict_of(self.session.get_json(f"{self.endpoint}/images", parameters))
            self._prompts = item.version_id, prompts_of(list_of(answer.get("items")))
        captions = (Caption(prompt, "image prompt", 0.3) for prompt in self._prompts[1])
        return replace(item, captions=(*item.captions, *captions))

    def check(self, row: dict[str, Any]) -> list[Item]:
        """Ask for the row's model again, first where it was seen; it is gone where no name of the site has it."""
        try:
            items = self._model(str(int(row["model_id"])), urlsplit(row["page_url"] or "").netloc)
        except FetchError as error:
            if error.state != ItemState.gone:
                raise
            return self._missing(row["model_id"], "deleted at the source")
        listed = {item.item_id for item in items}
        gone = self._missing(row["model_id"], "this file is no longer part of the model")
        return [*items, *(item for item in gone if item.item_id not in listed)]

    def _model(self, model_id: str, first: str = "") -> list[Item]:
        """The items of a model, from the host that has it; see ``_ask``."""
        answer, host = self._ask(f"models/{model_id}", first)
        return self._items(answer, host)

    def _ask(self, path: str, first: str = "") -> tuple[dict[str, Any], str]:
        """What the API says at ``path``, asked at ``first`` and then at the site's other names; and which has it.

        Raises FetchError; its state is "gone" where none of them has it.
        """
        hosts = sorted(self.hosts, key=lambda host: host != first)
        for host in hosts:
            try:
                return dict_of(self.session.get_json(f"{self.scheme}://{host}{self.path}/{path}")), host
            except FetchError as error:
                if host == hosts[-1] or error.state != ItemState.gone:
                    raise
        raise AssertionError("unreachable")

    def fetch(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Download the file, and the training set where it may be used."""
        if not item.download_url:
            raise FetchError("the source gives no download URL", ItemState.failed)
        try:
            stored = self.catalog.store.download(self.session, item, tell)
        except FetchError as error:
            until = error.until or item.available_at
            if error.status in (401, 403) and until and until > datetime.now(UTC):
                raise FetchError(
                    f"early access until {until:%Y-%m-%d %H:%M} UTC: it is asked for again then",
                    ItemState.later,
                    until=until,
                ) from None
            raise
        note, found = stored.note, None
        if item.ground_truth_url:
            try:
                found = fetch_ground_truth(self.catalog.workspace, self.session, item)
            except FetchError as error:  # costs the training set, not the checkpoint
                note = "; ".join(filter(None, (note, f"its training set was not taken: {error}")))
        return Outcome(ItemState.stored, note, stored, found)

    def one(self, model_id: str | None = None, version_id: str | None = None, digest: str | None = None) -> list[Item]:
        """The items of a model, of one of its versions, or of the version that has a file with the hash ``digest``."""
        if digest:
            answer, _ = self._ask(f"model-versions/by-hash/{digest}")
            model_id, version_id = text_of(answer.get("modelId"), 40), text_of(answer.get("id"), 40)
        elif version_id and not model_id:
            answer, _ = self._ask(f"model-versions/{int(version_id)}")
            model_id = text_of(answer.get("modelId"), 40)
        if not re.fullmatch(r"\d{1,18}", model_id or ""):
            raise FetchError("the source's answer names no model", ItemState.failed)
        items = self._model(model_id or "")
        return [item for item in items if version_id in (None, item.version_id)]


class CivitaiKind(SourceKind):
    """Crawl Civitai. Downloads need a token: in CIVITAI_TOKEN, or a file given with --token-file.

    [bold]Example[/bold]: lora-audit crawl civitai --base-model "SD 1.5" --tag style --limit 100
    """

    name, title = "civitai", "Civitai"
    asks = CivitaiQuery
    settings = ("prompts", "training_data", "token_file", "rate", "retries", "allow_private")
    endpoint = "civitai_endpoint"

    def open(self, catalog: Catalog, how: CrawlSettings, asked: CivitaiQuery | None = None) -> Source:
        """Its API. Without a listing, prompts of single items are asked for as the configuration says."""
        token = read_token("CIVITAI_TOKEN", how.token_file)
        return Civitai(
            catalog, asked, how.civitai_endpoint, token, how.prompts, how.training_data, how.rate, how.allow_private,
            how.retries,
        )  # fmt: skip

    def named(self, text: str) -> dict[str, str] | None:
        """A page, AIR urn, model id or hash."""
        return reference_of(text)


SOURCE = CivitaiKind()
