"""The unit of work of a study: one fine-tune, what it is worth, and its audits. What is done already is left alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from audit.api import add_references, scan
from audit.bench import Bench
from audit.claims.captions import Caption
from audit.config import CaptionChoice, CaptionSettings, Rule, StoredImages
from audit.descriptors.base import stacked
from audit.engine.local import run_stages
from audit.engine.work import Place, kind_of, reason_of
from audit.errors import ReferenceSetError, StudyError
from audit.job import Request, resolve
from audit.models.base import BaseLocation, load_base
from audit.models.checkpoint import open_checkpoint
from audit.progress import Tell, quiet
from audit.recovery.ask import with_captions
from audit.references import ReferenceSets
from audit.stages import Cluster, Sample, Scores
from audit.states import Cause, Known, SetKind
from audit.study.adapters import FILES, save_adapter, save_networks
from audit.study.factors import AuditFactors, Judgement, Knowledge, TrainingFactors, Tuning, Witness
from audit.study.kept import KeptState, fetch_checkpoint, keep_checkpoint
from audit.study.plan import Cell, Study, settings_of
from audit.study.quality import losses_of, quality_of, samples_of
from audit.study.sets import FewShotSet, SetPicture
from audit.study.train import Lesson, Trainee, fine_tune, privacy_of, seed_of
from audit.workspace import Workspace

TRAINING_VERSION = 1  # raised when the same factors come to give another checkpoint


@dataclass(frozen=True)
class Unit:
    """A fine-tune and its cells: plain data. ``others`` are the captions of another set, for wrong ones."""

    study: Study
    base: str
    few_shot: FewShotSet
    training: TrainingFactors
    cells: tuple[Cell, ...]
    others: tuple[str, ...]
    workspace: str

    @property
    def id(self) -> str:
        """32 hex digits: what tells it from all others of its study."""
        told = [self.study.name, self.few_shot.name, self.training.as_dict()]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def group(self) -> str:
        """What it shares with others: the base model, which a worker has in memory."""
        return self.base

    @property
    def name(self) -> str:
        """What it is called in the log: the set, and the levels that are no defaults."""
        default = TrainingFactors()
        said = [
            f"{name} {value}" for name, value in self.training.as_dict().items()
            if value is not None and value != default.as_dict()[name]
        ]  # fmt: skip
        return ", ".join([self.few_shot.name, str(self.training.method), *said])


@dataclass
class Done:
    """What came of a unit: whether it was trained now, how many audits were finished, and what failed, in words."""

    name: str
    trained: bool = False
    audits: int = 0
    failed: list[str] = field(default_factory=list)


def fine_tune_id(unit: Unit, revision: str) -> str:
    """32 hex digits: a hash of everything that the checkpoint depends on."""
    told = {
        "version": TRAINING_VERSION,
        "base": revision,
        "resolution": unit.study.settings.resolution,
        "pictures": [[one.sha256, one.caption] for one in unit.few_shot.training],
        "class": unit.few_shot.class_caption if unit.training.prior else None,
        "factors": {**unit.training.as_dict(), "lr": unit.training.rate, "n0": len(unit.few_shot.training)},
        "seed": unit.study.seed,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def do_unit(unit: Unit, bench: Bench, tell: Tell = quiet) -> Done:
    """Train and audit what is not done. One cell that fails costs itself alone.

    Raises WorkspaceError where results cannot be kept, and what a lost device raises.
    """
    done = Done(unit.name)
    workspace = Workspace(unit.workspace)
    try:
        location = bench.locate(unit.base, unit.study.base_config)
        key = fine_tune_id(unit, location.revision)
        if not workspace.has("fine_tunes", key):
            _train(unit, key, location, workspace, bench, tell)
            done.trained = True
        [row] = workspace.rows("SELECT file FROM fine_tunes WHERE fine_tune_id = ?", [key])
        path = _fetched(workspace, key, row["file"])
    except Exception as error:
        done.failed.append(f"{unit.name}: {_reason(error)}")
        return done
    for number, cell in enumerate(unit.cells):
        tell(f"audits of {unit.few_shot.name}", number, len(unit.cells))
        if workspace.has("study_cells", f"{unit.study.name}.{cell.id}"):
            continue
        try:
            _audit(unit, cell, key, path, Place(workspace, bench), tell)
            done.audits += 1
        except Exception as error:
            done.failed.append(f"{unit.name}, {cell.audit.extraction}: {_reason(error)}")
    return done


def _fetched(workspace: Workspace, key: str, kept: str) -> Path:
    """The checkpoint on this machine. Raises StudyError where it is gone, and forgets it."""
    try:
        return fetch_checkpoint(workspace.files, kept)
    except FileNotFoundError:
        workspace.remove("fine_tunes", key)
        raise StudyError(
            f"{workspace.files}/{kept} is gone: the next 'lora-audit study resume' trains it again"
        ) from None


def _reason(error: Exception) -> str:
    """Why something failed, in words. Raises the error where it is the storage that fails, or a device that is lost."""
    if kind_of(error) in (Cause.storage, Cause.device_lost):
        raise error
    return reason_of(error)


def _train(unit: Unit, key: str, location: BaseLocation, workspace: Workspace, bench: Bench, tell: Tell) -> None:
    """Fine-tune, keep the checkpoint, and write the rows: quality first, fine_tunes last."""
    started = time.monotonic()
    trainee = Trainee(load_base(location), torch.device(bench.device), unit.study.settings.resolution)
    size = trainee.codec.picture_size
    pictures = stacked([one.open() for one in unit.few_shot.training], size)
    held_out = stacked([one.open() for one in unit.few_shot.control], size) if unit.few_shot.control else None
    captions = [one.caption for one in unit.few_shot.training]
    seed = seed_of("fine-tune", unit.study.seed, unit.training.repeat) % 2**31
    lesson = Lesson(key, unit.training, pictures, captions, unit.few_shot.class_caption, seed)
    before = losses_of(trainee, pictures, held_out, captions)
    state = KeptState(workspace.files, key)
    final = fine_tune(trainee, lesson, state.find(), tell, state.saved)
    after = losses_of(trainee, pictures, held_out, captions)
    descriptor = bench.load_descriptor(unit.study.descriptor)
    quality = quality_of(before, after, samples_of(trainee, unit.few_shot.captions), pictures, descriptor)
    kept = _publish(unit, key, trainee, workspace)
    factors = unit.training.as_dict() | {"lr": unit.training.rate, "n0": len(pictures)}
    worth = {**asdict(quality), "epsilon": privacy_of(lesson), "descriptor": descriptor.name}
    workspace.write("quality", key, [{"fine_tune_id": key, **worth}])
    row = {
        "fine_tune_id": key, "few_shot": unit.few_shot.name, "family": trainee.base.family,
        "base_revision": location.revision, **factors, "optimiser_steps": lesson.steps,
        "captions": unit.few_shot.captions, "picture_sha256": [one.sha256 for one in unit.few_shot.training],
        "identity": open_checkpoint(_fetched(workspace, key, kept)).identity, "file": kept, "final_loss": final,
        "seconds": time.monotonic() - started, "device": bench.device, "finished_at": datetime.now(UTC),
    }  # fmt: skip
    workspace.write("fine_tunes", key, [row])
    state.remove()


def _publish(unit: Unit, key: str, trainee: Trainee, workspace: Workspace) -> str:
    """Keep the checkpoint in the workspace, whole; its key there."""
    denoiser, factors = trainee.base.architecture.denoiser, unit.training

    def write(folder: Path) -> None:
        if factors.method is Tuning.lora:
            save_adapter(trainee.pipeline, denoiser, factors, folder, {})
        else:
            save_networks(trainee.pipeline, denoiser, factors.text_encoder, folder, trainee.base.architecture.half)

    return keep_checkpoint(workspace.files, key, write, FILES[factors.layout] if factors.layout is not None else None)


def _audit(unit: Unit, cell: Cell, key: str, path: Path, place: Place, tell: Tell) -> None:
    """Audit the checkpoint under a cell's levels, score it, and write the row of study_cells."""
    study, few_shot, audit = unit.study, unit.few_shot, cell.audit
    request = Request(
        path, unit.base, study.base_config, captions=_captions(unit, audit), n0=len(few_shot.training),
        settings=settings_of(study, audit), name=f"{few_shot.name}-{unit.training.method}-{key[:8]}",
        known_captions=[Caption("", "study")] if audit.captions is Knowledge.empty else [],
        recovery=CaptionSettings(CaptionChoice.auto if audit.captions is Knowledge.unknown else CaptionChoice.known),
    )  # fmt: skip
    job = with_captions(resolve(request, study.descriptor, place.bench), request, place.workspace, place.bench, tell)
    pictures = {Known.training: few_shot.training, Known.control: few_shot.control}
    scores = [Scores(kind, [one.open() for one in some]) for kind, some in pictures.items() if some]
    run_stages([Sample(), Cluster(), *scores], job, place, tell)
    row = {
        "study": study.name, "cell_id": cell.id, "few_shot": few_shot.name, "fine_tune_id": key, "audit_id": job.id,
        **audit.as_dict(), **_verdict(unit, audit, request, place, tell), "finished_at": datetime.now(UTC),
    }  # fmt: skip
    place.workspace.write("study_cells", f"{study.name}.{cell.id}", [row])


