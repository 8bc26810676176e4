"""Which runs work on a workspace. ``runs/`` has a file a run with its heartbeat; ``runs/leases/`` says who holds what.

A lease document lists the holders of all shards. Who takes a shard creates the next document, which one of all who try
can do: so of two runs that start together one goes on, and a dead run's shard goes to exactly one.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

from audit.errors import WorkspaceError
from audit.files import Files
from audit.workspace.chain import Chain

STALE = 60.0  # s without a heartbeat after which a run counts as dead
LATEST = 2.0**37  # Unix seconds; what lies behind it is no time
KEPT = 8  # lease documents
TRIES = 50


@dataclass(frozen=True)
class Holder:
    """A run that works on a shard, such as 0/1."""

    run_id: str
    shard: str
    host: str
    pid: int

    @property
    def shards(self) -> str:
        """How many shards there are, as written."""
        return self.shard.partition("/")[2]


def is_recent(heartbeat: Any) -> bool:
    """Whether a heartbeat (Unix seconds) is of now; one that lies in the future is none."""
    return isinstance(heartbeat, int | float) and 0 <= heartbeat < LATEST and abs(time.time() - heartbeat) < STALE


def _document(content: bytes | None) -> dict[str, Any]:
    """A JSON object, empty where ``content`` is none: damaged, half written, or of something else."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_alive(files: Files, run_id: str) -> bool:
    """Whether the run says that it is running, and has said so lately; also one of another version."""
    said = _document(files.read(f"runs/{run_id}.json"))
    return said.get("state") == "running" and is_recent(said.get("heartbeat_at"))


def alive_runs(files: Files) -> list[Holder]:
    """The runs that say they are running, whether they hold a lease or not, as before version 3."""
    found = []
    for name in files.names("runs"):
        run_id = name.removesuffix(".json")
        if run_id != name and is_alive(files, run_id):
            said = _document(files.read(f"runs/{name}"))
            found.append(_holder({**said, "run_id": run_id}) or Holder(run_id, "0/1", "an unknown host", 0))
    return found


def _holder(said: Any) -> Holder | None:
    try:
        holder = Holder(said["run_id"], said["shard"], said["host"], said["pid"])
    except (KeyError, TypeError):
        return None
    texts = (holder.run_id, holder.shard, holder.host)
    return holder if all(isinstance(text, str) for text in texts) and "/" not in holder.run_id else None


class Leases:
    """The leases of a workspace."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.chain = Chain(files, "runs/leases")

    def holders(self) -> list[Holder]:
        """Who holds a shard by the newest document that is not damaged, dead or alive."""
        for number in reversed(self.chain.numbers()):
            said = _document(self.chain.read(number)).get("holders")
            if isinstance(said, list):
                found = [_holder(one) for one in said]
                return [holder for holder in found if holder is not None]
        return []

    def take(self, mine: Holder) -> None:
        """Take the shard of ``mine``, whose file in ``runs/`` has a heartbeat by now.

        Raises WorkspaceError where a run that is alive has it, or shares the work in another way.
        """
        for _ in range(TRIES):
            number = self.chain.newest()
            others = [one for one in self.holders() if one.run_id != mine.run_id]
            alive = [one for one in others if is_alive(self.files, one.run_id)]
            for other in alive:
                self._check(mine, other)
            holders = [asdict(one) for one in (*alive, mine)]
            document = {"holders": holders, "token": secrets.token_hex(8)}
            if self.chain.add(number + 1, json.dumps(document).encode()) and self.held(mine.run_id):
                for old in self.chain.numbers()[:-KEPT]:
                    self.chain.remove(old)
                return
        raise WorkspaceError(f"the leases of {self.files} change too fast: start fewer runs at a time")

    def held(self, run_id: str) -> bool:
        """Whether the run still holds its shard: one whose heartbeat stood still may have lost it."""
        return any(one.run_id == run_id for one in self.holders())

    def _check(self, mine: Holder, other: Holder) -> None:
        if other.shards != mine.shards:
            raise WorkspaceError(
                f"run {other.run_id} shares the work of {self.files} in another way (shard {other.shard}): use the "
                "same number of shards"
            )
        if other.shard == mine.shard:
            raise WorkspaceError(
                f"run {other.run_id} on {other.host} (process {other.pid}) works on {self.files} (shard "
                f"{other.shard}): wait for it, stop it, or share the work with --shard. A run that was killed counts "
                f"as gone {STALE:.0f} s after its last sign of life"
            )
