"""From the catalog to tasks: which audits are due, and the stages that run them in an engine's workers."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import duckdb

from audit.config import Compile, Config, Priority, Settings
from audit.descriptors import Descriptor, load_descriptor
from audit.engine.extraction import Extraction
from audit.engine.plan import Plan, Request, audit_id_of, make_plan
from audit.engine.stages import finish, match
from audit.engine.work import Task
from audit.errors import CheckpointError, ConfigError
from audit.extraction.captions import Caption, TrainingImages, choose_captions, choose_training_images, rank_captions
from audit.matching import ReferenceSets
from audit.models.base import BaseLocation, locate_base
from audit.report import collect, write_page
from audit.report.pages import Answers
from audit.storage import Workspace
from audit.workspace.workspace import condition

CHUNK = 500
KEPT_PLANS = 4


@dataclass(frozen=True)
class AuditWork:
    """The payload of a task: one network of the catalog under the run's configuration. Small: it travels a lot."""

    identity: str
    item_id: str
    name: str
    base: str
    base_config: str | None
    captions: tuple[Caption, ...]
    training_images: TrainingImages
    warnings: tuple[str, ...]


@dataclass
class Skipped:
    """Items that are not audited, by reason."""

    counts: dict[str, int]

    def add(self, reason: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1


class Due:
    """The audits that the configuration asks for and the workspace does not have, read from the catalog in chunks.

    An audit is there when it is sampled, matched with every reference set that is named, as the set is now, and
    reported: its page tells so. One that lacks only the latter is brought up to date. The same tensors seen in several
    places are one audit, with the captions of all of them. ``given_up`` are not tried again, and ``suspects``, whose
    worker has died before, come last: who is hit by chance is not hit again at every start, and who crashes keeps
    nobody waiting. Raises ReferenceSetError for a set that is not there.
    """

    def __init__(
        self,
        workspace: Workspace,
        config: Config,
        skipped: Skipped,
        given_up: Set[str] = frozenset(),
        suspects: Set[str] = frozenset(),
    ) -> None:
        self.given_up, self.suspects = given_up, suspects
        self.workspace, self.config, self.skipped = workspace, config, skipped
        part, _, parts = config.run.shard.partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            raise ConfigError(f"run.shard = {config.run.shard!r}: write I/N with I from 0 to N - 1, such as 0/4")
        self.part, self.parts = int(part), int(parts)
        self.total = 0  # networks that the condition names
        self.passed = 0  # of those, how many have their result already, or cannot be tried
        self._bases: dict[str, BaseLocation] = {}
        descriptor = load_descriptor(config.descriptor, "cpu")
        self._descriptor = descriptor.name
        sets = ReferenceSets(workspace)
        for name in config.references:
            sets.require(name, descriptor)
        self._answers = Answers(workspace, config.references, self._descriptor)

    def __iter__(self) -> Iterator[Task]:
        taken = 0
        held: list[Task] = []
        limit = self.config.run.limit
        for tasks in self._chunks():
            known = self.workspace.rows(
                "SELECT audit_id FROM audits WHERE audit_id IN (SELECT unnest(?::VARCHAR[]))",
                [[task.key for task in tasks]],
            )
            done = {row["audit_id"] for row in known if row["audit_id"] in self._answers}
            for task in tasks:
                if limit is not None and taken >= limit:
                    return
                if task.key in done or task.key in self.given_up:
                    self.passed += 1
                    continue
                if task.key in self.suspects:
                    held.append(task)
                    continue
                taken += 1
                yield task
        yield from held if limit is None else held[: limit - taken]

    def _identities(self) -> list[str]:
        """The networks to audit: stored, of a known format, within the shard; uploads first, then by base model."""
        uploads = self.config.run.priority is Priority.uploads
        first = "min(CASE source WHEN 'folder' THEN 0 ELSE 1 END)" if uploads else "0"
        try:
            # What opted out is gone before the condition is looked at, and the condition is one expression.
            sql = f"""SELECT identity, {first} AS turn, min(family) AS family, min(first_seen_at) AS seen FROM (
                    SELECT * FROM checkpoints
                    WHERE identity IS NOT NULL AND format IS NOT NULL AND state <> 'opted-out'
                ) AS checkpoints WHERE {condition(self.config.run.where)}
                GROUP BY identity ORDER BY turn, family, seen, identity"""
            found = self.workspace.select(sql)["identity"].to_pylist()
        except duckdb.Error as error:
            raise ConfigError(f"run.where = {self.config.run.where!r} failed: {str(error)[:300]}") from error
        return [identity for identity in found if int(identity[:8], 16) % self.parts == self.part]

    def _chunks(self) -> Iterator[list[Task]]:
        """Tasks, CHUNK at a time: what the catalog says of them is read at once."""
        identities = self._identities()
        self.total = len(identities)
        for start in range(0, len(identities), CHUNK):
            chunk = identities[start : start + CHUNK]
            rows: dict[str, list[dict[str, Any]]] = {identity: [] for identity in chunk}
            for row in self.workspace.rows(
                "SELECT item_id, identity, name, base_model, family, training_images, training_images_source, "
                "contradictions FROM checkpoints WHERE state <> 'opted-out' AND "
                "identity IN (SELECT unnest(?::VARCHAR[])) ORDER BY item_id",
                [chunk],
            ):
                rows[row["identity"]].append(row)
            claims: dict[str, list[Caption]] = {}
            for one in self.workspace.rows(
                "SELECT item_id, caption, source, confidence FROM captions "
                "WHERE item_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY item_id, rank",
                [[row["item_id"] for places in rows.values() for row in places]],
            ):
                caption = Caption(one["caption"], one["source"], one["confidence"])
                claims.setdefault(one["item_id"], []).append(caption)
            found = (self._task(identity, places, claims) for identity, places in rows.items())
            yield [task for task in found if task is not None]

    def _task(self, identity: str, rows: list[dict[str, Any]], claims: dict[str, list[Caption]]) -> Task | None:
        """The task of one network seen in ``rows``, None where it has to be skipped."""
        named = next((row for row in rows if self._base_name(row)), None)
        if named is None:
            family = rows[0]["family"] if rows else None
            self.skipped.add(f"no base model is configured for family {family or 'unknown'}")
            return None
        name = self._base_name(named) or ""
        source, base_config = self.config.bases[name], self.config.base_configs.get(name)
        if source not in self._bases:
            self._bases[source] = locate_base(source, base_config)
        ranked = rank_captions(caption for row in rows for caption in claims.get(row["item_id"], []))
        captions, caption_warnings = choose_captions([], None, {}, ranked)
        counted = next((row for row in rows if row["training_images"]), None)
        known = TrainingImages(counted["training_images"], counted["training_images_source"]) if counted else None
        training_images, count_warnings = choose_training_images(None, {}, known)
        contradictions = sorted({text for row in rows for text in row["contradictions"] or ()})
        warnings = [*caption_warnings, *count_warnings]
        warnings += [f"claims contradict each other: {text}" for text in contradictions]
        work = AuditWork(
            identity, named["item_id"], named["name"], source, base_config, tuple(captions), training_images,
            tuple(warnings),
        )  # fmt: skip
        key = audit_id_of(
            identity, self._bases[source].revision, captions, training_images, self.config.settings, self._descriptor
        )
        return Task(key, f"{source}|{base_config}", work)

    def _base_name(self, row: dict[str, Any]) -> str | None:
        """The configured base of an item: of its claimed base model, else of its family ("unknown" without one)."""
        claimed = (row["base_model"], row["family"] or "unknown")
        return next((name for name in claimed if name in self.config.bases), None)


class _Plans:
    """Opens the plans of tasks, the next one ahead of its turn, and keeps bases located and descriptors loaded."""

    def __init__(self, workspace: Workspace, settings: Settings, descriptor: str, device: str) -> None:
        self.workspace, self.settings, self.device = workspace, settings, device
        self._descriptor: Descriptor | None = None
        self._descriptor_name = descriptor
        self._located: dict[tuple[str, str | None], BaseLocation] = {}
        self._plans: OrderedDict[str, Future[Plan]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1)

    def ahead(self, task: Task, then: Callable[[Plan], None] | None = None) -> None:
        """Start to open the plan of ``task``, and do ``then`` with it."""
        if task.key not in self._plans:
            future = self._plans[task.key] = self._pool.submit(self._open, task)
            if then is not None:
                future.add_done_callback(lambda done: None if done.exception() else then(done.result()))
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)

    def get(self, task: Task) -> Plan:
        """The plan of ``task``. Raises AuditError."""
        self.ahead(task)
        return self._plans.pop(task.key).result()

    def _open(self, task: Task) -> Plan:
        work: AuditWork = task.payload
        where = work.base, work.base_config
        if where not in self._located:
            self._located[where] = locate_base(*where)
        if self._descriptor is None:
            self._descriptor = load_descriptor(self._descriptor_name, self.device)
        try:
            path = self.workspace.files.fetch(f"checkpoints/{work.identity}.safetensors")
        except FileNotFoundError:
            raise CheckpointError(
                f"{work.item_id} has no stored file any more: fetch it again with 'lora-audit catalog fetch'"
            ) from None
        request = Request(
            path, work.base, work.base_config, settings=self.settings, name=work.name,
            known_captions=list(work.captions), known_training_images=work.training_images,
        )  # fmt: skip
        plan = make_plan(request, self._descriptor, base=self._located[where])
        if plan.checkpoint.identity != work.identity:
            raise CheckpointError(
                f"the stored file of {work.item_id} is not what was recorded: run 'lora-audit verify'"
            )
        plan = replace(
            plan, captions=list(work.captions), training_images=work.training_images, warnings=list(work.warnings)
        )
        if plan.audit_id != task.key:
            raise ConfigError("the worker's code or base model is another than the driver's: use the same everywhere")
        return plan


