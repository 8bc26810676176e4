"""One crawl: pages from a source, rows into the catalog, files into the workspace, and a state to go on from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from audit import metrics
from audit.errors import CrawlError, FetchError, PausedError, WorkspaceError
from audit.faults import is_of_the_item, reason_of_fault
from audit.states import ItemState
from audit.workspace import Workspace
from crawlers.catalog import Catalog, Outcome, Step
from crawlers.items import Item
from crawlers.pauses import PAUSED, noted
from crawlers.source import Source

log = logging.getLogger(__name__)
RECORD_EVERY = 25  # downloads a row file; after a kill no more than these are asked for again
ASKED_A_FILE = 200
MOST_LATER = 1000  # items whose early access has ended that one crawl takes
MOST_WITHOUT_NEWS = 50  # pages in a row, until a listing counts as endless
MOST_FAILURES = 5  # in a row, until a source counts as not answering

Progress = Callable[[str, int, int], None]


@dataclass
class Counts:
    """What one crawl did."""

    pages: int = 0
    items: int = 0
    new: int = 0
    requests: int = 0
    bytes: int = 0
    passed_over: int = 0
    states: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one recorded outcome."""
        self.states[outcome.state] = self.states.get(outcome.state, 0) + 1
        if outcome.state in (ItemState.failed, ItemState.refused, ItemState.gone, ItemState.later) and outcome.reason:
            self.because(outcome.reason[:100])

    def because(self, reason: str) -> None:
        """Count ``reason``; at most 50 are kept."""
        if reason in self.reasons or len(self.reasons) < 50:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


class News:
    """Tells when a listing goes on for ever: after MOST_WITHOUT_NEWS pages in a row without a model not yet seen."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._seen: set[int] = set()  # hashes: a listing has millions of models
        self._without = 0

    def note(self, models: Iterable[str]) -> tuple[str, ...]:
        """Take one page's models; what to record where the listing is to be left here, else nothing."""
        fresh = {hash(model) for model in models} - self._seen
        self._seen |= fresh
        self._without = 0 if fresh else self._without + 1
        if self._without < MOST_WITHOUT_NEWS:
            return ()
        said = f"the listing of {self.what} goes on without anything new: it was left after {self._without} such pages"
        return (said,)


