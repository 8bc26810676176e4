"""Runs the kinds in processes of their own, and looks on: one that hangs is killed, one that dies is started again."""

from __future__ import annotations

import base64
import json
import multiprocessing
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import worker
from tests.fuzz.worker import KINDS, Finding, input_of, work

POLL = 0.05  # s
MOST_RESTARTS = 20  # of a kind
KEPT_OF_A_PLACE = 3  # findings written of one cause; all are counted
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Result:
    """What the inputs of a kind did. ``slowest`` in ms, ``growth`` in MiB over what the worker had at its start."""

    kind: str
    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    crashes: int = 0
    hangs: int = 0
    memory: int = 0
    slowest: float = 0.0
    growth: float = 0.0
    seconds: float = 0.0
    places: Counter[str] = field(default_factory=Counter)

    @property
    def findings(self) -> int:
        """How many inputs broke a promise."""
        return self.crashes + self.hangs + self.memory


class Supervisor:
    """Runs inputs of one seed; findings go to files in ``folder``, from which ``replay`` reads them."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        tell: Callable[[str], None],
        nice: int = 0,
        hang: float | None = None,
        start: str = "spawn",
    ) -> None:
        self.seed, self.folder, self.tell, self.nice, self.hang = seed, folder, tell, nice, hang
        self._context: Any = multiprocessing.get_context(start)

    def run(self, name: str, inputs: int, until: float) -> Result:
        """Read ``inputs`` inputs of the kind ``name``, no longer than to the time ``until`` (monotonic, s)."""
        result, begun, first = Result(name), time.monotonic(), 0
        root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="lora-audit-fuzz-", dir=root) as place:
            for _ in range(MOST_RESTARTS):
                following = self._worker(result, first, inputs, until, place)
                if following is None:
                    break
                first = following
                if first >= inputs or time.monotonic() >= until:
                    break
        result.inputs = result.refused + result.accepted + result.crashes + result.hangs
        result.seconds = time.monotonic() - begun
        return result

    def _worker(self, result: Result, first: int, last: int, until: float, place: str) -> int | None:
        """One process, to its end; the input to go on with, None where all are done."""
        seen = self._context.Array("d", worker.FIELDS, lock=False)
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (result.kind, self.seed, first, last, until, seen, theirs, place, self.nice)
        process = self._context.Process(target=work, args=arguments)
        process.start()
        theirs.close()
        told, ended = time.monotonic(), None
        patience = self.hang or KINDS[result.kind].patience
        while True:
            alive = process.is_alive()
            try:
                while ours.poll(POLL if alive else 0):
                    said = ours.recv()
                    if isinstance(said, Finding):
                        self._found(result, said)
                    else:
                        ended = said[1]
            except EOFError:
                alive = False
            started = seen[worker.STARTED]  # once: it is 0 between two inputs
            if started and time.monotonic() - started > patience and alive:
                process.kill()
                process.join()
                self._found(result, self._lost(result, seen, "hang", f"no answer after {patience:.0f} s"))
                break
            if not alive:
                process.join()
                if ended is None and process.exitcode != 0:
                    how = f"the process ended with {process.exitcode}, {_signal(process.exitcode)}"
                    said = (Path(place) / worker.STDERR).read_text(errors="replace")[-6000:]
                    self._found(result, self._lost(result, seen, "crash", how, f"{how}\n{said}"))
                break
            if time.monotonic() - told > 10:
                told = time.monotonic()
                done = result.accepted + result.refused + seen[worker.ACCEPTED] + seen[worker.REFUSED]
                self.tell(f"{result.kind}: {done:,.0f} of {last:,} inputs, {result.findings} findings")
        result.accepted += int(seen[worker.ACCEPTED])
        result.refused += int(seen[worker.REFUSED])
        result.slowest = max(result.slowest, seen[worker.SLOWEST] * 1000)
        result.growth = max(result.growth, seen[worker.GROWTH])
        if ended is not None:
            return ended if ended < last and time.monotonic() < until else None
        return int(seen[worker.INDEX]) + 1

    def _lost(self, result: Result, seen: Any, what: str, how: str, details: str = "") -> Finding:
        return Finding(result.kind, self.seed, int(seen[worker.INDEX]), what, how, details or how)

    def _found(self, result: Result, finding: Finding) -> None:
        counted = {"crash": "crashes", "hang": "hangs", "memory": "memory"}[finding.what]
        setattr(result, counted, getattr(result, counted) + 1)
        result.places[finding.where] += 1
        if result.places[finding.where] <= KEPT_OF_A_PLACE:
            path = self._keep(finding)
            self.tell(f"{finding.kind}: {finding.what} ({finding.where}): {path}")

    def _keep(self, finding: Finding) -> Path:
        """Write ``finding`` with its input, so that it can be replayed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{finding.kind}-{finding.seed}-{finding.index}-{finding.what}.json"
        with tempfile.TemporaryDirectory(prefix="lora-audit-fuzz-") as place:
            data = input_of(KINDS[finding.kind](Path(place)), finding.seed, finding.index)
        document = {**asdict(finding), "input": base64.b64encode(data).decode()}
        path.write_text(json.dumps(document, indent=1))
        return path


def _signal(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else "no signal"


def replay(path: Path) -> None:
    """Read the input of a finding in this process. Raises what it raises."""
    document = json.loads(path.read_text())
    with tempfile.TemporaryDirectory(prefix="lora-audit-fuzz-") as place:
        kind = KINDS[document["kind"]](Path(place))
        try:
            kind.check(base64.b64decode(document["input"]))
        except kind.refusals as error:
            print(f"refused: {type(error).__name__}: {error}"[:2000])
        else:
            print("accepted")