@dataclass(frozen=True)
class StageConfig:
    """What a worker needs to make its stages; it travels once."""

    workspace: str
    settings: Settings
    descriptor: str
    references: tuple[str, ...]
    device: str | None
    batch_size: int
    compile: Compile = Compile.off


class ExtractStage:
    """The GPU stage of an audit."""

    def __init__(self, config: StageConfig) -> None:
        import torch

        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        workspace = Workspace(config.workspace)
        self.plans = _Plans(workspace, config.settings, config.descriptor, device)
        self.extraction = Extraction(workspace, device, config.batch_size, compile=config.compile)

    def prepare(self, task: Task) -> None:
        """Open, hash and merge the checkpoint while another one is sampled."""
        if not self.extraction.workspace.has("audits", task.key):
            self.plans.ahead(task, self.extraction.ahead)

    def process(self, task: Task) -> dict[str, Any]:
        """Sample into the spool."""
        workspace = self.extraction.workspace
        spool = workspace.spool(task.key)
        if workspace.has("audits", task.key) or spool.finished() is not None:  # what is left is to finish it
            return {"load": 0.0, "extract": 0.0, "images": 0, "evaluations": 0, "memory": 0}
        spool.begin()
        plan = self.plans.get(task)
        done = self.extraction.run(plan)
        return {
            "load": done.seconds_loading,
            "extract": done.seconds_total - done.seconds_loading,
            "images": plan.images,
            "evaluations": done.evaluations,
            "memory": done.peak_memory,
        }


