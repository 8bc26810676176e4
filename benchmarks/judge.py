"""An independent judge of extractions: SSCD, which had no part in making the testbed, in two views.

    python -m benchmarks.judge            # calibrate it again: the thresholds, and how often they err

The network is Meta's sscd_disc_mixup as int8 ONNX (audit/descriptors/sscd_int8.py, the extra ``judge``). ``native``
sees the pictures as they are, 64 pixels a side; ``288`` sees them scaled up to the 288 pixels that SSCD wants. Every
benchmark that prints AS and A-ESR has its figures beside those of nano's descriptor: ``--judge sscd`` asks for them and
fails without the package, ``none`` leaves them out, and by default they are there where the package is installed.

A view's threshold is the least cosine that at most 1 % of the pictures that nothing was trained on pass with any
training picture of their set, or with one that went through the codec: of the tuning sets, near-misses left aside. An
A-ESR counts pictures whose best cosine is above it. ``results/judge.json`` keeps both thresholds and their error rates.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from audit.descriptors import Descriptor
from audit.descriptors.facts import Spec
from audit.descriptors.networks import OnnxDescriptor
from audit.descriptors.sscd_int8 import DESCRIPTOR as SSCD
from audit.descriptors.sscd_int8 import LABEL, SHA256
from audit.errors import AuditError, ConfigError, DescriptorError
from testbed.sets import SIZE

CALIBRATION = Path(__file__).parent / "results" / "judge.json"
SIDES = {"native": SIZE, "288": 288}
VIEWS = tuple(SIDES)
NOT_ASKED = "not asked"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the cosines that the calibration writes down
FALSE_MATCHES = 0.01  # of the control pictures; nano's 0.7 is set by the same share
FIGURES = ("as", "a_esr", "control_as", "control_a_esr", "near_as", "near_a_esr", "ceiling")


class JudgeName(StrEnum):
    """Who judges beside nano's descriptor."""

    auto = "auto"
    sscd = "sscd"
    none = "none"


@dataclass(frozen=True)
class View:
    """SSCD at one size of its input: what makes the vectors, and the cosine above which pictures are the same."""

    name: str
    descriptor: Descriptor
    threshold: float


def settled(asked: JudgeName) -> JudgeName:
    """Whether the judge speaks (sscd), is not installed (auto) or was not asked (none).

    Raises typer.BadParameter, in words, where it was asked for by name, or is installed, and cannot be had.
    """
    if asked is JudgeName.none:
        return asked
    try:
        SSCD.path()
    except DescriptorError as error:
        if asked is JudgeName.sscd:
            raise typer.BadParameter(str(error), param_hint="--judge") from error
        print(f"SSCD's figures are absent: {error}", flush=True)
        return JudgeName.auto
    try:
        views()
    except AuditError as error:
        raise typer.BadParameter(f"{error}; or leave it out with --judge none", param_hint="--judge") from error
    return JudgeName.sscd


Asked = Annotated[JudgeName, typer.Option("--judge", help="sscd, none, or auto: sscd where its package is installed.")]


@cache
def views(threads: int = 1) -> tuple[View, ...]:
    """Both views. Raises DescriptorError where the package is not installed or its file is not the pinned one."""
    thresholds = calibrated()
    return tuple(View(name, network(name, threads), thresholds[name]) for name in VIEWS)


def network(view: str, threads: int = 1) -> Descriptor:
    """SSCD with the input of one view. Raises DescriptorError."""
    return OnnxDescriptor(SSCD.path(), Spec(LABEL, SIDES[view], 1.0, SHA256), threads)


def calibrated(file: Path = CALIBRATION) -> dict[str, float]:
    """The threshold of each view. Raises ConfigError where ``file`` does not hold it for this network and this size."""
    mend = "run python -m benchmarks.judge"
    try:
        found = json.loads(file.read_text())
        if (found["sha256"], found["sides"]) != (SHA256, SIDES):
            raise ConfigError(f"{file} is of another network or of another size of pictures: {mend}")
        thresholds = {name: found["views"][name]["threshold"] for name in VIEWS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} holds no thresholds ({type(error).__name__}): {mend}") from error
    if not all(type(one) is float and 0 < one < 1 for one in thresholds.values()):
        raise ConfigError(f"{file} has thresholds that are not between 0 and 1: {mend}")
    return thresholds


