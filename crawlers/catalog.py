"""The catalog of a workspace: what was seen where, what became of it, and who does not want to be crawled."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa

from audit.claims.captions import N0, Caption
from audit.errors import FetchError
from audit.faults import is_of_the_item, reason_of_fault
from audit.models.checkpoint import metadata_json
from audit.models.formats.headers import read_any_header
from audit.models.safetensors_header import Header
from audit.models.trained import Training
from audit.schemas import CHECKPOINTS
from audit.similar import keep
from audit.states import ItemState
from audit.storable import storable_values
from audit.workspace import Workspace
from audit.workspace.workspace import condition
from crawlers.forget import forget_opted_out, remove_unheld, withdraw
from crawlers.items import Claim, Item, base_claims_of, conclude, gguf_refusal
from crawlers.opt_outs import OptOuts as OptOuts
from crawlers.store import Store, Stored
from crawlers.training_data import GroundTruth

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 5
OF_THE_FILE = ("checkpoint_sha256", "tensors_sha256", "identity", "format", "bytes", "claimed_metadata")
OF_ITS_HEADER = tuple(one.name for one in fields(Training))


class Step(StrEnum):
    """What is to be done for an item, where nothing is to be recorded at once."""

    nothing = "nothing"
    fetch = "fetch"


@dataclass(frozen=True)
class Outcome:
    """What became of an item: a state of the checkpoints table, why, the stored file, and when it can be had later."""

    state: ItemState
    reason: str | None = None
    stored: Stored | None = None
    ground_truth: GroundTruth | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class Entry:
    """A stored item for an audit: its file, and what the catalog knows of captions, N0, training images and bases."""

    path: Path
    name: str
    captions: list[Caption]
    n0: N0 | None
    ground_truth: Path | None
    warnings: list[str]
    bases: list[tuple[str, str]]


class Catalog:
    """Reads and writes the catalog tables. Rows are added, never changed; the newest of an item holds."""

    def __init__(self, workspace: Workspace, opt_outs: OptOuts | None = None) -> None:
        self.workspace = workspace
        self.opt_outs = opt_outs or OptOuts()
        self.store = Store(workspace)

    def known(self, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The rows of those of ``item_ids`` that are in the catalog."""
        return self.workspace.newest("checkpoints", "item_id", list(item_ids))

    def items(self, rows: Sequence[dict[str, Any]]) -> list[Item]:
        """The items that ``rows`` of the checkpoints table describe, with their captions."""
        by_item: dict[str, list[dict[str, Any]]] = {row["item_id"]: [] for row in rows}
        if by_item:
            sql = "SELECT * FROM captions WHERE item_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY item_id, rank"
            for caption in self.workspace.rows(sql, [list(by_item)]):
                by_item[caption["item_id"]].append(caption)
        return [item_of(row, by_item[row["item_id"]]) for row in rows]

    def record(self, outcomes: Iterable[tuple[Item, Outcome]], known: dict[str, dict[str, Any]]) -> list[Outcome]:
        """Write what became of items, their captions first: a checkpoints row makes its item's captions count.

        What nothing can be concluded of is recorded as failed, and what was opted out since the crawl began as that.
        Returns the outcomes as they are recorded.
        """
        outcomes, withdrawn = withdraw(self, list(outcomes))
        recorded = []
        rows, captions = [], []
        earlier = [known[item.item_id]["seen_at"] for item, _ in outcomes if known.get(item.item_id)]
        # the newest row holds, also after a clock was set back
        now = max([datetime.now(UTC), *(seen + timedelta(microseconds=1) for seen in earlier if seen)])
        for item, outcome in outcomes:
            before = known.get(item.item_id)
            try:
                row, claims = self._row(item, outcome, before, now)
                pa.Table.from_pylist([storable_values(row)], schema=CHECKPOINTS)  # whether it fits its columns
            except Exception as error:
                if not is_of_the_item(error):
                    raise
                outcome = Outcome(ItemState.failed, reason_of_fault(error, item.item_id, log))
                row, claims = self._failed(item, outcome, before or {}, now), []
            recorded.append(outcome)
            rows.append(row)
            known[item.item_id] = row
            for rank, caption in enumerate(claims, start=1):
                captions.append(
                    {"item_id": item.item_id, "rank": rank, "caption": caption.text, "source": caption.source,
                     "confidence": caption.confidence, "seen_at": now}
                )  # fmt: skip
        if captions:
            self.workspace.append("captions", captions)
        if rows:
            self.workspace.append("checkpoints", rows)
        remove_unheld(self, withdrawn)
        keep(self.workspace, [(item.item_id, outcome.stored) for item, outcome in outcomes if outcome.stored])
        return recorded

    def _failed(self, item: Item, outcome: Outcome, before: dict[str, Any], now: datetime) -> dict[str, Any]:
        """The row of an item of which no more is believed than where it is."""
        return {
            "item_id": item.item_id, "source": item.source, "model_id": item.model_id, "version_id": item.version_id,
            "name": item.name, "state": outcome.state, "reason": outcome.reason, "fingerprint": item.fingerprint,
            "attempts": self._attempts(item, outcome, before),
            "first_seen_at": before.get("first_seen_at") or now, "seen_at": now,
        }  # fmt: skip

    def _row(
        self, item: Item, outcome: Outcome, before: dict[str, Any] | None, now: datetime
    ) -> tuple[dict[str, Any], list[Caption]]:
        stored, before = outcome.stored, before or {}
        if outcome.state == ItemState.opted_out:  # nothing is kept of it but that it was there
            return {
                "item_id": item.item_id, "source": item.source, "model_id": item.model_id, "state": ItemState.opted_out,
                "reason": outcome.reason, "fingerprint": item.fingerprint, "attempts": 0,
                "first_seen_at": before.get("first_seen_at") or now, "seen_at": now,
            }, []  # fmt: skip
        # what is known of the file stays known
        kept = stored is None and outcome.state in (ItemState.stored, ItemState.gone)
        header = stored.header if stored else None
        if kept and before.get("identity"):
            header = self._header(before["identity"])
        truth = outcome.ground_truth
        if truth:  # pictures that were counted, captions that were trained with
            item = replace(
                item,
                known_fingerprint=item.fingerprint,
                n0=(*item.n0, N0(truth.pictures, "training-data")),
                captions=(*item.captions, *(Caption(text, "training-data", 0.95) for text in truth.captions)),
            )
        found = conclude(item, header)
        count = found.n0
        row = {
            "item_id": item.item_id,
            "source": item.source,
            "model_id": item.model_id,
            "version_id": item.version_id,
            "name": item.name,
            "title": item.title,
            "page_url": item.page_url,
            "download_url": item.download_url,
            "uploader": item.uploader or None,
            "tags": list(item.tags),
            "license": item.license or None,
            "nsfw": item.nsfw,
            "real_person": item.real_person,
            "minor": item.minor,
            "published_at": item.published_at,
            "available_at": outcome.until or item.available_at,
            "base_model": found.base_model.value if found.base_model else None,
            "base_model_source": found.base_model.source if found.base_model else None,
            "family": str(found.family.value) if found.family else None,
            "family_source": found.family.source if found.family else None,
            "wanted_base": found.wanted.base,
            "wanted_base_by": found.wanted.by,
            "wanted_base_sure": found.wanted.sure,
            "wanted_base_why": found.wanted.why,
            "training_images": min(count.count, 2**31 - 1) if count else None,
            "training_images_source": count.source if count else None,
            "contradictions": found.contradictions,
            "claims": json.dumps(found.claims),
            "ground_truth": truth.folder if truth else before.get("ground_truth"),
            "claimed_bytes": item.claimed_bytes,
            "claimed_sha256": item.claimed_sha256,
            "claimed_autov3": item.claimed_autov3,
            "fingerprint": item.fingerprint,
            "state": outcome.state,
            "reason": outcome.reason,
            **asdict(found.training),
            "attempts": self._attempts(item, outcome, before),
            "first_seen_at": before.get("first_seen_at") or now,
            "seen_at": now,
        }
        if stored:
            row |= {
                "checkpoint_sha256": stored.sha256,
                "tensors_sha256": stored.tensors_sha256,
                "identity": stored.identity,
                "format": str(stored.format) if stored.format else None,
                "bytes": stored.header.file_bytes,
                "claimed_metadata": metadata_json(stored.header.metadata),
            }
        elif kept:
            known = OF_THE_FILE if header else OF_THE_FILE + OF_ITS_HEADER
            row |= {name: before.get(name) for name in known}
        return row, found.captions

    def _header(self, identity: str) -> Header | None:
        path = self.store.fetch(identity)
        return read_any_header(path) if path else None

    @staticmethod
    def _attempts(item: Item, outcome: Outcome, before: dict[str, Any]) -> int:
        earlier = before.get("attempts") or 0 if before.get("fingerprint") == item.fingerprint else 0
        return (
            earlier + 1 if outcome.state == ItemState.failed else (0 if outcome.state == ItemState.stored else earlier)
        )

    def step(self, item: Item, row: dict[str, Any] | None, download: bool, again: bool = False) -> Outcome | Step:
        """What is to be done for ``item``, given its ``row``: nothing, to fetch it, or the outcome to record at once.

        ``again`` fetches also what has failed MAX_ATTEMPTS times.
        """
        same = row is not None and row["fingerprint"] == item.fingerprint
        standing = self._standing(item)
        if standing:
            return Step.nothing if row is not None and same and row["state"] == standing.state else standing
        if row is None:
            return Step.fetch if download else Outcome(ItemState.listed)
        if row["state"] == ItemState.stored and self._same_file(item, row):
            if download and item.ground_truth_url and not row["ground_truth"] and not same:
                return Step.fetch  # its training set is asked for now
            return Step.nothing if same else Outcome(ItemState.stored, row["reason"])
        if same and row["state"] == ItemState.later:
            due = row["available_at"] is None or row["available_at"] <= datetime.now(UTC)
            return Step.fetch if download and due else Step.nothing
        if same:
            tired = row["state"] == ItemState.failed and row["attempts"] >= MAX_ATTEMPTS and not again
            refused = row["state"] == ItemState.refused and not _is_read_now(row["reason"])
            done = refused or tired or not download
            return Step.nothing if done else Step.fetch
        return Step.fetch if download else Outcome(ItemState.listed)

    @staticmethod
    def _same_file(item: Item, row: dict[str, Any]) -> bool:
        """Whether the source still has the file that was stored, by all it says about it."""
        same = (item.claimed_sha256, item.claimed_bytes) == (row["claimed_sha256"], row["claimed_bytes"])
        if item.source == "huggingface":  # another commit need not touch this file: its hash decides
            return same and item.claimed_sha256 is not None
        return same and item.version_id == row["version_id"]

    def _standing(self, item: Item) -> Outcome | None:
        """What is known of ``item`` without asking for its file; None where it may be downloaded."""
        if self.opt_outs.covers(item.source, item.model_id, item.uploader):
            return Outcome(ItemState.opted_out, "on the opt-out list")
        if item.missing:
            return Outcome(ItemState.gone, item.missing)
        if item.refusal:
            return Outcome(ItemState.refused, item.refusal)
        if item.left:
            return Outcome(ItemState.listed, item.left)
        if item.claimed_bytes and item.claimed_bytes > self.store.max_bytes:
            return Outcome(
                ItemState.refused, f"{item.claimed_bytes} bytes are more than the limit of {self.store.max_bytes}"
            )
        return None

    def forget_opted_out(self) -> int:
        """Apply the opt-out list to what is in the catalog already. How many items.

        What no other item has goes: files, sketches, the uploader's own training sets, and audits with all that rests
        on them.
        """
        return forget_opted_out(self)

    def find(self, where: str = "TRUE", limit: int = 1000) -> pa.Table:
        """Rows of the checkpoints view that fulfil the SQL condition ``where``, newest first."""
        return self.workspace.select(f"SELECT * FROM checkpoints WHERE {where} ORDER BY seen_at DESC LIMIT {limit:d}")

    def due_later(self, source: str, limit: int) -> list[Item]:
        """Items of ``source`` whose early access has ended since they were recorded."""
        where = "source = ? AND state = 'later' AND coalesce(available_at <= now(), TRUE)"
        sql = f"SELECT * FROM checkpoints WHERE {where} ORDER BY available_at LIMIT {limit:d}"
        return self.items(self.workspace.rows(sql, [source]))

    def longest_unasked(self, where: str, limit: int, sources: Sequence[str]) -> pa.Table:
        """Rows of ``sources`` that fulfil ``where``: first those whose source was asked about them longest ago.

        What a crawl has seen counts as asked then.
        """
        return self.workspace.select(
            f"""SELECT c.* FROM (SELECT * FROM checkpoints WHERE {condition(where)}) AS c
            LEFT JOIN (SELECT item_id, max(asked_at) AS at FROM asked GROUP BY item_id) AS a ON a.item_id = c.item_id
            WHERE list_contains(?, c.source) AND c.state NOT IN ('gone', 'opted-out')
            ORDER BY greatest(c.seen_at, coalesce(a.at, c.seen_at)), c.item_id LIMIT {limit:d}""",
            [list(sources)],
        )

    def note_asked(self, item_ids: Iterable[str]) -> None:
        """Remember that the source was asked about these items now."""
        now = datetime.now(UTC)
        self.workspace.append("asked", [{"item_id": one, "asked_at": now} for one in item_ids])

    def entry(self, item_id: str) -> Entry:
        """What an audit needs of an item. Raises FetchError where it is not in the catalog or has no stored file."""
        rows = self.workspace.rows("SELECT * FROM checkpoints WHERE item_id = ?", [item_id])
        if not rows:
            raise FetchError(f"{item_id} is not in the catalog: see 'lora-audit catalog', or add it with 'catalog add'")
        row = rows[0]
        path = self.store.fetch(row["identity"]) if row["identity"] else None
        if path is None:
            why = f"{row['state']}: {row['reason']}" if row["reason"] else row["state"]
            raise FetchError(
                f"{item_id} has no stored file ({why}): fetch it with "
                f"lora-audit catalog fetch --where \"item_id = '{item_id}'\""
            )
        count, truth = row["training_images"], row["ground_truth"]
        return Entry(
            path,
            row["name"],
            list(self.items([row])[0].captions),
            N0(count, row["training_images_source"]) if count else None,
            self._ground_truth(truth) if truth else None,
            [f"claims contradict each other: {text}" for text in row["contradictions"] or ()],
            base_claims_of(row),
        )

    def _ground_truth(self, name: str) -> Path:
        """The folder of a training set; a copy in the cache where the workspace is on object storage."""
        fetched = [self.workspace.files.fetch(entry.key) for entry in self.workspace.files.list(f"ground-truth/{name}")]
        return fetched[0].parent


