"""A run: everything in the catalog that has no result yet, through an engine, with what happens recorded as it happens.

What must survive the driver is in the workspace: results (by the stages), failed attempts (the failures table), and the
run itself in ``runs/``, which is also the lease that keeps a second run of the same shard away.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from audit import metrics
from audit.config import CaptionChoice, Config, EngineName
from audit.custody.keep import NOBODY, Custody, sign_one_of_many
from audit.engine.due import Due, Skipped
from audit.engine.local import LocalEngine
from audit.engine.places import OpenWorkspace
from audit.engine.state import RunState
from audit.engine.work import Event, OpenPlace, Place
from audit.errors import WorkspaceError
from audit.files import shown
from audit.job import Job
from audit.locations import plain_without_credentials
from audit.recovery.settle import Settle
from audit.report.index import Answer, Together, together, write_index
from audit.stages import (
    Clustered,
    Control,
    Controlled,
    Matched,
    Membership,
    Remembered,
    Report,
    Reported,
    Sampled,
    is_ours,
    stages_for,
)  # fmt: skip
from audit.states import Attempt, Happening, Needs, RunStatus, Verdict
from audit.workspace import Workspace
from audit.workspace.leases import STALE, Holder, Leases

HEARTBEAT = 10.0  # s
KINDS: dict[str, Any] = {
    "sample": Sampled, "control": Controlled, "membership": Remembered, "cluster": Clustered, "match": Matched,
    "report": Reported,
}  # fmt: skip
MOST_LISTED = 1000  # matched audits that a run's state names; its index page has all


class Run:
    """One run. ``tell`` hears of its state at every event; setting ``stop`` lets it drain and end.

    ``custody`` says whose run it is; pages are signed here, as they come, and no worker sees the key.
    """

    def __init__(
        self,
        config: Config,
        tell: Callable[[RunState], None] | None = None,
        stop: threading.Event | None = None,
        custody: Custody = NOBODY,
    ) -> None:
        self.config, self.tell, self.custody = config, tell or (lambda state: None), custody
        self.workspace = Workspace(config.workspace)
        self.stop = stop or threading.Event()
        self.skipped = Skipped({})
        now = time.time()
        self.state = RunState(
            run_id=f"{int(now)}-{secrets.token_hex(4)}",
            shard=config.run.shard,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=now,
            config=plain_without_credentials(_plain(asdict(replace(config, workspace=shown(config.workspace))))),
            heartbeat_at=now,
        )
        self._lock = threading.Lock()
        self._leases = Leases(self.workspace.files)
        self._holder = Holder(self.state.run_id, self.state.shard, self.state.host, self.state.pid)
        self._evicted = False
        self._failed_before: set[str] = set()  # audits with an attempt on record that failed
        self._answers: list[Answer] = []
        self._peak_memory = 0
        self._failed_at = datetime.fromtimestamp(0, UTC)

    def run(self) -> RunState:
        """Do the work; the final state. Raises AuditError where it cannot begin, and where results cannot be kept."""
        self._take_lease()
        beating = threading.Thread(target=self._beat, daemon=True)
        done = threading.Event()
        self._done = done
        beating.start()
        try:
            self._work()
            if self._evicted:
                raise WorkspaceError(
                    f"this run ({self.state.run_id}) gave no sign of life for {STALE:.0f} s, or its clock is wrong, "
                    "and another one took its work over: see 'lora-audit status'"
                )
            self.state.state = RunStatus.stopped if self.stop.is_set() else RunStatus.done
        except BaseException:
            self.state.state = RunStatus.broken
            raise
        finally:
            done.set()
            self._write_end()
        return self.state

    def _write_end(self) -> None:
        """The final state; where there is no room for it, none: the shard is not to count as taken."""
        try:
            self._write()
        except (WorkspaceError, OSError):
            self.workspace.files.remove(f"runs/{self.state.run_id}.json")
            raise

    def _take_lease(self) -> None:
        """Take the shard. The heartbeat comes first: without one a lease is a dead run's."""
        self._write()
        try:
            self._leases.take(self._holder)
        except BaseException:
            self.workspace.files.remove(f"runs/{self.state.run_id}.json")
            raise

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                self._write()
                if self._leases.held(self.state.run_id):
                    continue
            except (WorkspaceError, OSError):  # the next beat may get through; if none does, results cannot be kept
                continue
            self._evicted = True
            self.stop.set()
            return

    def _write(self) -> None:
        with self._lock:
            self.state.heartbeat_at = time.time()
            document = json.dumps(asdict(self.state)).encode()
        self.workspace.files.write(f"runs/{self.state.run_id}.json", document)

    def _work(self) -> None:
        config = self.config
        failed_before, given_up = self._failures()
        self._failed_before = set(failed_before)
        open_place = self._open_place()
        bench = open_place(Needs.gpu).bench if config.run.engine is EngineName.local else None
        report = Report(config.references, config.verdict, self.custody.without_key())
        stages = [report if isinstance(stage, Report) else stage for stage in stages_for(config.references)]
        asked = (Control.name, Membership.name)  # of finished audits, too: what they lack is made up for
        others = [stage for stage in stages if not is_ours(stage.name) or stage.name in asked]
        due = Due(self.workspace, config, self.skipped, given_up, failed_before.keys(), bench, others)
        if config.captions.choice is CaptionChoice.auto:
            self._settle(due, open_place, failed_before)
        engine = self._engine()
        for event in engine.run(iter(due), stages, open_place, self.stop, failed_before):
            self._take(event)
            self._count(due)
            self.state.workers = engine.workers
            self.state.skipped = dict(self.skipped.counts)
            metrics.workers.set(engine.workers)
            self.tell(self.state)
            hours = config.run.max_gpu_hours
            if hours is not None and self.state.gpu_hours >= hours:
                self.stop.set()
        self.state.skipped = dict(self.skipped.counts)
        for count in self.state.skipped.values():
            metrics.audits.labels("skipped").inc(count)
        self.compact()
        if self._answers:
            found = together(self.workspace, self._answers, config.references, config.verdict)
            self._conclude(found)
            self.state.index = write_index(self.workspace, self.state.run_id, config.references, found)

    def _settle(self, due: Due, open_place: OpenPlace, failed_before: dict[str, int]) -> None:
        """Settle captions, through an engine of its own; what is not settled by then is not audited."""
        jobs = due.unsettled()
        for event in self._engine().run(jobs, [Settle(self.config.captions)], open_place, self.stop, failed_before):
            if event.what is Happening.finished:
                self.state.running -= 1
            else:
                self._take(event)
            self.tell(self.state)
        self.skipped.counts.clear()  # they are counted when audits are due

    def _conclude(self, found: Together) -> None:
        """Let the state say what matches over all audits of the run."""
        state, matched = self.state, found.those(Verdict.match)
        state.compared, state.expected = found.compared, found.expected
        state.matches, state.matched_audits = sum(one.matches for one in matched), len(matched)
        state.matched = [asdict(one) for one in matched[:MOST_LISTED]]
        state.uncalibrated = len(found.those(Verdict.uncalibrated))
        state.possible = len(found.those(Verdict.possible))
        state.told_nothing = sum(one.tells_nothing for one in found.answers)

    def _count(self, due: Due) -> None:
        state = self.state
        ended = due.passed + state.finished + state.failed + state.quarantined + sum(self.skipped.counts.values())
        left = due.total - ended - state.running
        taken = state.finished + state.failed + state.quarantined + state.running
        if self.config.run.limit is not None:
            left = min(left, self.config.run.limit - taken)
        state.waiting = max(0, left)
        metrics.queue_length.set(state.waiting)

    def _open_place(self) -> OpenPlace:
        """What opens the place of a worker; in this process there is one, which the catalog is read with too."""
        config = self.config
        if config.run.engine is EngineName.local:
            from audit.bench import Bench
            from audit.devices import default_device

            place = Place(
                self.workspace, Bench(config.run.device or default_device(), config.run.batch_size, config.run.compile)
            )
            return lambda needs: place
        where = config.workspace if "://" in config.workspace else os.path.abspath(config.workspace)
        return OpenWorkspace(where, config.run.batch_size, config.run.compile, config.run.device)

    def _engine(self) -> Any:
        run = self.config.run
        if run.engine is EngineName.local:
            return LocalEngine(run.attempts)
        from audit.engine.ray import RayEngine, RayOptions

        return RayEngine(RayOptions.of(run), self._progress, self._deaths())

    def _progress(self, job: Job) -> tuple[bool, int]:
        spool = self.workspace.spool(job.id)
        others = (self.workspace.spool(job.id, stage.batch).batches() for stage in (Control, Membership))
        return spool.take_begun(), spool.batches() + sum(others)

    def _deaths(self) -> dict[str, int]:
        """Workers that died under each audit within a day: what kills them may go on."""
        since = datetime.now(UTC) - timedelta(days=1)
        rows = self.workspace.rows(
            "SELECT audit_id, count(*) AS n FROM failures WHERE kind = 'worker-died' AND failed_at > ? GROUP BY ALL",
            [since],
        )
        return {row["audit_id"]: row["n"] for row in rows}

    def _failures(self) -> tuple[dict[str, int], set[str]]:
        """Counted attempts by audit, and the audits that are not to be tried again."""
        rows = self.workspace.rows(
            """SELECT audit_id, count(*) FILTER (WHERE counted) AS attempts, bool_or(state <> 'retry') AS over
            FROM failures AS f WHERE failed_at > coalesce((SELECT max(failed_at) FROM failures AS g
                WHERE g.audit_id = f.audit_id AND g.state = 'forgiven'), TIMESTAMPTZ 'epoch')
            GROUP BY audit_id"""
        )
        [latest] = self.workspace.rows("SELECT max(failed_at) AS at FROM failures")
        self._failed_at = latest["at"] or self._failed_at
        over = {row["audit_id"] for row in rows if row["over"]}
        metrics.quarantined.set(len(over))
        return {row["audit_id"]: row["attempts"] for row in rows}, over

    def _take(self, event: Event) -> None:
        state = self.state
        if event.what is Happening.started:
            state.running += 1
        elif event.what is Happening.passed:
            self._busy(event.seconds)
        elif event.what is Happening.finished:
            state.running -= 1
            state.finished += 1
            self._measured(event)
            self._answered(event)
            metrics.audits.labels("finished").inc()
            metrics.last_finished.set_to_current_time()
            if state.finished % self.config.run.compact_every == 0:
                self.compact()
        else:
            state.running -= 1
            self._failed(event)
        metrics.running.set(state.running)

    def _busy(self, seconds: float) -> None:
        self.state.busy_seconds += seconds
        self.state.gpu_hours += seconds * (self.config.run.gpus_per_worker or 1.0) / 3600
        metrics.busy_seconds.inc(seconds)

    def _measured(self, event: Event) -> None:
        state = self.state
        sampled = event.record(Sampled) or Sampled(0.0, 0.0, 0, 0, 0)
        metrics.stage_seconds.labels("load").observe(sampled.seconds_loading)
        for name, kind in KINDS.items():
            record = event.record(kind)
            metrics.stage_seconds.labels(name).observe(record.seconds if record else 0.0)
        state.images += sampled.images
        controlled, remembered = event.record(Controlled), event.record(Remembered)
        evaluations = sampled.evaluations + sum(one.evaluations for one in (controlled, remembered) if one)
        state.evaluations += evaluations
        metrics.images.inc(sampled.images)
        metrics.evaluations.inc(evaluations)
        self._peak_memory = max(self._peak_memory, sampled.peak_memory)
        metrics.gpu_memory.set(self._peak_memory)

    def _answered(self, event: Event) -> None:
        """Keep what the audit found, for the list at the end; an earlier failure of it is no news any more."""
        state, job = self.state, event.job
        said = event.record(Reported) or Reported(0.0, "", None, 0, 0, False)
        sign_one_of_many(self.workspace, said.page, self.custody)
        answer = Answer(
            job.id, job.name, job.item_id, said.verdict, said.matches, said.matched_sets, said.page, said.tells_nothing
        )
        state.matches += answer.matches
        state.matched_audits += answer.verdict is Verdict.match
        state.told_nothing += answer.tells_nothing
        metrics.matches.inc(answer.matches)
        metrics.verdicts.labels(answer.verdict or metrics.NOTHING).inc()
        state.uncalibrated += answer.verdict is Verdict.uncalibrated
        state.possible += answer.verdict is Verdict.possible
        self._answers.append(answer)
        if answer.verdict is Verdict.match and len(state.matched) < MOST_LISTED:
            state.matched.append(asdict(answer))
        if job.id in self._failed_before:
            now = Event(Happening.finished, job, reason="it is finished now")
            self.workspace.append("failures", [self._failure_row(now, Attempt.forgiven)])

    def _failed(self, event: Event) -> None:
        state = self.state
        if event.what is Happening.retry:
            state.retries += 1
            metrics.retries.labels(event.kind if event.kind in metrics.RETRY_REASONS else "error").inc()
        else:
            state.failed += event.what is Happening.failed
            if event.what is Happening.failed:  # of no use to go on with; what a quarantined one has is kept
                self.workspace.spool(event.job.id).discard()
            state.quarantined += event.what is Happening.quarantined
            metrics.audits.labels(event.what).inc()
            metrics.quarantined.inc()
        self._failed_before.add(event.job.id)
        self.workspace.append("failures", [self._failure_row(event, Attempt(event.what))])

    def _failure_row(self, event: Event, state: Attempt) -> dict[str, Any]:
        # later than all before it, also after a clock was set back: the latest word on an audit holds
        self._failed_at = max(datetime.now(UTC), self._failed_at + timedelta(microseconds=1))
        return {
            "audit_id": event.job.id,
            "item_id": event.job.item_id,
            "name": event.job.name,
            "stage": event.stage,
            "kind": event.kind or "",
            "reason": event.reason,
            "counted": event.counted,
            "state": state,
            "run_id": self.state.run_id,
            "failed_at": self._failed_at,
        }

    def compact(self) -> dict[str, int]:
        """Merge the small files of the tables that grow with audits; by the first shard alone."""
        if not self.state.shard.startswith("0/"):
            return {}
        tables = (
            "audits", "generations", "control_generations", "extractions", "matches", "memberships", "chances",
            "set_chances", "evaluations", "base_losses", "latents", "denoised", "failures", "references",
        )  # fmt: skip
        return {table: self.workspace.compact(table) for table in tables}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