class CrawlState:
    """The state of one query in ``crawls/``: written after the rows that it stands for."""

    def __init__(self, workspace: Workspace, source: str, query: dict[str, Any]) -> None:
        text = json.dumps([source, query], sort_keys=True, default=str)
        self.files = workspace.files
        self.key = f"crawls/{source}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.source, self.query = source, query

    def read(self) -> dict[str, Any]:
        """Where the last crawl of this query stopped; empty for the first. Raises WorkspaceError where damaged."""
        written = self.files.read(self.key)
        if written is None:
            return {}
        try:
            state = json.loads(written)["state"]
            if not isinstance(state, dict):
                raise ValueError("no object")
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(
                f"{self.files}/{self.key} is damaged: remove it to crawl this query from its start"
            ) from error
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Keep ``state``."""
        document = {"source": self.source, "query": self.query, "state": state, "written_at": datetime.now(UTC)}
        self.files.write(self.key, json.dumps(document, indent=1, default=str).encode())


@dataclass
class Crawl:
    """Runs one query of one source. ``limit`` bounds how many new or changed items are taken on."""

    source: Source
    catalog: Catalog
    download: bool = True
    limit: int | None = None
    downloads: int = 4
    restart: bool = False
    progress: Progress = lambda stage, done, total: None

    def run(self) -> Counts:
        """Crawl until the source has nothing new. Raises CrawlError where the source stops answering."""
        counts = Counts()
        state_file = CrawlState(self.catalog.workspace, self.source.name, self.source.query())
        state = {} if self.restart else state_file.read()
        state.pop(PAUSED, None)
        self.catalog.forget_opted_out()
        try:
            for page in self.source.pages(state):
                new = self._take(page.items, counts)
                counts.pages += 1
                for one in page.passed_over:
                    counts.passed_over += 1
                    counts.because(one)
                counts.requests = self.source.requests()
                self.progress("listing", counts.items, 0)
                if self.limit is not None and counts.new >= self.limit:
                    return counts  # the state stays in front of this page, which was perhaps cut
                state = page.state
                if self.source.seen_all(state, page, new):
                    break
                state_file.write(state)
        except FetchError as error:
            when = ""
            if isinstance(error, PausedError):  # no item is to blame: none is recorded as failed
                state_file.write({**state, PAUSED: noted(error)})
                when = f" after {error.until:%Y-%m-%d %H:%M} UTC" if error.until else ""
            told = f"what was crawled is kept, and the same command goes on from there{when}"
            raise CrawlError(f"{error}; {told}") from error
        kept = {name: state[name] for name in (PASSED_OVER,) if name in state}
        state_file.write({**self.source.finished(state), **kept})
        if self.download:
            left = MOST_LATER if self.limit is None else min(MOST_LATER, max(0, self.limit - counts.new))
            self._take(self.catalog.due_later(self.source.name, left), counts)
        counts.requests = self.source.requests()
        return counts

    def take(self, items: list[Item], again: bool = False) -> Counts:
        """Record and fetch given items; with ``again`` also those that failed too often before."""
        counts = Counts()
        self._take(items, counts, again)
        counts.requests = self.source.requests()
        return counts

    def refresh(self, rows: list[dict[str, Any]]) -> Counts:
        """Ask the source again about the catalog's ``rows``: what it changed or took away is recorded.

        One that cannot be answered is counted with its reason, and its turn comes again after all others. Raises
        CrawlError where the source has failed MOST_FAILURES times in a row.
        """
        counts = Counts()
        asked: set[str] = set()
        noted: set[str] = set()
        failed = 0
        try:
            for number, row in enumerate(rows):
                if row["item_id"] not in asked:
                    asked.add(row["item_id"])
                    try:
                        items = self.source.check(row)
                        failed = 0
                    except PausedError as error:
                        raise CrawlError(f"{error}; what was asked is recorded, run it again for the rest") from error
                    except FetchError as error:
                        failed += 1
                        counts.add(Outcome(ItemState.failed, str(error)))
                        if failed >= MOST_FAILURES:
                            raise CrawlError(
                                f"{error}; what was asked is recorded, run it again for the rest"
                            ) from error
                        items = []
                    except Exception as error:
                        if not is_of_the_item(error):
                            raise
                        counts.add(Outcome(ItemState.failed, reason_of_fault(error, row["item_id"], log)))
                        items = []
                    asked |= {item.item_id for item in items}
                    self._take(items, counts)
                if len(asked) - len(noted) >= ASKED_A_FILE:
                    self.catalog.note_asked(sorted(asked - noted))
                    noted |= asked
                self.progress("asking", number + 1, len(rows))
        finally:
            self.catalog.note_asked(sorted(asked - noted))
        counts.requests = self.source.requests()
        return counts

    def _take(self, items: list[Item], counts: Counts, again: bool = False) -> int:
        """Record and fetch one page's items; how many were new or changed."""
        items = list({item.item_id: item for item in items}.values())
        known = self.catalog.known([item.item_id for item in items])
        at_once: list[tuple[Item, Outcome]] = []
        to_fetch: list[Item] = []
        new = 0
        for item in items:
            counts.items += 1
            if self.limit is not None and counts.new + new >= self.limit:
                break
            item, step = self._step(item, known.get(item.item_id), again)
            if step is Step.nothing:
                continue
            new += 1
            if isinstance(step, Outcome):
                at_once.append((item, step))
            else:
                to_fetch.append(item)
        self._record(at_once, known, counts)
        self._fetch_all(to_fetch, known, counts)
        counts.new += new
        return new

    def _step(self, item: Item, row: dict[str, Any] | None, again: bool) -> tuple[Item, Outcome | Step]:
        """What is to be done for ``item``, with what the source says on being asked about it where that matters."""
        try:
            step = self.catalog.step(item, row, self.download, again)
            if step is Step.fetch or (isinstance(step, Outcome) and step.state == ItemState.listed):
                item = replace(self.source.enrich(item), known_fingerprint=item.fingerprint)
                step = self.catalog.step(item, row, self.download, again)
            return item, step
        except Exception as error:
            return item, self._failure(item, error)

    def _failure(self, item: Item, error: Exception) -> Outcome:
        """What is recorded of ``item`` after ``error``. Raises it where it is not the item's own."""
        if isinstance(error, PausedError):
            raise error
        if isinstance(error, FetchError):
            return Outcome(error.state, str(error)[:1000], until=error.until)
        if not is_of_the_item(error):
            raise error
        return Outcome(ItemState.failed, reason_of_fault(error, f"{self.source.name}: {item.item_id}", log))

    def _record(self, outcomes: list[tuple[Item, Outcome]], known: dict[str, dict[str, Any]], counts: Counts) -> None:
        for outcome in self.catalog.record(outcomes, known):
            counts.add(outcome)
            metrics.crawl_items.labels(self.source.name, outcome.state).inc()

    def _fetch_all(self, items: list[Item], known: dict[str, dict[str, Any]], counts: Counts) -> None:
        if not items:
            return
        done: list[tuple[Item, Outcome]] = []
        finished = 0

        def tell(arrived: int) -> None:
            counts.bytes += arrived
            metrics.crawl_bytes.labels(self.source.name).inc(arrived)

        with ThreadPoolExecutor(self.downloads) as pool:
            waiting: dict[Future[Outcome], Item] = {pool.submit(self.fetch_one, item, tell): item for item in items}
            try:
                while waiting:
                    ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ready:
                        done.append((waiting.pop(future), future.result()))
                        finished += 1
                        self.progress("downloading", finished, len(items))
                    if len(done) >= RECORD_EVERY:
                        self._record(done, known, counts)
                        done = []
            finally:
                for future in waiting:
                    future.cancel()
                self._record(done, known, counts)

    def fetch_one(self, item: Item, tell: Callable[[int], None]) -> Outcome:
        """Fetch one item; whatever goes wrong with it becomes its outcome."""
        try:
            return self.source.fetch(item, tell)
        except Exception as error:
            return self._failure(item, error)


