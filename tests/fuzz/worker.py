"""The process that reads the inputs of one kind. It may hang or die: whoever started it looks on."""

from __future__ import annotations

import logging
import os
import resource
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.claims import Bases, PeftConfigurations, Texts
from tests.fuzz.files import Archives, Gguf, Inspected, Pictures, SafetensorsHeaders
from tests.fuzz.inputs import Lists, Tables, Tars
from tests.fuzz.kind import Kind
from tests.fuzz.sources import Cards, CivitaiAnswers, HubAnswers, Sidecars
from tests.fuzz.workspaces import Workspaces

KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        Gguf, PeftConfigurations, Pictures, CivitaiAnswers, HubAnswers, Cards, Archives, Inspected, Texts,
        SafetensorsHeaders, Sidecars, Tars, Lists, Tables, Bases, Workspaces,
    )
}  # fmt: skip
STDERR = "stderr.txt"
WARM = 50  # inputs after which a worker's memory is taken as that of its libraries
# What the supervisor sees of a worker, as numbers in shared memory.
INDEX, STARTED, ACCEPTED, REFUSED, SLOWEST, GROWTH, FIELDS = range(7)


@dataclass(frozen=True)
class Finding:
    """An input that broke a promise: ``what`` is "crash", "hang" or "memory"; ``where`` tells equal ones apart."""

    kind: str
    seed: int
    index: int
    what: str
    where: str
    details: str


def input_of(kind: Kind, seed: int, index: int) -> bytes:
    """Input ``index`` of ``kind``: the same for the same seed."""
    return kind.make(Random(f"{seed}/{kind.name}/{index}"))


def verdict(kind: Kind, data: bytes) -> tuple[str, BaseException | None]:
    """("accepted" or "refused" or "crash", the error of a crash)."""
    try:
        kind.check(data)
    except kind.refusals:
        return "refused", None
    except (Exception, RecursionError) as error:
        return "crash", error
    return "accepted", None


def place_of(error: BaseException) -> str:
    """The class of ``error`` and the last of our own lines that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "/audit/" in one.filename or "/crawlers/" in one.filename] or frames
    return (
        f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else type(error).__name__
    )


def work(
    name: str, seed: int, first: int, last: int, until: float, seen: Any, pipe: Connection, folder: str, nice: int
) -> None:
    """Read the inputs from ``first`` to before ``last`` of a kind, not beyond the time ``until`` (monotonic, s)."""
    os.nice(nice)
    logging.disable(logging.CRITICAL)
    with (Path(folder) / STDERR).open("wb") as errors:  # decoders in C write to it what they think of an input
        os.dup2(errors.fileno(), 2)
    place = Path(folder) / f"{name}-{os.getpid()}"
    place.mkdir(parents=True)
    seen[STARTED] = 0.0  # making the seeds is not timed
    kind = KINDS[name](place)
    before = _peak()
    for index in range(first, last):
        if time.monotonic() > until:
            break
        seen[INDEX] = index
        data = input_of(kind, seed, index)
        seen[STARTED] = time.monotonic()
        found, error = verdict(kind, data)
        seen[SLOWEST] = max(seen[SLOWEST], time.monotonic() - seen[STARTED])
        seen[STARTED] = 0.0
        if error is not None:
            details = "".join(traceback.format_exception(error))[-6000:]
            pipe.send(Finding(name, seed, index, "crash", place_of(error), details))
        else:
            seen[ACCEPTED if found == "accepted" else REFUSED] += 1
        if index - first == WARM:
            before = max(before, _peak() if _peak() - before < kind.memory else before)
        growth = _peak() - before
        seen[GROWTH] = max(seen[GROWTH], growth)
        if growth > kind.memory:
            pipe.send(Finding(name, seed, index, "memory", "growth", f"{growth:.0f} MiB more than {before:.0f}"))
            pipe.send(("ended", index + 1))
            return
    else:
        index = last - 1
    pipe.send(("ended", last if time.monotonic() <= until else index))


def _peak() -> float:
    """The most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