def _captions(unit: Unit, audit: AuditFactors) -> list[str]:
    """The captions that an auditor of this knowledge gives."""
    if audit.captions is Knowledge.known:
        return unit.few_shot.captions
    if audit.captions is Knowledge.trigger:
        return unit.few_shot.triggers()
    if audit.captions is Knowledge.partial:
        assert audit.caption_share is not None
        return unit.few_shot.partial(audit.caption_share, unit.study.seed)
    return list(unit.others) if audit.captions is Knowledge.wrong else []


def _verdict(unit: Unit, audit: AuditFactors, request: Request, place: Place, tell: Tell) -> dict[str, Any]:
    """What is said of the training pictures and of held-out ones among them; nothing where nothing is asked."""
    if audit.rule is Judgement.none:
        return {}
    few_shot, both = unit.few_shot, audit.evidence is Witness.both
    names = {
        part: _reference_set(unit, part, pictures, place, both, ())
        for part, pictures in (("training", few_shot.training), ("control", few_shot.control))
    }
    background = []
    if audit.rule is Judgement.calibrated:
        background = [_reference_set(unit, "decoys", few_shot.decoys, place, both, tuple(names.values()))]
    found = scan(
        request, references=list(names.values()), background=background, descriptor=unit.study.descriptor,
        workspace=place.workspace, rule=Rule(audit.rule), bench=place.bench, progress=tell,
    )  # fmt: skip
    matched = {
        part: {one.reference_id for one in found.verdict.matched if one.reference_set == name}
        for part, name in names.items()
    }
    return {
        "references": len(few_shot.training), "recalled": len(matched["training"]),
        "innocent": len(few_shot.control), "accused": len(matched["control"]),
    }  # fmt: skip


