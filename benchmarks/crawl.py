"""The metadata crawl and the downloads against the local simulator of Civitai: requests, speed, memory.

    python -m benchmarks.crawl [--json FILE] [--items 10000] [--files 200]

Phases: "metadata" crawls --items models from nothing, "again" repeats it when nothing is new, "resumed" is a crawl that
is killed (SIGKILL) at five random points and started again each time, "downloads" fetches --files small LoRAs of which
every tenth is faulty in one of the simulator's ways. Each crawl is a process of its own; ``peak_mib`` is its greatest
resident size, ``growth_mib`` how much more that is than after a tenth of its requests. The seconds of "resumed" count
all its processes, with their starts. Its tables are compared with those of "metadata": the command fails where they
differ.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from audit.workspace import Workspace
from tests.simulators.civitai import Civitai, Fault, make_models

COMPARED = """SELECT * EXCLUDE (first_seen_at, seen_at) FROM checkpoints ORDER BY item_id"""
CAPTIONS = "SELECT item_id, rank, caption, source, confidence FROM captions ORDER BY ALL"


def resident_mib(pid: int) -> float:
    """Resident size of a process, MiB; 0 when it has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found.group(1)) / 1024 if found else 0.0


def command(site: Civitai, workspace: Path, *options: str) -> list[str]:
    """The crawl as a user runs it, without our own rate limit."""
    return [sys.executable, "-c", "from audit.cli import main; main()", "crawl", "civitai", "--endpoint", site.url,
            "--rate", "0", "--workspace", str(workspace), "--json", *options]  # fmt: skip


def crawl(site: Civitai, workspace: Path, *options: str) -> tuple[dict[str, Any], float, float]:
    """Run one crawl; its counts, its peak and its growth in MiB. Raises RuntimeError where it fails."""
    environment = {"CIVITAI_TOKEN": site.token or "", "PATH": "/usr/bin:/bin"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command(site, workspace, *options), stdout=out, stderr=errors, env=environment)
        sizes: list[tuple[int, float]] = []
        before = sum(site.counts.values())
        while process.poll() is None:
            sizes.append((sum(site.counts.values()) - before, resident_mib(process.pid)))
            time.sleep(0.05)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"the crawl failed: {errors.read().decode()[-2000:]}")
        peak = max((size for _, size in sizes), default=0.0)
        early = [size for requests, size in sizes if requests <= sizes[-1][0] / 10 and requests]
        return json.loads(out.read()), peak, peak - max(early, default=peak)


def killed(site: Civitai, workspace: Path, after: float, *options: str) -> bool:
    """Start a crawl and kill it after ``after`` seconds of work; False where it ended before."""
    environment = {"CIVITAI_TOKEN": site.token or "", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        command(site, workspace, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    asked = sum(site.counts.values())
    while process.poll() is None and sum(site.counts.values()) == asked:
        time.sleep(0.01)  # imports do not count as work
    time.sleep(after)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not ended


def row(phase: str, counts: dict[str, Any], peak: float, growth: float) -> dict[str, Any]:
    """One row of the table."""
    return {
        "phase": phase,
        "items": counts["items"],
        "requests": counts["requests"],
        "seconds": counts["seconds"],
        "items_per_second": counts["items"] / max(counts["seconds"], 1e-9),
        "requests_per_item": counts["requests"] / max(counts["items"], 1),
        "peak_mib": peak,
        "growth_mib": growth,
    }


def tables(workspace: Path) -> list[list[dict[str, Any]]]:
    """The catalog apart from its times."""
    opened = Workspace(workspace)
    return [opened.rows(COMPARED), opened.rows(CAPTIONS)]


def main(
    items: Annotated[int, typer.Option(help="Models of the metadata crawl.")] = 10_000,
    files: Annotated[int, typer.Option(help="Models of the downloads, a tenth of them faulty.")] = 200,
    kills: Annotated[int, typer.Option(help="How often the resumed crawl is killed.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the models and of the moments of the kills.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
) -> None:
    """Crawl the simulator and print what it took."""
    rows: list[dict[str, Any]] = []
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        options = ("--metadata-only", "--nsfw", "--prompts", "never")
        with Civitai(make_models(items, seed, files=False)) as site:
            rows.append(row("metadata", *crawl(site, place / "whole", *options)))
            rows.append(row("again", *crawl(site, place / "whole", *options)))
            asked, seconds, done, started = sum(site.counts.values()), rows[0]["seconds"], 0, time.monotonic()
            while done < kills and killed(
                site, place / "resumed", moments.uniform(0.1, 1.6 * seconds / kills), *options
            ):
                done += 1
            last, peak, growth = crawl(site, place / "resumed", *options)
            last |= {"items": rows[0]["items"], "requests": sum(site.counts.values()) - asked}
            last["seconds"] = round(time.monotonic() - started, 2)
            rows.append(row("resumed", last, peak, growth) | {"kills": done})
        if tables(place / "whole") != tables(place / "resumed"):
            print("the tables of the resumed crawl differ from those of the whole one")
            raise typer.Exit(1)
        models = make_models(files, seed)
        faults = [fault for fault in Fault if fault is not Fault.none]
        for number, model in enumerate(models[::10]):
            model.versions[0].files[0].fault = faults[number % len(faults)]
        with Civitai(models) as site:
            counts, peak, growth = crawl(site, place / "files", "--nsfw", "--prompts", "never", "--retries", "1")
            rows.append(row("downloads", counts, peak, growth) | {"states": counts["states"]})
    print(f"{'phase':12}{'items':>8}{'requests':>10}{'seconds':>9}{'items/s':>9}{'peak MiB':>10}{'growth MiB':>12}")
    for one in rows:
        print(
            f"{one['phase']:12}{one['items']:8}{one['requests']:10}{one['seconds']:9.1f}{one['items_per_second']:9.0f}"
            f"{one['peak_mib']:10.0f}{one['growth_mib']:12.0f}"
        )
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
