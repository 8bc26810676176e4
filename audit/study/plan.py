"""The study file, and what follows from it: cells, the fine-tunes they share, and counts before anything is trained."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from audit.config import Evidence, Method, Settings, load_config
from audit.errors import ConfigError, StudyError
from audit.estimate import EVALUATIONS
from audit.study.factors import (
    AUDIT,
    FACTORS,
    TRAINING,
    AuditFactors,
    Defence,
    Judgement,
    Knowledge,
    TrainingFactors,
    Tuning,
    levels_of,
)
from audit.study.presets import PRESETS, Preset
from audit.study.sets import FewShotSet, read_sets

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
KEYS = ("study", "base", "base_config", "sets", "only", "descriptor", "preset", "seed", "factors", "cells", "settings")
OF_FACTORS = ("method", "w", "k", "images_per_training_image", "lora_scale", "clustering", "evidence")
MOST_CELLS = 20_000
MOST_FILE_BYTES = 1_000_000
FEWEST_DECOYS = 19  # of a verdict by decoys (docs/evidence.md)
LIMITS = (
    "a study file is TOML: study, base, sets, and [factors] with levels; see docs/study.md, and "
    "'lora-audit study run FILE --dry-run'"
)


@dataclass(frozen=True)
class Study:
    """A study file as it was read, checked. ``cells`` are the levels of each listed part, all factors in each."""

    name: str
    base: str
    base_config: str | None
    sets: str
    only: tuple[str, ...]
    descriptor: str
    seed: int
    settings: Settings
    cells: tuple[dict[str, tuple[Any, ...]], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: what a study is kept by, and compared by when it goes on."""
        plain = asdict(self) | {"settings": asdict(self.settings)}
        return json.loads(json.dumps(plain))


@dataclass(frozen=True)
class Cell:
    """One audit of one fine-tune of one set."""

    few_shot: str
    training: TrainingFactors
    audit: AuditFactors

    @property
    def id(self) -> str:
        """16 hex digits: a hash of set and levels."""
        told = [self.few_shot, self.training.as_dict(), self.audit.as_dict()]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """A study with its sets: everything that is to be done."""

    study: Study
    sets: dict[str, FewShotSet]
    cells: list[Cell]
    groups: dict[tuple[str, TrainingFactors], list[Cell]] = field(default_factory=dict)

    def set_of(self, few_shot: str, training: TrainingFactors) -> FewShotSet:
        """The set as it is trained on: its first N0 pictures."""
        return self.sets[few_shot].first(training.n0)

    def document(self) -> dict[str, Any]:
        """What must not change while a study goes on: the file, and the pictures and captions of its sets."""
        sets = {
            one.name: [[two.sha256, two.caption] for part in (one.training, one.control, one.decoys) for two in part]
            for one in self.sets.values()
        }
        return {"study": self.study.as_dict(), "sets": sets}


