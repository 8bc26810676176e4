"""Writers, merges, vacuums and a reader on one workspace while processes are killed: every count must be exactly right.

    python -m tests.torture --minutes 5

Writers append rows, write and remove keys, and remove rows by a value; each says in a log of its own what it begins and
what it has done. The reader looks at all of it again and again: a row whose writing was done before is there once, one
whose removal was done before is not, and none is there twice. Clocks of the writers jump by days.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.workspace import Workspace, compaction

GRACE = 0.3  # s
KEYS = 12  # a writer rewrites
GROUPS = 4  # a writer removes by their name
ROLES = ("writer", "writer", "compactor", "compactor", "vacuum")


# The processes


def write(workspace: Workspace, log: Path, number: int) -> None:
    """Append, write, remove for ever. A line of the log is [act, name, count, done]."""
    choose = random.Random()
    jump = choose.randint(-3, 3) * 86_400 * 10**9
    real = time.time_ns
    time.time_ns = lambda: real() + jump
    count = _last_count(log)
    with log.open("a") as file:

        def say(act: str, name: str, done: bool) -> None:
            file.write(json.dumps([act, name, count, done]) + "\n")
            file.flush()

        while True:
            count += 1
            act = choose.choices(("append", "write", "remove", "remove-where"), (6, 6, 1, 0.3))[0]
            name = f"w{number}-{choose.randrange(GROUPS if act in ('append', 'remove-where') else KEYS)}"
            say(act, name, False)
            if act == "append":
                rows = [{"audit_id": f"{name}:{count}", "item_id": name, "stage": str(i)} for i in range(count % 3 + 1)]
                workspace.append("failures", [row | {"failed_at": datetime.now(UTC)} for row in rows])
            elif act == "write":
                rows = [{"audit_id": name, "kind": str(part), "images": count} for part in range(count % 4 + 1)]
                workspace.write("evaluations", name, rows)
            elif act == "remove":
                workspace.remove("evaluations", name)
            else:
                workspace.remove_where("failures", "item_id", name)
            say(act, name, True)


def _last_count(log: Path) -> int:
    return max((count for _, _, count, _ in _lines(log)), default=0)


def _lines(log: Path) -> Iterator[tuple[str, str, int, bool]]:
    """The whole lines of a log; a killed writer may leave a cut one."""
    for line in log.read_text().split("\n") if log.exists() else ():
        try:
            act, name, count, done = json.loads(line)
        except ValueError:
            continue
        yield act, name, count, done


def merge(workspace: Workspace) -> None:
    """Merge for ever."""
    while True:
        for table in ("failures", "evaluations"):
            workspace.compact(table)
        time.sleep(random.random() * 0.05)


def tidy(workspace: Workspace) -> None:
    """Tidy up for ever, mostly with a grace that is too short for readers."""
    while True:
        for table in ("failures", "evaluations"):
            workspace.vacuum(table, random.choice((0.0, GRACE)))
        time.sleep(random.random() * 0.1)


# What must be there


@dataclass
class Said:
    """What the logs say: for every name the acts in order, and whether each was done."""

    acts: dict[str, list[tuple[str, int, bool]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Said:
        """The logs of all writers."""
        said = cls()
        for log in sorted(folder.glob("*.log")):
            begun: dict[int, tuple[str, str]] = {}
            done: set[int] = set()
            for act, name, count, is_done in _lines(log):
                begun[count] = act, name
                if is_done:
                    done.add(count)
            for count in sorted(begun):
                act, name = begun[count]
                table = "failures" if act in ("append", "remove-where") else "evaluations"
                said.acts.setdefault(f"{table}/{name}", []).append((act, count, count in done))
        return said


def problems(before: Said, rows: list[dict[str, Any]], keyed: list[dict[str, Any]], after: Said) -> list[str]:
    """What is wrong with what was read between ``before`` and ``after``."""
    found = []
    seen: dict[str, list[str]] = {}
    for row in rows:
        seen.setdefault(row["audit_id"], []).append(row["stage"])
    known = set()
    for place, acts in after.acts.items():
        table, _, name = place.partition("/")
        if table != "failures":
            continue
        earlier = {count for _, count, done in before.acts.get(place, []) if done}
        wheres = [(count, count in earlier) for act, count, _ in acts if act == "remove-where"]
        for act, count, _ in acts:
            if act != "append":
                continue
            key = f"{name}:{count}"
            known.add(key)
            there = sorted(seen.get(key, []))
            removed = any(done for other, done in wheres if other > count)
            may_go = removed or any(other > count for other, _ in wheres)
            if there and there != [str(i) for i in range(count % 3 + 1)]:
                found.append(f"append {key}: rows {there}")
            if removed and there:
                found.append(f"append {key} was removed and is there")
            if count in earlier and not may_go and not there:
                found.append(f"append {key} was done and is not there")
    found += [f"append {key} was never made" for key in set(seen) - known]
    return found + _keyed_problems(before, keyed, after)


def _keyed_problems(before: Said, keyed: list[dict[str, Any]], after: Said) -> list[str]:
    found = []
    seen: dict[str, list[tuple[int, str]]] = {}
    for row in keyed:
        seen.setdefault(row["audit_id"], []).append((row["images"], row["kind"]))
    for place, acts in after.acts.items():
        table, _, name = place.partition("/")
        if table != "evaluations":
            continue
        last = max((count for _, count, done in before.acts.get(place, []) if done), default=0)
        possible = [(act, count) for act, count, _ in acts if count >= last]
        allowed = [
            sorted((count, str(part)) for part in range(count % 4 + 1)) if act == "write" else []
            for act, count in possible
        ]
        if last == 0:
            allowed.append([])
        there = sorted(seen.get(name, []))
        if there not in allowed:
            found.append(f"key {name}: {there} where {possible} may be, {last} was done")
    return found


# The run


@dataclass
class Outcome:
    """What a run did and found."""

    seconds: float = 0.0
    polls: int = 0
    kills: int = 0
    acts: int = 0
    unfinished: int = 0
    rows: int = 0
    manifests: int = 0
    files: int = 0
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, seconds: float, seed: int = 0) -> Outcome:
    """Let the processes run for ``seconds`` while one is killed about every second; what came of it."""
    choose, outcome = random.Random(seed), Outcome()
    place, logs = folder / "w", folder / "logs"
    logs.mkdir(parents=True)
    workspace = Workspace(place)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(number: int) -> subprocess.Popen[bytes]:
        arguments = [ROLES[number], str(place), str(logs / f"{number}.log"), str(number)]
        return subprocess.Popen([sys.executable, "-m", "tests.torture", "--role", *arguments], env=environment)

    running = [start(number) for number in range(len(ROLES))]
    started = time.monotonic()
    next_kill = started + 3.0
    try:
        while time.monotonic() - started < seconds:
            outcome.wrong += poll(workspace, logs)
            outcome.polls += 1
            for number, process in enumerate(running):
                if process.poll() is not None:
                    outcome.wrong.append(f"{ROLES[number]} ended by itself with {process.returncode}")
                    running[number] = start(number)
            if time.monotonic() > next_kill:
                number = choose.randrange(len(running))
                running[number].send_signal(signal.SIGKILL)
                running[number].wait()
                outcome.kills += 1
                running[number] = start(number)
                next_kill = time.monotonic() + choose.uniform(0.3, 2.0)
            if len(outcome.wrong) > 20:
                break
    finally:
        for process in running:
            process.kill()
            process.wait()
    outcome.seconds = time.monotonic() - started
    outcome.wrong += poll(workspace, logs)
    for table in ("failures", "evaluations"):
        compaction.compact(workspace.table(table), force=True)
        workspace.vacuum(table, 0.0)
        workspace.vacuum(table, 0.0)
    outcome.wrong += poll(workspace, logs)
    said = Said.read(logs)
    outcome.acts = sum(len(acts) for acts in said.acts.values())
    outcome.unfinished = sum(not done for acts in said.acts.values() for _, _, done in acts)
    outcome.rows = sum(
        workspace.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in ("failures", "evaluations")
    )
    outcome.manifests = sum(workspace.table(table).chain.newest() for table in ("failures", "evaluations"))
    outcome.files = len(list((place / "tables").rglob("*.parquet")))
    return outcome


def poll(workspace: Workspace, logs: Path) -> list[str]:
    """Read everything once; what is wrong."""
    before = Said.read(logs)
    rows = workspace.rows("SELECT audit_id, stage FROM failures")
    keyed = workspace.rows("SELECT audit_id, kind, images FROM evaluations")
    return problems(before, rows, keyed, Said.read(logs))


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of what is killed when.")] = 0,
    role: Annotated[
        tuple[str, str, str, int], typer.Option(hidden=True, help="Be one of the processes: role, place, log, number.")
    ] = ("", "", "", 0),
) -> None:
    """Run it and print what came of it; exit code 1 where a count was wrong."""
    if role[0]:
        workspace = Workspace(role[1])
        if role[0] == "writer":
            write(workspace, Path(role[2]), role[3])
        merge(workspace) if role[0] == "compactor" else tidy(workspace)
    with tempfile.TemporaryDirectory() as folder:
        outcome = torture(Path(folder), minutes * 60, seed)
    print(json.dumps(outcome.__dict__, indent=2))
    if outcome.wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