def _is_read_now(reason: str | None) -> bool:
    """Whether what was refused for this reason no longer is: a GGUF file, whose package is installed now."""
    return (reason or "").startswith("a GGUF file") and gguf_refusal(".gguf") is None


def item_of(row: dict[str, Any], captions: Iterable[dict[str, Any]] = ()) -> Item:
    """The item that a row and its captions describe, with the recorded claims: to fetch it later or to mark it."""
    claims: dict[str, list[list[Any]]] = {}
    with suppress(ValueError, TypeError):
        claims = json.loads(row["claims"] or "{}")
    from_header = ("ss_", "modelspec.", "shapes")
    return Item(
        item_id=row["item_id"],
        source=row["source"],
        model_id=row["model_id"],
        version_id=row["version_id"] or "",
        name=row["name"] or "",
        download_url=row["download_url"] or "",
        title=row["title"] or "",
        page_url=row["page_url"] or "",
        uploader=row["uploader"] or "",
        tags=tuple(row["tags"] or ()),
        license=row["license"] or "",
        nsfw=bool(row["nsfw"]),
        real_person=bool(row["real_person"]),
        minor=bool(row["minor"]),
        published_at=row["published_at"],
        available_at=row["available_at"],
        base_models=tuple(Claim(*pair) for pair in claims.get("base_model", []) if not pair[1].startswith(from_header)),
        n0=tuple(N0(*pair) for pair in claims.get("training_images", []) if not pair[1].startswith(from_header)),
        captions=tuple(Caption(one["caption"], one["source"], one["confidence"]) for one in captions),
        claimed_bytes=row["claimed_bytes"],
        claimed_sha256=row["claimed_sha256"],
        claimed_autov3=row["claimed_autov3"],
        known_fingerprint=row["fingerprint"],
    )