PASSED_OVER = "passed_over"


def with_passed_over(state: dict[str, Any], passed_over: tuple[str, ...]) -> dict[str, Any]:
    """``state`` that names what was passed over too, the newest 100."""
    if not passed_over:
        return state
    now = datetime.now(UTC).isoformat(timespec="seconds")
    named = [*state.get(PASSED_OVER, []), *({"what": one, "at": now} for one in passed_over)]
    return {**state, PASSED_OVER: named[-100:]}


def estimate(source: Source, catalog: Catalog, limit: int | None, progress: Progress) -> dict[str, Any]:
    """What a crawl would do, without writing or downloading: items by step, and the bytes the source states."""
    counts: dict[str, Any] = {"pages": 0, "items": 0, "new": 0, "to_download": 0, "bytes": 0, "unknown_sizes": 0,
                              "passed_over": 0}  # fmt: skip
    state = CrawlState(catalog.workspace, source.name, source.query()).read()
    for page in source.pages(state):
        known = catalog.known([item.item_id for item in page.items])
        new = 0
        for item in {item.item_id: item for item in page.items}.values():
            step = catalog.step(item, known.get(item.item_id), download=True)
            new += step is not Step.nothing
            if step is Step.fetch:
                counts["to_download"] += 1
                counts["bytes"] += item.claimed_bytes or 0
                counts["unknown_sizes"] += item.claimed_bytes is None
        counts["pages"] += 1
        counts["passed_over"] += len(page.passed_over)
        counts["items"] += len(page.items)
        counts["new"] += new
        progress("listing", counts["items"], 0)
        if (limit is not None and counts["new"] >= limit) or source.seen_all(page.state, page, new):
            break
    counts["requests"] = source.requests()
    return counts
