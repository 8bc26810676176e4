"""Which audits are due: jobs made of what the catalog says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import duckdb

from audit.claims.captions import N0, Caption, choose_captions, choose_n0, rank_captions
from audit.config import Config, Priority
from audit.descriptors.facts import DescriptorFacts
from audit.descriptors.registry import DESCRIPTORS, descriptor_facts
from audit.engine.bases import Bases, claims_in
from audit.errors import ConfigError
from audit.job import CheckpointFacts, Job
from audit.models.bases import mismatches
from audit.models.experts import changed_by, expert_of_item
from audit.models.families.identify import Family
from audit.recovery.settle import settled
from audit.references import ReferenceSets
from audit.report.pages import Answers
from audit.states import ItemState
from audit.workspace import Workspace
from audit.workspace.workspace import condition

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.engine.work import Stage

CHUNK = 500


@dataclass
class Skipped:
    """Items that are not audited, by reason."""

    counts: dict[str, int]

    def add(self, reason: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1


class Due:
    """The audits that the configuration asks for and the workspace does not have, read from the catalog in chunks.

    An audit is there when it is sampled, matched with every reference set that is named, as the set and its decoys are
    now, and reported: its page tells so. One that lacks only the latter is brought up to date. The same tensors seen in
    several places are one audit, with the captions of all of them. ``given_up`` are not tried again, and ``suspects``,
    whose worker has died before, come last: who is hit by chance is not hit again at every start, and who crashes keeps
    nobody waiting. ``others`` are stages that other packages add: an audit is there when they are done, too. Raises
    ReferenceSetError for a set that is not there.
    """

    def __init__(
        self,
        workspace: Workspace,
        config: Config,
        skipped: Skipped,
        given_up: Set[str] = frozenset(),
        suspects: Set[str] = frozenset(),
        bench: Bench | None = None,
        others: Sequence[Stage] = (),
    ) -> None:
        self.others = others
        self.given_up, self.suspects = given_up, suspects
        self.workspace, self.config, self.skipped = workspace, config, skipped
        part, _, parts = config.run.shard.partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            raise ConfigError(f"run.shard = {config.run.shard!r}: write I/N with I from 0 to N - 1, such as 0/4")
        self.part, self.parts = int(part), int(parts)
        self.total = 0  # networks that the condition names
        self.passed = 0  # of those, how many have their result already, or cannot be tried
        self._bench = bench
        self._bases = Bases(workspace, config, self._at_bench)
        self._descriptor = self._describe(config.descriptor)
        sets = ReferenceSets(workspace)
        for name in config.references:
            sets.require(name, self._descriptor)
        self._answers = Answers(workspace, config.references, self._descriptor.name, config.verdict)

    def _describe(self, source: str) -> DescriptorFacts:
        """The descriptor; one of the user's own is loaded, so that what does not load is refused before anything."""
        return descriptor_facts(source) if source in DESCRIPTORS else self._at_bench().described_by(source)

    def _at_bench(self) -> Bench:
        from audit.bench import Bench

        self._bench = self._bench or Bench()
        return self._bench

    def __iter__(self) -> Iterator[Job]:
        taken = 0
        held: list[Job] = []
        limit = self.config.run.limit
        for unsettled in self._chunks():
            jobs = self._settled(unsettled)
            known = self.workspace.rows(
                "SELECT audit_id FROM audits WHERE audit_id IN (SELECT unnest(?::VARCHAR[]))",
                [[job.id for job in jobs]],
            )
            done = {row["audit_id"] for row in known if row["audit_id"] in self._answers}
            for job in jobs:
                if limit is not None and taken >= limit:
                    return
                if (
                    job.id in done and all(one.done(job, self.workspace) for one in self.others)
                ) or job.id in self.given_up:
                    self.passed += 1
                    continue
                if job.id in self.suspects:
                    held.append(job)
                    continue
                taken += 1
                yield job
        yield from held if limit is None else held[: limit - taken]

    def _settled(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose captions are settled, with them; the others were given up, or a stopped run has not come to."""
        found = [job for job in settled(jobs, self.config.captions, self.workspace) if job is not None]
        self.passed += len(jobs) - len(found)
        return found

    def unsettled(self) -> Iterator[Job]:
        """The jobs whose captions are to be settled first (audit/recovery/settle.py), as many as are to be audited."""
        taken = 0
        for jobs in self._chunks():
            for job, known in zip(jobs, settled(jobs, self.config.captions, self.workspace), strict=True):
                if known is None and job.id not in self.given_up:
                    if self.config.run.limit is not None and taken >= self.config.run.limit:
                        return
                    taken += 1
                    yield job

    def _identities(self) -> list[str]:
        """The networks to audit: stored, of a known format, within the shard; uploads first, then by base model."""
        uploads = self.config.run.priority is Priority.uploads
        first = "min(CASE source WHEN 'folder' THEN 0 ELSE 1 END)" if uploads else "0"
        try:
            # What opted out is gone before the condition is looked at, and the condition is one expression.
            sql = f"""SELECT identity, {first} AS turn, min(family) AS family, min(first_seen_at) AS seen FROM (
                    SELECT * FROM checkpoints
                    WHERE identity IS NOT NULL AND format IS NOT NULL AND state <> '{ItemState.opted_out}'
                ) AS checkpoints WHERE {condition(self.config.run.where)}
                GROUP BY identity ORDER BY turn, family, seen, identity"""
            found = self.workspace.select(sql)["identity"].to_pylist()
        except duckdb.Error as error:
            raise ConfigError(f"run.where = {self.config.run.where!r} failed: {str(error)[:300]}") from error
        return [identity for identity in found if int(identity[:8], 16) % self.parts == self.part]

    def _chunks(self) -> Iterator[list[Job]]:
        """Jobs, CHUNK at a time: what the catalog says of them is read at once."""
        identities = self._identities()
        self.total = len(identities)
        for start in range(0, len(identities), CHUNK):
            chunk = identities[start : start + CHUNK]
            rows: dict[str, list[dict[str, Any]]] = {identity: [] for identity in chunk}
            for row in self.workspace.rows(
                "SELECT item_id, identity, checkpoint_sha256, tensors_sha256, format, bytes, name, base_model, family, "
                "claims, training_images, training_images_source, contradictions FROM checkpoints "
                f"WHERE state <> '{ItemState.opted_out}' AND "
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
            self._bases.measure(rows)
            found = (self._job(identity, places, claims) for identity, places in rows.items())
            yield [job for job in found if job is not None]

    def _job(self, identity: str, rows: list[dict[str, Any]], claims: dict[str, list[Caption]]) -> Job | None:
        """The job of one network seen in ``rows``, None where it has to be skipped."""
        decided = self._bases.of(identity, rows)
        base_name = decided.name
        if base_name is None:
            self.skipped.add(decided.reason)
            return None
        named = decided.row
        ranked = rank_captions(caption for row in rows for caption in claims.get(row["item_id"], []))
        captions, caption_warnings = choose_captions([], None, {}, ranked)
        counted = next((row for row in rows if row["training_images"]), None)
        known = N0(counted["training_images"], counted["training_images_source"]) if counted else None
        n0, count_warnings = choose_n0(None, {}, known)
        contradictions = sorted({text for row in rows for text in row["contradictions"] or ()})
        warnings = [*caption_warnings, *count_warnings]
        warnings += [f"claims contradict each other: {text}" for text in contradictions]
        base = self._bases.facts(base_name)
        expert = None
        if base.boundary is not None:
            expert, said = expert_of_item([row["name"] or "" for row in rows], self.config.settings.expert)
            warnings += said
            if expert is None:
                self.skipped.add(
                    "which of the base's two experts it is for is not told by its name: scan it, with --expert or the "
                    "other file as --low-noise where it does not mark them itself"
                )
                return None
        source = base.source if base_name in [*Family] else base_name
        bases = claims_in(named)
        warnings += [*decided.said, *mismatches(bases, base.name, base.sha256, source)]
        checkpoint = CheckpointFacts(
            named["checkpoint_sha256"], named["tensors_sha256"], identity, named["name"], named["format"],
            named["bytes"], named["item_id"], experts=() if expert is None else changed_by(expert),
            claimed_bases=tuple((one.text, one.source) for one in bases),
        )  # fmt: skip
        return Job(
            checkpoint, base, tuple(captions), n0,
            replace(self.config.settings, expert=expert), self._descriptor, tuple(warnings),
        )  # fmt: skip
