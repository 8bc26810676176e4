"""What can be varied in a study: factors of the fine-tuning and of the audit, with levels, limits and help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import Any, get_args, get_type_hints

from audit.config import Clustering, Method
from audit.errors import StudyError


class Tuning(StrEnum):
    """What is trained: an adapter, or all weights of the denoiser."""

    lora = "lora"
    dreambooth = "dreambooth"


class Layout(StrEnum):
    """The layout of a LoRA's file."""

    kohya = "kohya"
    peft = "peft"
    diffusers = "diffusers"


class Targets(StrEnum):
    """Which modules of the denoiser a LoRA adapts.

    attention: queries, keys, values and outputs, as diffusers' scripts; transformer: all of the transformer blocks and
    the projections beside them, as kohya's; everything: 3x3 convolutions of the resnets too.
    """

    attention = "attention"
    transformer = "transformer"
    everything = "everything"


class Augmentation(StrEnum):
    """How training pictures are changed: a habit (mirrored) or a defence against extraction."""

    none = "none"
    mirrored = "mirrored"
    cutout = "cutout"
    randaugment = "randaugment"


class Defence(StrEnum):
    """What is done against extraction beside changes of the pictures.

    weight-filter: of a trained LoRA the directions are left out that are least those of the base's weights
    (``audit/study/weight_filter.py``); dp-sgd: gradients are clipped picture by picture, and noise is added
    (``audit/study/private.py``).
    """

    none = "none"
    weight_filter = "weight-filter"
    dp_sgd = "dp-sgd"


class Schedule(StrEnum):
    """The learning rate over the steps."""

    constant = "constant"
    cosine = "cosine"


class Knowledge(StrEnum):
    """What the auditor knows of the captions.

    known: those of the training pictures; partial: some words of each; trigger: the words of each that stand for the
    set alone; wrong: those of another set; empty: the empty caption; unknown: no caption is given, and the audit
    recovers some from the model.
    """

    known = "known"
    partial = "partial"
    trigger = "trigger"
    wrong = "wrong"
    empty = "empty"
    unknown = "unknown"


class Judgement(StrEnum):
    """Whether an audit is asked about the training pictures among pictures of their kind, and by which rule."""

    none = "none"
    fixed = "fixed"
    calibrated = "calibrated"


class Witness(StrEnum):
    """What evidence is looked for: what comes out of the model, or also what it knows (membership)."""

    extraction = "extraction"
    both = "both"


def _factor(default: Any, text: str, **more: Any) -> Any:
    """A factor: help, ``min`` and ``max``; ``word`` is what None is called; ``only`` where it applies, else it is None.

    ``only`` is (another factor, its levels).
    """
    return field(default=default, metadata={"help": text, **more})


LORA = ("method", (Tuning.lora,))