def _reference_set(
    unit: Unit, part: str, pictures: Sequence[SetPicture], place: Place, latents: bool, of: tuple[str, ...]
) -> str:
    """The name of the reference set of these pictures, described, and encoded where ``latents`` are asked for."""
    told = json.dumps([[one.sha256 for one in pictures], of])
    slug = re.sub(r"[^A-Za-z0-9-]+", "-", unit.few_shot.name)[:30].strip("-") or "set"
    name = f"{slug}-{hashlib.sha256(told.encode()).hexdigest()[:8]}-{part}"
    workspace, bench, settings = place.workspace, place.bench, unit.study.settings
    has_latents = workspace.rows("SELECT 1 FROM latents WHERE reference_set = ? LIMIT 1", [name])
    try:
        ReferenceSets(workspace).require(name, bench.described_by(unit.study.descriptor))
        if has_latents or not latents:
            return name
    except ReferenceSetError:
        pass
    with tempfile.TemporaryDirectory(prefix="lora-audit-study-") as folder:
        for number, one in enumerate(pictures):
            shutil.copyfile(one.path, Path(folder) / f"{number:04d}-{Path(one.path).name[-100:]}")
        add_references(
            name, folder, descriptor=unit.study.descriptor, workspace=workspace,
            thumbnails=settings.stored_images is not StoredImages.hashes_only, bases=[unit.base] if latents else [],
            resolution=settings.resolution, kind=SetKind.background if of else SetKind.reference, decoys_of=of,
            bench=bench,
        )  # fmt: skip
    return name
