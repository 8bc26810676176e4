"""``python -m tests.fuzz --minutes 10``: changed files and answers of strangers, read as the product reads them."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.fuzz.supervise import Result, Supervisor, replay
from tests.fuzz.worker import KINDS

COLUMNS = (
    "kind",
    "inputs",
    "refused",
    "accepted",
    "crashes",
    "hangs",
    "memory",
    "slowest ms",
    "growth MiB",
    "bound MiB",
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Changed files and answers of strangers.")
    parser.add_argument("--minutes", type=float, help="stop after so long; each kind has the same time")
    parser.add_argument("--inputs", type=int, help="inputs over all kinds; cheap kinds have most [default: 1,000,000]")
    parser.add_argument("--kinds", help=f"some of {','.join(KINDS)} [default: all]")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other inputs")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    parser.add_argument("--nice", type=int, default=10, help="how far the workers give way to other programs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read the input of a finding, in this process")
    return parser.parse_args()


def shares(names: list[str], inputs: int) -> dict[str, int]:
    """How many of ``inputs`` are of each kind, at least one."""
    total = sum(KINDS[name].share for name in names)
    return {name: max(1, round(inputs * KINDS[name].share / total)) for name in names}


def table(results: list[Result]) -> str:
    """The figures as Markdown."""
    rows = [[one.kind, f"{one.inputs:,}", f"{one.refused:,}", f"{one.accepted:,}", one.crashes, one.hangs, one.memory,
             f"{one.slowest:.0f}", f"{one.growth:.0f}", KINDS[one.kind].memory] for one in results]  # fmt: skip
    total = ["all", *(f"{sum(getattr(one, name) for one in results):,}" for name in
                      ("inputs", "refused", "accepted", "crashes", "hangs", "memory")),
             f"{max((one.slowest for one in results), default=0):.0f}", "", ""]  # fmt: skip
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows, total]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figures(results: list[Result], seed: int, seconds: float) -> dict[str, Any]:
    """The figures for a file."""
    told = [
        {
            **asdict(one),
            "places": dict(one.places),
            "bound": KINDS[one.kind].memory,
            "patience": KINDS[one.kind].patience,
        }
        for one in results
    ]
    return {
        "command": "python -m tests.fuzz " + " ".join(sys.argv[1:]), "seed": seed, "seconds": round(seconds),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(), "inputs": sum(one.inputs for one in results), "kinds": told,
    }  # fmt: skip


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run; 1 where something was found."""
    asked = arguments()
    if asked.replay:
        replay(asked.replay)
        return 0
    names = asked.kinds.split(",") if asked.kinds else list(KINDS)
    if unknown := set(names) - set(KINDS):
        print(f"there is no kind {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    supervisor = Supervisor(asked.seed, asked.findings, tell, asked.nice)
    most = 10**9 if asked.minutes and asked.inputs is None else asked.inputs or 1_000_000
    results = []
    for name, inputs in shares(names, most).items():
        until = time.monotonic() + 60 * asked.minutes / len(names) if asked.minutes else float("inf")
        results.append(supervisor.run(name, inputs, until))
        tell(f"{name}: {results[-1].inputs:,} inputs in {results[-1].seconds:.0f} s")
        if asked.json:  # after each kind: what is done is not lost where it is stopped
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(figures(results, asked.seed, time.monotonic() - begun), indent=1) + "\n")
    print(table(results))
    return 1 if any(one.findings for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