class _Levels:
    """One level of each factor, checked: numbers are within limits, and factors that do not apply are None."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Any:
        """The levels, of ``given`` ones and defaults. Raises StudyError for a level that there is not."""
        known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
        values = {name: checked(one, cls, given.get(name, one.default)) for name, one in known.items()}
        for name, one in known.items():
            other, levels = one.metadata.get("only", (None, ()))
            if other is not None and values[other] not in levels:
                values[name] = None
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: str(value) if isinstance(value, StrEnum) else value for name, value in asdict(self).items()}  # type: ignore[call-overload]


@dataclass(frozen=True)
class TrainingFactors(_Levels):
    """How a checkpoint is fine-tuned."""

    method: Tuning = _factor(Tuning.lora, "What is trained: lora, or dreambooth (all weights of the denoiser).")
    layout: Layout | None = _factor(Layout.kohya, "The layout of a LoRA's file: kohya, peft or diffusers.", only=LORA)
    rank: int | None = _factor(64, "Rank of a LoRA; its alpha is the same.", min=1, max=1024, only=LORA)
    targets: Targets | None = _factor(
        Targets.attention, "What a LoRA adapts: attention, transformer or everything (convolutions too).", only=LORA
    )
    text_encoder: bool = _factor(False, "Whether the text encoder is trained too.")
    prior: bool = _factor(False, "Prior preservation: whether class pictures of the base are trained on beside.")
    steps: int = _factor(200, "Optimiser steps for each training picture: this times N0 in all.", min=1, max=10**6)
    lr: float | None = _factor(
        None, "Peak learning rate. auto: 1e-4 for LoRA, 2e-6 for DreamBooth, the paper's.", min=1e-9, max=1, word="auto"
    )
    batch: int = _factor(1, "Pictures a step.", min=1, max=256)
    schedule: Schedule = _factor(Schedule.constant, "Learning rate over the steps: constant, or cosine with a warm-up.")
    n0: int | None = _factor(
        None, "Training pictures, the first of a set by name; the others are held out. all: all of them.",
        min=2, max=1000, word="all",
    )  # fmt: skip
    augmentation: Augmentation = _factor(
        Augmentation.none, "Changes of the training pictures: none, mirrored, cutout or randaugment."
    )
    defence: Defence = _factor(
        Defence.none, "What is done against extraction: none, weight-filter (of a LoRA) or dp-sgd."
    )
    filter_kept: float | None = _factor(
        0.5, "Share of a LoRA's directions that weight-filter keeps, those nearest to the base's.", min=0, max=1,
        only=("defence", (Defence.weight_filter,)),
    )  # fmt: skip
    noise_multiplier: float | None = _factor(
        1.0, "dp-sgd's noise: its standard deviation over the length that gradients are clipped to.", min=0, max=1000,
        only=("defence", (Defence.dp_sgd,)),
    )  # fmt: skip
    repeat: int = _factor(0, "Number of the repetition: another seed.", min=0, max=1000)

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else 1e-4 if self.method is Tuning.lora else 2e-6


SAMPLED = ("extraction", (Method.cfg, Method.model_guidance))
GUIDED = ("extraction", (Method.model_guidance,))
ASKED = ("rule", (Judgement.fixed, Judgement.calibrated))


@dataclass(frozen=True)
class AuditFactors(_Levels):
    """How a checkpoint is audited."""

    extraction: Method = _factor(Method.model_guidance, "How sampling is steered: direct, cfg or model-guidance.")
    w: float | None = _factor(None, "Guidance weight, or auto.", min=0, max=1000, word="auto", only=SAMPLED)
    k: float | None = _factor(0.0, "Correction term of model guidance.", min=-10, max=10, only=GUIDED)
    images: int = _factor(50, "Images sampled for each training image.", min=1, max=10_000)
    captions: Knowledge = _factor(
        Knowledge.known, "What the auditor knows of captions: known, partial, trigger, wrong, empty or unknown."
    )
    caption_share: float | None = _factor(
        0.5, "Share of each caption's words that partial ones keep, at least one, drawn by the study's seed.", min=0,
        max=1, only=("captions", (Knowledge.partial,)),
    )  # fmt: skip
    clustering: Clustering = _factor(Clustering.peaks, "peaks, or cliques (the paper's).")
    lora_scale: float = _factor(1.0, "Strength at which a LoRA is applied.", min=0, max=10)
    rule: Judgement = _factor(
        Judgement.none,
        "Whether the audit is asked about the training pictures among held-out ones, and by which rule: none, fixed or "
        "calibrated.",
    )  # fmt: skip
    evidence: Witness | None = _factor(Witness.extraction, "What evidence: extraction, or both.", only=ASKED)


TRAINING = tuple(one.name for one in fields(TrainingFactors))
AUDIT = tuple(one.name for one in fields(AuditFactors))
FACTORS: dict[str, tuple[type, Field[Any]]] = {
    one.name: (kind, one) for kind in (TrainingFactors, AuditFactors) for one in fields(kind)
}


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)


def checked(one: Field[Any], owner: type, value: Any) -> Any:
    """``value`` as a level of the factor ``one`` of ``owner``. Raises StudyError."""
    hint = _hints(owner)[one.name]
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    kind, word = kinds[0], one.metadata.get("word")
    if value is None or (word is not None and value == word):
        return None
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if value not in list(kind):
            raise StudyError(f"factor {one.name}: there is no level {value!r}; there are {', '.join(kind)}")
        return kind(value)
    return _number(one, kind, value)


def _number(one: Field[Any], kind: type, value: Any) -> Any:
    least, most, word = (one.metadata.get(name) for name in ("min", "max", "word"))
    fits = isinstance(value, bool) if kind is bool else isinstance(value, int | float) and not isinstance(value, bool)
    if fits and kind is int:
        fits = float(value).is_integer()
    if fits and kind is not bool:
        fits = math.isfinite(value) and least <= value <= most
    if not fits:
        what = "true or false" if kind is bool else f"a {'whole ' if kind is int else ''}number from {least} to {most}"
        raise StudyError(f"factor {one.name}: {value!r} is no level; it is {what}{f', or {word!r}' if word else ''}")
    return kind(value)


def levels_of(name: str, given: Any) -> Iterator[Any]:
    """The levels of factor ``name`` in a study file: one, or a list of them, each once. Raises StudyError."""
    if name not in FACTORS:
        raise StudyError(f"there is no factor {name!r}: there are {', '.join(FACTORS)}")
    owner, one = FACTORS[name]
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise StudyError(f"factor {name}: the list of levels is empty")
    yield from dict.fromkeys(checked(one, owner, value) for value in listed)