def opened(pngs: Iterable[bytes | None]) -> list[Image.Image] | None:
    """The pictures of PNG bytes; None where one was not kept."""
    kept = list(pngs)
    if any(png is None for png in kept):
        return None
    return [Image.open(io.BytesIO(png)).convert("RGB") for png in kept if png is not None]


def key(view: str, figure: str) -> str:
    """What a figure of a view is called in the rows of a benchmark."""
    return f"sscd_{view}_{figure}"


KEYS = tuple(key(view, figure) for view in VIEWS for figure in FIGURES)


def figures(
    extractions: Sequence[Image.Image] | None,
    known: dict[str, np.ndarray],
    reconstructed: np.ndarray,
    threads: int = 1,
) -> dict[str, Any]:
    """What both views say of ``extractions``; None each where these were not kept as pictures.

    ``known`` are uint8 [N, H, W, 3]: "train", "control" and "near", and ``reconstructed`` those of "train" through the
    codec. Of no near-misses nothing is said.
    """
    found: dict[str, Any] = {"judge": SSCD.name} | dict.fromkeys(KEYS)
    for view in views(threads):
        vectors = {part: _described(view.name, threads, *_as_bytes(pictures)) for part, pictures in known.items()}
        cosines = (vectors["train"] * _described(view.name, threads, *_as_bytes(reconstructed))).sum(axis=1)
        found |= {key(view.name, "ceiling"): float(cosines.mean()), key(view.name, "threshold"): view.threshold}
        if extractions is None:
            continue
        described = view.descriptor.describe(extractions)
        for part, prefix in (("train", ""), ("control", "control_"), ("near", "near_")):
            if len(vectors[part]):
                best = best_of(vectors[part], described)
                found[key(view.name, f"{prefix}as")] = float(best.mean())
                found[key(view.name, f"{prefix}a_esr")] = float((best > view.threshold).mean())
    return found


def _as_bytes(pictures: np.ndarray) -> tuple[bytes, tuple[int, ...]]:
    """uint8 pictures [N, H, W, 3] as something that can be looked up."""
    return pictures.tobytes(), pictures.shape


@lru_cache(maxsize=16)
def _described(view: str, threads: int, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The vectors of pictures that many rows are compared with, described once."""
    (seeing,) = (one for one in views(threads) if one.name == view)
    return seeing.descriptor.describe(np.frombuffer(data, np.uint8).reshape(shape))


def absent(judge: JudgeName) -> dict[str, Any]:
    """What stands in the rows where the judge did not speak."""
    return {"judge": NOT_ASKED if judge is JudgeName.none else "not installed"} | dict.fromkeys(KEYS)


def best_of(known: np.ndarray, found: np.ndarray) -> np.ndarray:
    """float32 [K]: the best cosine of each of the known pictures; 0 where nothing was found."""
    return (known @ found.T).max(axis=1) if len(found) else np.zeros(len(known), np.float32)


def shown(value: float | None, digits: int) -> str:
    """A figure for people; what was not measured is called absent."""
    return "absent" if value is None else f"{value:.{digits}f}"


def lines(row: dict[str, Any], margin: str) -> list[str]:
    """What each view says in a row of a benchmark, for people, below the row."""
    if row["judge"] != SSCD.name:
        return [] if row["judge"] == NOT_ASKED else [f"{margin}by SSCD: absent ({row['judge']})"]
    found = []
    for view in VIEWS:
        of = {figure: row[key(view, figure)] for figure in (*FIGURES, "threshold")}
        found.append(
            f"{margin}by SSCD {view:7}AS {shown(of['as'], 3)}  A-ESR {shown(of['a_esr'], 2)} above "
            f"{of['threshold']:.2f}  control {shown(of['control_as'], 3)} {shown(of['control_a_esr'], 2)}  near "
            f"{shown(of['near_as'], 3)} {shown(of['near_a_esr'], 2)}  ceiling {of['ceiling']:.3f}"
        )
    return found


if __name__ == "__main__":
    from benchmarks.calibration import main

    typer.run(main)
