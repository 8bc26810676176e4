"""Everything that six minutes of a GPU can tell of lora-audit, without a network.

    python -m benchmarks.gpu [--seconds 380] [--parts card,nano] [--json FILE]
    python -m benchmarks.gpu --device cpu --tiny          # every part at toy size

Each fact is a line and at once in the JSON file. A step whose estimate does not fit into the time left is skipped, and
a line says so. A part that fails is a fact, and the others go on. Exit code 1 where one failed or a stated bound was
broken, 2 for bad options; bounds on speed count on a GPU at real size only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.facts import Figures, Record

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass(frozen=True)
class Part:
    """A module and its function; ``least`` seconds are needed for the part to be begun at all."""

    module: str
    least: float
    function: str = "measure"


PARTS = {
    "card": Part("benchmarks.gpu.card", 2),
    "nano": Part("benchmarks.gpu.nano", 12),
    "families": Part("benchmarks.gpu.families", 6),
    "memory": Part("benchmarks.gpu.memory", 10),
    "sd15": Part("benchmarks.gpu.denoisers", 20, "measure_sd15"),
    "variants": Part("benchmarks.gpu.variants", 5),
    "sdxl": Part("benchmarks.gpu.denoisers", 45, "measure_sdxl"),
    "flow": Part("benchmarks.gpu.flow", 6),
    "match": Part("benchmarks.gpu.match", 10),
}


def chosen(names: str) -> list[str]:
    """The parts named, in the order of ``PARTS``; all for an empty text. Raises BadParameter for an unknown one."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def main(
    seconds: Annotated[float, typer.Option(help="Wall time that may be used.")] = 380.0,
    parts: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}; all by default.")] = "",
    device: Annotated[str, typer.Option(help="The device: cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Every part at toy size.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Where the facts are written.")] = Path("gpu.json"),
    golden: Annotated[Path | None, typer.Option(help="The CPU's facts. [default: those that come along]")] = None,
    make_golden: Annotated[bool, typer.Option("--make-golden", help="Write the CPU's facts; nothing else.")] = False,
) -> None:
    """Measure and report."""
    names = chosen(parts)
    command: Figures = {"seconds": seconds, "parts": ",".join(names), "device": device, "tiny": tiny}
    record = Record(command, seconds, json_file, tiny, speed_counts=device.startswith("cuda") and not tiny)
    record.say("begun", {"parts": ",".join(names)})  # before anything heavy is imported
    with record.within("start"):
        measure_all(record, names, device, tiny, golden, make_golden)
    raise typer.Exit(record.end())


def measure_all(
    record: Record, names: list[str], device: str, tiny: bool, golden: Path | None, make_golden: bool
) -> None:
    """Run the parts one after the other, each guarded."""
    import torch

    from benchmarks.gpu.bench import GOLDEN, Bench
    from benchmarks.gpu.measure import release

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: --device cpu --tiny runs every part at toy size")
    bench = Bench(record, device, tiny, golden or GOLDEN)
    measures: dict[str, Part] = {name: PARTS[name] for name in names}
    if make_golden:
        measures = {"nano": Part("benchmarks.gpu.nano", 60, "make_golden")}
    with torch.no_grad():
        for name, part in measures.items():
            with record.within(name):
                if record.fits("the part", part.least):
                    measure: Callable[[Bench], None] = getattr(import_module(part.module), part.function)
                    measure(bench)
            release(device)
    shutil.rmtree(bench.folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
