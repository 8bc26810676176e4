"""Begin a study, or go on with it: units of work, one after the other or in several processes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from audit.bench import Bench
from audit.config import EngineName, RunSettings
from audit.devices import default_device
from audit.errors import StudyError
from audit.locations import is_remote
from audit.models.base import locate_base
from audit.processes import spread, threads_each
from audit.progress import Tell, quiet
from audit.study.factors import levels_of
from audit.study.plan import Plan, Study, difference, study_of, varied
from audit.study.units import Done, Unit, do_unit
from audit.workspace import Workspace

GO_ON = "begin another study under another name, or go on with this one as it was: 'lora-audit study resume'"


@dataclass
class Finished:
    """What a run of a study did: fine-tunes trained, audits finished, and what failed, in words."""

    study: str
    fine_tunes: int = 0
    audits: int = 0
    failed: list[str] = field(default_factory=list)

    def add(self, done: Done) -> None:
        """Count a unit."""
        self.fine_tunes += done.trained
        self.audits += done.audits
        self.failed += done.failed


def begin(workspace: Workspace, plan: Plan, beside: Path) -> str:
    """Write the row of a study; the base as it is located from now on.

    Raises StudyError where a study of that name was begun with another file, other pictures or another base: nothing of
    it is changed.
    """
    study = plan.study
    base = _base_source(study, beside)
    location = locate_base(base, study.base_config)
    document, known = plan.document(), workspace.rows("SELECT * FROM studies WHERE study = ?", [study.name])
    if known:
        changed = difference(json.loads(known[0]["document"]), document)
        if changed is None and known[0]["base_revision"] != location.revision:
            changed = "the base model is another"
        if changed is not None:
            raise StudyError(
                f"the study {study.name!r} was begun otherwise ({changed}), and what is done stays: {GO_ON}"
            )
        return base
    row = {
        "study": study.name, "base": study.base, "base_revision": location.revision, "descriptor": study.descriptor,
        "few_shots": list(plan.sets), "cells": len(plan.cells), "fine_tunes": len(plan.groups),
        "varied": varied(plan), "document": json.dumps(document), "folder": str(beside.resolve()),
        "began_at": datetime.now(UTC),
    }  # fmt: skip
    workspace.write("studies", study.name, [row])
    return base


def begun(workspace: Workspace, name: str) -> tuple[Study, Path]:
    """The study ``name`` as it was begun, and the folder of its file. Raises StudyError where there is none."""
    rows = workspace.rows("SELECT document, folder FROM studies WHERE study = ?", [name])
    if not rows:
        known = ", ".join(row["study"] for row in workspace.rows("SELECT study FROM studies ORDER BY study")) or "none"
        raise StudyError(f"{workspace.files} has no study {name!r} (there are: {known})")
    return study_from(json.loads(rows[0]["document"])["study"]), Path(rows[0]["folder"])


def study_from(said: dict[str, Any]) -> Study:
    """The study that ``Study.as_dict`` made plain values of."""
    from audit.config import load_config

    head = {"study": said["name"], **{key: said[key] for key in ("base", "sets", "descriptor", "seed")}}
    cells = tuple({name: tuple(levels_of(name, list(one))) for name, one in part.items()} for part in said["cells"])
    settings = load_config(None, {}, {f"settings.{name}": value for name, value in said["settings"].items()}).settings
    study = study_of(head)
    return replace(study, base_config=said["base_config"], only=tuple(said["only"]), settings=settings, cells=cells)


def run_study(
    plan: Plan,
    workspace: Workspace,
    beside: Path,
    *,
    workers: int = 1,
    run: RunSettings | None = None,
    stop: threading.Event | None = None,
    tell: Tell = quiet,
) -> Finished:
    """Do what is missing of a study; it can be stopped at any time, and goes on where it was.

    ``run`` says on what engine and device: on this machine in ``workers`` processes, or on Ray, where ``stop`` drains.
    Raises StudyError where it was begun otherwise.
    """
    run = run or RunSettings()
    base = begin(workspace, plan, beside)
    where = workspace.files.location
    units = list(units_of(plan, base, where if is_remote(where) else os.path.abspath(where)))
    finished = Finished(plan.study.name)
    if run.engine is EngineName.ray:
        from audit.study.on_ray import on_ray

        work = on_ray(units, workspace, run, stop or threading.Event())
    else:
        work = _work(units, workers, run.device or default_device(), tell)
    for number, done in enumerate(work, start=1):
        finished.add(done)
        tell("fine-tunes and their audits", number, len(units))
    return finished


def units_of(plan: Plan, base: str, workspace: str) -> Iterator[Unit]:
    """The units of a plan, in its order."""
    names = list(plan.sets)
    for (few_shot, training), cells in plan.groups.items():
        other = plan.sets[names[(names.index(few_shot) + 1) % len(names)]]
        yield Unit(
            plan.study, base, plan.set_of(few_shot, training), training, tuple(cells), tuple(other.captions), workspace
        )


def _work(units: Sequence[Unit], workers: int, device: str, tell: Tell) -> Iterator[Done]:
    if workers > 1:
        yield from spread(partial(_in_worker, device), units, workers, threads_each(workers))
        return
    bench = Bench(device)
    for unit in units:
        yield do_unit(unit, bench, tell)


_BENCHES: dict[str, Bench] = {}  # of this worker process, by device


def _in_worker(device: str, unit: Unit, threads: int) -> Done:
    import torch

    torch.set_num_threads(threads)
    return do_unit(unit, _BENCHES.setdefault(device, Bench(device)))


def _base_source(study: Study, beside: Path) -> str:
    """The base as it can be located from here: a path in the file is relative to the file."""
    path = beside / study.base
    return str(path.resolve()) if "@" not in study.base and path.exists() else study.base
