"""Adding sets: pictures, tars, vectors and hashes, how fast and in how much memory.

    python -m benchmarks.ingest main [--quick] [--json FILE]
    python -m benchmarks.ingest memory --pictures 100000 [--side 24]    # one add of many small pictures, by PDQ

Made-up pictures of 128 pixels are added as `references add` does it, by one process and by two, and as a tar; beside
it is a plain loop of Pillow, the same descriptor (nano), PDQ and small pictures, without a boundary for strangers'
bytes, without a table, and with all rows in memory. An add that is killed half-way goes on; its rows are compared with
those of one that was not. Every step is a process of its own; its resident memory, that of all processes it starts
beside, and what they compute are looked at five times a second. A core's second is one of computing, so that other
work on the machine does not count. Exit code 1 where rows differ, or the process holds more than 1 GiB.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image
from rich.console import Console

from benchmarks.tables import table

SIDE = 128
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
MOST_MEMORY = 1 << 30
out = Console(stderr=True)
app = typer.Typer(add_completion=False)


def make_pictures(folder: Path, number: int, side: int = SIDE) -> None:
    """JPEG files, no two alike: soft shapes with noise."""
    rng = np.random.default_rng(0)
    shapes = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((side, side), 3), np.int16)
        for _ in range(64)
    ]
    noise = rng.integers(-20, 21, (2 * side, 2 * side, 3), dtype=np.int16)
    for one in range(number):
        if one % 1000 == 0:
            (folder / f"{one // 1000:04}").mkdir(parents=True)
        top, left = rng.integers(0, side, 2)
        mixed = (shapes[one % 64] + shapes[rng.integers(64)]) // 2 + noise[top : top + side, left : left + side]
        picture = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
        picture.save(folder / f"{one // 1000:04}/{one:07}.jpg", quality=85)


def make_tar(folder: Path, path: Path) -> None:
    """The pictures as a shard of img2dataset, with JSON beside."""
    beside = path.with_suffix(".json")
    with tarfile.open(path, "w") as file:
        for number, picture in enumerate(sorted(folder.rglob("*.jpg"))):
            file.add(picture, f"{number:09}.jpg")
            beside.write_text(json.dumps({"caption": f"picture {number}", "url": f"https://example.org/{number}"}))
            file.add(beside, f"{number:09}.json")


def make_vectors(path: Path, number: int) -> None:
    """Vectors of nano's width with URLs."""
    rng, width = np.random.default_rng(1), _nano().dimensions
    schema = pa.schema([("embedding", pa.list_(pa.float32(), width)), ("url", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, number, 50_000):
            count = min(50_000, number - start)
            values = pa.FixedSizeListArray.from_arrays(rng.standard_normal(count * width, dtype=np.float32), width)
            urls = pa.array([f"https://example.org/{start + one}" for one in range(count)])
            writer.write_table(pa.table([values, urls], schema=schema))


def make_hashes(path: Path, number: int) -> None:
    """Lines of hashes."""
    rng = np.random.default_rng(2)
    with path.open("w") as file:
        file.write("hash,quality,id\n")
        for one in range(number):
            file.write(f"{rng.bytes(32).hex()},90,{one}\n")


def _nano() -> Any:
    from audit.descriptors import load_descriptor

    return load_descriptor("nano", "cpu")


def plain_loop(folder: Path) -> int:
    """What is compared with: all pictures opened, described, hashed and made small, in memory."""
    from audit.descriptors import pdq_hash
    from audit.descriptors.base import to_png
    from audit.evidence.kind import look_of

    descriptor, rows, paths = _nano(), [], sorted(folder.rglob("*.jpg"))
    for start in range(0, len(paths), 64):
        pictures = [Image.open(path).convert("RGB") for path in paths[start : start + 64]]
        vectors = descriptor.describe_prepared([descriptor.prepare(one) for one in pictures])
        for one, vector in zip(pictures, vectors, strict=True):
            rows.append((vector, pdq_hash(one), look_of(one), to_png(one)))
    return len(rows)


@app.command(hidden=True)
def step(
    what: str, source: Path, workspace: Path, workers: int = 1, kill_at: int = 0, descriptor_name: str = "nano"
) -> None:
    """One step, in a process of its own: its facts as JSON."""
    import torch

    from audit import add_references
    from audit.descriptors.pdq import PdqDescriptor
    from audit.references.singles import drop, files_given, put
    from audit.workspace import Workspace

    torch.set_num_threads(1)

    def tell(stage: str, done: int, total: int) -> None:
        if kill_at and done >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    place, descriptor = Workspace(workspace), _nano()
    began, before = time.perf_counter(), computed_by(os.getpid())
    if what == "plain":
        number = plain_loop(source)
    elif what == "single":
        picture = next(source.rglob("*.jpg"))
        mirrored = workspace.parent / "one more.png"
        Image.open(picture).rotate(90).save(mirrored)
        number = put(place, "a", files_given([mirrored]), descriptor).images
        put_s = time.perf_counter() - began
        drop(place, "a", [mirrored.name])
        print(json.dumps({"number": number, "put_s": put_s, "drop_s": time.perf_counter() - began - put_s}))
        return
    elif what == "hashes":
        number = add_references("h", source, descriptor=PdqDescriptor().name, workspace=place).images
    else:
        by = {"described_by": descriptor.name} if what == "vectors" else {"workers": workers, "progress": tell}
        number = add_references("a", source, descriptor=descriptor_name, workspace=place, **by).images  # type: ignore[arg-type]
    found = {"number": number, "seconds": time.perf_counter() - began}
    if workers == 1:  # without what importing takes; other workers have gone by now
        found["computed"] = computed_by(os.getpid()) - before
    print(json.dumps(found))


def processes_of(pid: int) -> dict[int, tuple[int, float]]:
    """(resident bytes, seconds computed) of a process and of all that it has started."""
    parents, found = {}, {}
    for one in Path("/proc").iterdir():
        if one.name.isdigit():
            try:
                fields = (one / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(one.name)] = int(fields[1])
            found[int(one.name)] = int(fields[21]) * PAGE, (int(fields[11]) + int(fields[12])) / TICK
    mine = {pid}
    while more := {one for one, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return {one: found[one] for one in mine if one in found}


def computed_by(pid: int) -> float:
    """Seconds that a process and all that it has started have computed."""
    return sum(seconds for _, seconds in processes_of(pid).values())


def run(what: str, source: Path, workspace: Path, **more: Any) -> dict[str, Any]:
    """One step's facts, its memory and computing among them; empty where it was killed."""
    options = [one for name, value in more.items() for one in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "benchmarks.ingest", "step", what, str(source), str(workspace), *options]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        step = subprocess.Popen(command, stdout=said, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
        computed: dict[int, float] = {}
        memory = whole = 0
        while step.poll() is None:
            seen = processes_of(step.pid)
            memory = max(memory, seen.get(step.pid, (0, 0.0))[0])
            whole = max(whole, sum(held for held, _ in seen.values()))
            computed |= {one: seconds for one, (_, seconds) in seen.items()}
            time.sleep(0.2)
        if step.returncode == -signal.SIGKILL:
            return {}
        said.seek(0)
        errors.seek(0)
        if step.returncode:
            raise SystemExit(errors.read()[-2000:])
        found: dict[str, Any] = json.loads(said.read().strip().splitlines()[-1])
    found = {"computed": sum(computed.values()), **found, "memory": memory, "whole": whole}
    out.print(what, more, {name: round(value, 2) for name, value in found.items()}, highlight=False)
    return found


def rows_of(workspace: Path) -> list[dict[str, Any]]:
    """What the table says of the pictures."""
    from audit.workspace import Workspace

    return Workspace(workspace).rows('SELECT reference_id, name, pdq FROM "references" ORDER BY ALL')


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="A few hundred pictures.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    pictures: Annotated[int | None, typer.Option(help="How many pictures.", min=100)] = None,
) -> None:
    """Measure."""
    number = pictures or (300 if quick else 20_000)
    vectors, hashes = (5000, 20_000) if quick else (200_000, 1_000_000)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = place / "pictures"
        make_pictures(folder, number)
        make_tar(folder, place / "shard.tar")
        make_vectors(place / "v.parquet", vectors)
        make_hashes(place / "h.csv", hashes)
        found = {
            "a plain loop, all in memory": run("plain", folder, place / "p"),
            "references add": run("add", folder, place / "one"),
            "references add --workers 2": run("add", folder, place / "two", workers=2),
            "a tar with JSON beside": run("add", place / "shard.tar", place / "tar"),
        }
        run("add", folder, place / "killed", kill_at=number // 2)
        found["the rest, after it was killed half-way"] = run("add", folder, place / "killed")
        found["vectors in Parquet"] = run("vectors", place / "v.parquet", place / "vectors")
        found["PDQ hashes in CSV"] = run("hashes", place / "h.csv", place / "hashes")
        single = run("single", folder, place / "one")
        same = rows_of(place / "one") == rows_of(place / "two") == rows_of(place / "killed")
    print(table(HEAD, [_line(what, one) for what, one in found.items()]))
    print(f"a picture more: {single['put_s']:.2f} s; and out again: {single['drop_s']:.2f} s. Same rows: {same}")
    if json_file:
        json_file.write_text(json.dumps({"steps": found, "single": single, "same_rows": same}, indent=1) + "\n")
    if not same or max(one["memory"] for what, one in found.items() if what.startswith("references")) > MOST_MEMORY:
        raise SystemExit(1)


HEAD = ["what", "rows", "in", "computing", "rows a core's second", "held", "with all its processes"]


def _line(what: str, one: dict[str, Any]) -> list[str]:
    started = f"{one['seconds']:.1f} s", f"{one['computed']:.1f} s", f"{one['number'] / one['computed']:,.0f}"
    return [what, f"{one['number']:,}", *started, *(f"{one[name] / 2**20:.0f} MiB" for name in ("memory", "whole"))]


@app.command()
def memory(
    pictures: Annotated[int, typer.Option(help="How many pictures.", min=100)] = 100_000,
    side: Annotated[int, typer.Option(help="Their side, pixels.", min=16)] = 24,
) -> None:
    """Add many small pictures by PDQ: what it holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        make_pictures(folder, pictures, side)
        found = run("add", folder, Path(name) / "w", descriptor_name="pdq")
    print(table(HEAD, [_line(f"references add, {side} pixels, PDQ", found)]))
    if found["memory"] > MOST_MEMORY:
        raise SystemExit(1)


if __name__ == "__main__":
    app()
