"""What the Ray engine costs: how busy it keeps workers, and what an audit costs the driver.

    python -m benchmarks.scale [--json FILE]              # both parts, some minutes
    python -m benchmarks.scale --part efficiency          # real audits on one and on two workers, one thread each
    python -m benchmarks.scale --part overhead            # a stage that sleeps, on 1 to 64 logical GPUs

efficiency: the same nano audits on one and on two real workers; busy_share is the share of the workers' time that went
into audits, from the first start to the last end. overhead: stages that sleep --sleep seconds; busy_share likewise,
overhead_seconds_per_audit is the driver's CPU time an audit, driver_mib its resident size at the end, and the slope
compares the last tenth of the audits with the first.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import typer

from audit.config import load_config
from audit.demo import ASSETS
from audit.engine.due import Due, Skipped
from audit.engine.places import OpenWorkspace
from audit.engine.ray import RayEngine, RayOptions
from audit.engine.work import OpenPlace, Place, Stage, Work
from audit.stages import stages_for
from audit.states import Happening, Needs


class Sleeping:
    """A stage that takes time and nothing else."""

    def __init__(self, name: str, needs: Needs, seconds: float) -> None:
        self.name, self.needs, self.seconds = name, needs, seconds

    def done(self, job: Nap, workspace: None) -> bool:
        """Never."""
        return False

    def run(self, job: Nap, workspace: None, bench: None, tell: Any = None) -> None:
        """Sleep."""
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Nap:
    """A job of them."""

    id: str
    group: str


def resident_mib() -> float:
    """Resident size of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def driver_seconds() -> float:
    """CPU time of this process, s."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(
    options: RayOptions, jobs: Iterator[Work], stages: Sequence[Stage], open_place: OpenPlace
) -> dict[str, Any]:
    """Run the jobs; the row."""
    engine = RayEngine(options)
    begun: dict[str, float] = {}
    ends: list[tuple[float, float, float]] = []
    busy, first, last = 0.0, 0.0, 0.0
    cpu = driver_seconds()
    for event in engine.run(jobs, stages, open_place, threading.Event(), {}):
        now = time.monotonic()
        if event.what is Happening.started:
            begun[event.job.id] = now
        elif event.what is Happening.passed and event.seconds:
            busy += event.seconds
            last = now
            # the workers are all there once each has ended one task: their start is not what is measured
            first = first or (now if len(ends) >= engine.workers else 0.0)
            if not first:
                busy = 0.0
            ends.append((now, driver_seconds(), resident_mib()))
        elif event.what in (Happening.failed, Happening.quarantined):
            raise RuntimeError(f"{event.job.id}: {event.reason}")
        begun.pop(event.job.id, None) if event.what is Happening.finished else None
    seconds = last - first
    tenth = max(1, len(ends) // 10)
    rate = [
        (ends[to - 1][1] - ends[at][1]) / (to - at) for at, to in ((tenth, 2 * tenth), (len(ends) - tenth, len(ends)))
    ]
    return {
        "workers": options.max_workers,
        "audits": len(ends),
        "busy_share": min(1.0, busy / max(1e-9, seconds) / (options.max_workers or 1)),
        "seconds": seconds,
        "overhead_seconds_per_audit": (driver_seconds() - cpu) / len(ends),
        "overhead_slope": rate[1] / max(1e-9, rate[0]),
        "driver_mib": ends[-1][2],
        "driver_mib_growth": ends[-1][2] - ends[tenth][2],
    }


def overhead(workers: int, audits: int, sleep: float) -> dict[str, Any]:
    """Sleeping stages on logical GPUs."""
    ray.init(num_cpus=workers + 2, num_gpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        options = RayOptions(
            max_workers=workers, min_workers=workers, gpus_per_worker=1, cpus_per_worker=0.01, cpus_per_finish=0.01
        )
        jobs = (Nap(f"{number:06d}", f"base{number % 3}") for number in range(audits))
        stages = [Sleeping("sample", Needs.gpu, sleep), Sleeping("finish", Needs.cpu, 0.0)]
        return {"part": "overhead", **measure(options, jobs, stages, lambda needs: Place(None, None))}
    finally:
        ray.shutdown()


def efficiency(workers: int, audits: int, folder: Path) -> dict[str, Any]:
    """Real nano audits, one thread a worker."""
    from tests.engine.fleet import make_uploads, make_workspace

    make_uploads(folder / "uploads", audits)
    workspace = make_workspace(folder / f"workspace-{workers}", folder / "uploads")
    overrides = {
        "workspace": str(workspace.root),
        "descriptor": "nano",
        "bases.sd1": str(ASSETS / "base"),
        "references": ("animals",),
        "settings.images_per_training_image": 20,
        "settings.steps": 10,
    }
    config = load_config(None, {}, overrides)
    open_place = OpenWorkspace(config.workspace, device="cpu")
    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False)
    try:
        options = RayOptions(max_workers=workers, min_workers=workers, gpus_per_worker=0, cpus_per_worker=1)
        due = iter(Due(workspace, config, Skipped({})))
        return {"part": "efficiency", **measure(options, due, stages_for(config.references), open_place)}
    finally:
        ray.shutdown()


def main(
    part: Annotated[str | None, typer.Option(help="efficiency or overhead; both by default.")] = None,
    gpus: Annotated[list[int] | None, typer.Option(help="Logical GPUs of the overhead part.")] = None,
    audits: Annotated[int, typer.Option(help="Audits at the largest number of GPUs.")] = 10_000,
    sleep: Annotated[float, typer.Option(help="Seconds that the sleeping stage takes.")] = 2.0,
    real: Annotated[int, typer.Option(help="Real audits of the efficiency part.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
) -> None:
    """Print a row a measurement."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    print(
        f"{'part':12}{'workers':>8}{'audits':>8}{'busy':>7}{'seconds':>9}{'driver s/audit':>16}{'slope':>7}"
        f"{'MiB':>6}{'growth':>8}"
    )

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print(
            f"{row['part']:12}{row['workers']:8}{row['audits']:8}{row['busy_share']:7.1%}{row['seconds']:9.1f}"
            f"{row['overhead_seconds_per_audit']:16.5f}{row['overhead_slope']:7.2f}{row['driver_mib']:6.0f}"
            f"{row['driver_mib_growth']:8.1f}",
            flush=True,
        )
        if json_file:
            json_file.write_text(json.dumps(rows, indent=2) + "\n")

    if part in (None, "efficiency"):
        with tempfile.TemporaryDirectory() as folder:
            for workers in (1, 2):
                show(efficiency(workers, real, Path(folder)))
        one, two = rows[-2:]
        gain = one["seconds"] / one["audits"] / (two["seconds"] / two["audits"])
        print(f"two workers do {gain:.2f} times the work of one")
    if part in (None, "overhead"):
        sizes = gpus or [1, 4, 16, 64]
        for size in sizes:
            show(overhead(size, max(20, audits * size // max(sizes)), sleep))


if __name__ == "__main__":
    typer.run(main)