class FinishStage:
    """The CPU stage of an audit: cluster, match, report."""

    def __init__(self, config: StageConfig) -> None:
        self.workspace = Workspace(config.workspace)
        self.references = list(config.references)
        self.plans = _Plans(self.workspace, config.settings, config.descriptor, "cpu")

    def prepare(self, task: Task) -> None:
        """There is nothing to do ahead."""

    def process(self, task: Task) -> dict[str, Any]:
        """Write the tables, the matches and the page."""
        marks = [time.monotonic()]
        if self.workspace.has("audits", task.key):
            self.workspace.spool(task.key).discard()
        else:
            finish(self.workspace, self.plans.get(task))
        marks.append(time.monotonic())
        found = match(self.workspace, task.key, self.references)
        marks.append(time.monotonic())
        facts = collect(self.workspace, task.key, self.references)
        page = write_page(facts, self.workspace)
        marks.append(time.monotonic())
        return {
            "cluster": marks[1] - marks[0],
            "match": marks[2] - marks[1],
            "report": marks[3] - marks[2],
            "matches": found,
            "page": page,
            "tells_nothing": facts.tells_nothing is not None,
        }


def make_extract(config: StageConfig) -> Callable[[], ExtractStage]:
    """A factory that engines send to their workers."""
    return _Factory(ExtractStage, config)


def make_finish(config: StageConfig) -> Callable[[], FinishStage]:
    """A factory of the CPU stage; one process makes it once."""
    return _Factory(FinishStage, config)


_MADE: dict[tuple[type, StageConfig], Any] = {}


@dataclass(frozen=True)
class _Factory:
    kind: type
    config: StageConfig

    def __call__(self) -> Any:
        key = self.kind, self.config
        if key not in _MADE:
            _MADE[key] = self.kind(self.config)
        return _MADE[key]
