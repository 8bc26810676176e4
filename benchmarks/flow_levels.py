"""At which times of a flow membership tells most: the AUC of its score, at equal numbers of evaluations.

A flow's time t is the share of noise in x_t = (1 - t) x_0 + t eps. A choice is three times with a noise each, or one
with three: three evaluations a picture and model. "as Stable Diffusion" is what audits take, its proportions of noise
and picture at 100, 300 and 500 thousandths; the others are spread evenly, by the quantiles of the logit-normal times of
training (arXiv 2403.03206, section 3.1), or shifted as samplers do, t' = s t / (1 + (s - 1) t) (its section 5.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audit.demo import load_set
from audit.evidence.membership import SCALE, Level, scores
from audit.models.base import BaseModel
from benchmarks.extraction import known_interval
from benchmarks.membership import Measured, Subject, figures
from testbed.controls import controls
from testbed.finetune import Recipe
from testbed.sets import few_shot_set

NOISES = 3  # and as many times of a choice
EVEN = (250, 500, 750)
SINGLE = (50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 900)
FIGURES = ("auc", "tpr_at_fpr_1")
CHOSEN = "as Stable Diffusion"


def shifted(times: Sequence[int], shift: float) -> tuple[int, ...]:
    """Times in thousandths, moved towards noise by a ``shift`` above 1, towards the picture by one below."""
    return tuple(round(SCALE * shift * t / (SCALE + (shift - 1) * t)) for t in times)


CHOICES: dict[str, tuple[int, ...]] = {
    CHOSEN: (256, 454, 618),
    "even": EVEN,
    "logit-normal": (275, 500, 725),  # its quantiles 1/6, 1/2, 5/6
    "shift 3": shifted(EVEN, 3),
    "shift 1/3": shifted(EVEN, 1 / 3),
    "low": (100, 200, 300),
    "high": (700, 800, 900),
    **{f"{t / SCALE:.2f} alone": (t,) for t in SINGLE},
}


class OfFlow(Measured):
    """Losses of a model by the flow's own time, in thousandths."""

    def level(self, t: int) -> Level:
        """x_t with the share t of noise."""
        return Level(t, float(t), 1 - t / SCALE, t / SCALE, "flow_prediction")


def subjects_of(checkpoints: Path, recipes: Sequence[Recipe]) -> list[Subject]:
    """The checkpoints with their training pictures and all controls of their sets, nobody's training pictures."""
    found = []
    for recipe in recipes:
        few_shot = few_shot_set(recipe.few_shot)
        members, others = load_set(few_shot.name, "train"), controls(few_shot.name)
        found.append(
            Subject(recipe.name, recipe.file(checkpoints), few_shot.captions[0], few_shot.holdout, "", few_shot.name,
                    np.concatenate([members, others]), len(members), len(others))
        )  # fmt: skip
    return found


def measured(checkpoints: Path, recipes: Sequence[Recipe], base: BaseModel, cache: Path) -> list[dict[str, Any]]:
    """A row a checkpoint and choice of times; what networks answered is kept in ``cache``."""
    times = sorted({t for chosen in CHOICES.values() for t in chosen})
    rows = []
    for subject in subjects_of(checkpoints, recipes):
        one = OfFlow(subject, base, cache)
        before, after = (one.losses(side, times, NOISES) for side in (False, True))
        for name, chosen in CHOICES.items():
            at, noises = [times.index(t) for t in chosen], NOISES // len(chosen)
            found = figures(subject, scores(before[:, at, :noises], after[:, at, :noises]))
            about = {"checkpoint": subject.name, "holdout": subject.holdout, "members": subject.members}
            rows.append(about | {"others": subject.others, "choice": name} | dict(zip(FIGURES, found, strict=True)))
        print(f"{subject.name:45} {one.evaluations} evaluations in {one.seconds:.0f} s of a processor", flush=True)
    return rows


def remembered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over checkpoints with intervals, a choice; and what audits take less it, paired by checkpoint."""
    by_way = {(row["checkpoint"], row["choice"]): row for row in rows}
    names = dict.fromkeys(row["checkpoint"] for row in rows)
    found = []
    for choice in dict.fromkeys(row["choice"] for row in rows):
        entry: dict[str, Any] = {"choice": choice, "times": CHOICES[choice], "checkpoints": len(names)}
        for key in FIGURES:
            entry[key] = known_interval([by_way[name, choice][key] for name in names])
            entry[f"gain_{key}"] = known_interval(
                [by_way[name, CHOSEN][key] - by_way[name, choice][key] for name in names]
            )
        found.append(entry)
    return sorted(found, key=lambda one: -one["auc"][0])