def read_study(path: Path) -> Study:
    """The study of a TOML file. Raises StudyError naming the file and what in it cannot be."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
        if len(data) > MOST_FILE_BYTES:
            raise StudyError(f"{path} is larger than {MOST_FILE_BYTES // 1_000_000} MB: {LIMITS}")
        tree = tomllib.loads(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"the study file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path} is not valid TOML: {str(error)[:300]}") from error
    try:
        return study_of(tree)
    except (StudyError, ConfigError) as error:
        raise StudyError(f"{path}: {error}") from error


def study_of(tree: Mapping[str, Any]) -> Study:
    """The study that plain values say. Raises StudyError, and ConfigError for settings."""
    unknown = [name for name in tree if name not in KEYS]
    if unknown:
        raise StudyError(f"there is no {unknown[0]!r} in a study file: there are {', '.join(KEYS)}")
    name = tree.get("study")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise StudyError(f"study = {name!r}: a study's name has up to 40 small letters, digits and '-'")
    texts = {"base": None, "sets": None, "descriptor": "sscd", "base_config": ""}
    said = {key: tree.get(key, default) for key, default in texts.items()}
    for key, value in said.items():
        if not isinstance(value, str) or (not value and key != "base_config"):
            raise StudyError(f"{key} = {value!r}: it is a text; {LIMITS}")
    only, seed = tree.get("only", []), tree.get("seed", 0)
    if not isinstance(only, list) or not all(isinstance(one, str) for one in only):
        raise StudyError(f"only = {only!r}: it is a list of names of sets")
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise StudyError(f"seed = {seed!r}: it is a whole number from 0")
    return Study(
        name, said["base"], said["base_config"] or None, said["sets"], tuple(only), said["descriptor"], seed,
        _settings(tree.get("settings", {}), _preset(tree)), _cells(tree),
    )  # fmt: skip


def _settings(given: Any, preset: Preset | None) -> Settings:
    if not isinstance(given, dict):
        raise StudyError("settings is a table: [settings]")
    known = [one.name for one in fields(Settings) if one.name not in OF_FACTORS]
    for name in given:
        if name in OF_FACTORS:
            raise StudyError(
                f"settings.{name} is varied as a factor: write it below [factors] (extraction, w, images ...)"
            )
        if name not in known:
            raise StudyError(f"there is no setting {name!r}: there are {', '.join(known)}")
    said = {**(preset.settings if preset else {}), **given}
    overrides = {f"settings.{name}": value for name, value in said.items()}
    return load_config(None, {}, overrides).settings


def _cells(tree: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, ...]], ...]:
    """The levels of every listed part: the preset's, of [factors], and of each of [[cells]], the later the stronger."""
    common, listed = tree.get("factors", {}), tree.get("cells", [{}])
    preset = _preset(tree)
    if not isinstance(common, dict) or not isinstance(listed, list) or not listed:
        raise StudyError("factors is a table, [factors], and cells a list of tables, [[cells]]")
    found = []
    for one in listed:
        if not isinstance(one, dict):
            raise StudyError("cells is a list of tables: [[cells]]")
        for part in preset.parts if preset else ({},):
            given = {**part, **common, **one}
            found.append({name: tuple(levels_of(name, value)) for name, value in given.items()})
    return tuple(found)


def _preset(tree: Mapping[str, Any]) -> Preset | None:
    name = tree.get("preset")
    if name is not None and name not in PRESETS:
        raise StudyError(f"there is no preset {name!r}: there are {', '.join(PRESETS)}")
    return PRESETS[name] if name else None


def expand(levels: Mapping[str, Sequence[Any]]) -> Iterator[tuple[TrainingFactors, AuditFactors]]:
    """The cross product of the levels, each combination once: factors that do not apply make no difference."""
    names = list(levels)
    for values in itertools.product(*(levels[name] for name in names)):
        given = dict(zip(names, values, strict=True))
        yield (
            TrainingFactors.of({name: given[name] for name in names if name in TRAINING}),
            AuditFactors.of({name: given[name] for name in names if name in AUDIT}),
        )


def plan_of(study: Study, beside: Path) -> Plan:
    """The plan of a study whose file is in the folder ``beside``. Raises StudyError for what cannot be done."""
    count = sum(math.prod(len(levels) for levels in one.values()) for one in study.cells)
    if count > MOST_CELLS:
        raise StudyError(
            f"the study has more than {MOST_CELLS} combinations of levels: leave levels out, or list cells"
        )
    combinations = dict.fromkeys(both for levels in study.cells for both in expand(levels))
    sets = read_sets(study.sets, beside, study.only)
    cells = [Cell(one.name, *both) for one in sets for both in combinations]
    groups: dict[tuple[str, TrainingFactors], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.few_shot, cell.training), []).append(cell)
    plan = Plan(study, {one.name: one for one in sets}, cells, groups)
    for cell in cells:
        _check(plan, cell)
    return plan


