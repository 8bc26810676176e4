"""A hundred nano audits on a Ray cluster of three nodes while something is killed every 10 to 20 seconds.

    python -m benchmarks.chaos [--audits 100] [--seeds 10] [--load 8] [--json FILE]

Workers, nodes and the driver are killed in turn and by chance; the driver is started again each time. Fails where the
tables at the end differ, apart from times, from those of an undisturbed run over the same checkpoints.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.engine.chaos import Chaos
from tests.engine.fleet import make_uploads, make_workspace, start, tables

SETTINGS = ("settings.steps=10", "settings.images_per_training_image=8")


def differences(ours: dict[str, list[dict[str, Any]]], theirs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The first few rows and columns that differ, in words."""
    found = []
    for table, rows in ours.items():
        if len(rows) != len(theirs[table]):
            found.append(f"{table}: {len(rows)} rows, {len(theirs[table])} undisturbed")
        for one, other in zip(rows, theirs[table], strict=False):
            found += [f"{table}.{name}: {str(one[name])[:80]}, {str(other[name])[:80]} undisturbed"
                      for name in one if one[name] != other[name]]  # fmt: skip
    return found[:20]


def main(
    audits: Annotated[int, typer.Option(help="Checkpoints to audit.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of what is killed when.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Chaos runs, from that seed on.")] = 1,
    every: Annotated[float, typer.Option(help="Seconds between kills at least; twice as many at most.")] = 10.0,
    load: Annotated[int, typer.Option(min=0, help="Processes that spin beside it.")] = 0,
    most_seconds: Annotated[float, typer.Option(help="Give up after this time.")] = 3600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the outcome as JSON.")] = None,
) -> None:
    """Run undisturbed, run in chaos, compare."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_uploads(place / "uploads", audits)
        quiet = make_workspace(place / "quiet", place / "uploads")
        started = time.monotonic()
        start(quiet.root, settings=SETTINGS).communicate()
        undisturbed = time.monotonic() - started
        theirs = tables(quiet)
        outcomes = []
        for number in range(seed, seed + seeds):
            workspace = make_workspace(place / f"chaos-{number}", place / "uploads")
            chaos = Chaos(workspace, every=(every, 2 * every), seed=number, settings=SETTINGS, load=load)
            started = time.monotonic()
            state = chaos.run(most_seconds)
            ours = tables(workspace)
            attempts = workspace.rows("SELECT kind, counted, count(*) AS n FROM failures GROUP BY ALL ORDER BY ALL")
            outcomes.append({
                "seed": number, "load": load, "audits": len(ours["audits"]), "state": state["state"],
                "quarantined": state["quarantined"], "killed": chaos.killed, "failed_attempts": attempts,
                "seconds": time.monotonic() - started, "undisturbed_seconds": undisturbed, "equal": ours == theirs,
                "differences": differences(ours, theirs),
            })  # fmt: skip
            print(json.dumps(outcomes[-1], indent=2), flush=True)
            if json_file:
                json_file.write_text(json.dumps(outcomes, indent=2) + "\n")
    if not all(one["equal"] for one in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