def _check(plan: Plan, cell: Cell) -> None:
    """Raise StudyError where a set cannot serve a cell."""
    whole, training, audit = plan.sets[cell.few_shot], cell.training, cell.audit
    if training.n0 is not None and training.n0 > len(whole.training):
        raise StudyError(f"n0 = {training.n0}: the set {whole.name} has {len(whole.training)} pictures")
    if training.defence is Defence.weight_filter and training.method is not Tuning.lora:
        raise StudyError(
            "defence = weight-filter filters a LoRA, and method = dreambooth has none: list them apart, as [[cells]]"
        )
    if training.prior and whole.class_caption is None:
        raise StudyError(
            f"prior preservation: nobody says what the class of the set {whole.name} is called; write a column class "
            "in prompts.csv"
        )
    if audit.captions is Knowledge.wrong and len(plan.sets) < 2:
        raise StudyError("captions = wrong takes those of another set, and there is one set: add one, or leave it out")
    if audit.captions is Knowledge.trigger:
        whole.triggers()
    used = plan.set_of(cell.few_shot, training)
    if audit.rule is Judgement.fixed and not used.control:
        raise StudyError(f"rule: the set {whole.name} has no control pictures: add a folder control, or leave rule out")
    if audit.rule is Judgement.calibrated and len(used.decoys) < FEWEST_DECOYS:
        raise StudyError(
            f"rule = calibrated: the set {whole.name} has {len(used.decoys)} decoys, of {FEWEST_DECOYS} that it takes: "
            "add pictures to its folder decoys, or take rule = fixed"
        )


def settings_of(study: Study, audit: AuditFactors) -> Settings:
    """The settings of an audit: those of the study, with the levels of its factors."""
    return replace(
        study.settings,
        method=audit.extraction,
        w=audit.w if audit.extraction is not Method.direct else 1.0,
        k=audit.k or 0.0,
        images_per_training_image=audit.images,
        lora_scale=audit.lora_scale,
        clustering=audit.clustering,
        evidence=Evidence(audit.evidence) if audit.evidence else Evidence.extraction,
    )


@dataclass(frozen=True)
class Counts:
    """What a plan comes to. ``evaluations`` of one picture each; a training step is 3 (forward, and twice backward)."""

    sets: int
    cells: int
    fine_tunes: int
    training_steps: int
    training_evaluations: int
    images: int
    audit_evaluations: int


def counts(plan: Plan) -> Counts:
    """Count what is to be done."""
    steps = trained = images = audited = 0
    for (few_shot, training), cells in plan.groups.items():
        n0 = len(plan.set_of(few_shot, training).training)
        mine = training.steps * n0
        steps += mine
        trained += 3 * mine * training.batch * (2 if training.prior else 1)
        for cell in cells:
            sampled = cell.audit.images * n0
            images += sampled
            audited += sampled * plan.study.settings.steps * EVALUATIONS[cell.audit.extraction]
    return Counts(len(plan.sets), len(plan.cells), len(plan.groups), steps, trained, images, audited)


def varied(plan: Plan) -> list[str]:
    """The factors that have more than one level within a method of training, and that method where there are two.

    Where a factor does not apply it has no level.
    """
    found = []
    for name in FACTORS:
        by_method: dict[str, set[Any]] = {}
        for cell in plan.cells:
            if applies(name, cell):
                level = getattr(cell.training if name in TRAINING else cell.audit, name)
                by_method.setdefault("" if name == "method" else cell.training.method, set()).add(level)
        if any(len(levels) > 1 for levels in by_method.values()):
            found.append(name)
    return found


def applies(name: str, cell: Cell) -> bool:
    """Whether a factor has a level in a cell."""
    other, levels = FACTORS[name][1].metadata.get("only", (None, ()))
    part = cell.training if name in TRAINING else cell.audit
    return other is None or getattr(part, other) in levels


def difference(before: Any, now: Any, where: str = "") -> str | None:
    """The first place in which two documents differ, in words; None where they are equal."""
    lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    if lists and all(isinstance(one, dict) for one in (*before, *now)):
        before, now = ({str(row): one for row, one in enumerate(some)} for some in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if name not in before or name not in now:
                return f"{where}{name} is {'new' if name in now else 'gone'}"
            if found := difference(before[name], now[name], f"{where}{name}."):
                return found
        return None
    return None if before == now else f"{where.rstrip('.')} is another"
