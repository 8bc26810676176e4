"""What membership scores are chosen by: how well each tells training pictures from others of their kind.

    python -m benchmarks.membership [--quick] [--json FILE]
    python -m benchmarks.membership --realistic FOLDER --checkpoints DIR --json FILE

For every checkpoint: the losses of base and fine-tuned model on its training pictures and on pictures of the same
source that it has not seen; from them the AUC and the true positive rate at 1 % false positives of

* ours, 1 - L_tuned / L_base, at sets of timesteps, with 1 to 4 noises, under several normalisations,
* the plain loss of the fine-tuned model, SecMI's t-error (arXiv 2302.01316), PIA (2305.18355), SimA (2509.25003), and
  CLiD's difference between caption and none (2405.14800), which needs to know the caption,
* and ours where the reference is another version of the training picture (mirrored, cropped, ...), with the views of it
  that are measured.

Rows are means over checkpoints, tuning and holdout sets apart; nothing is chosen by the latter. Without options it
takes the checkpoints that are shipped. ``--realistic`` is a folder of checkpoints with their training.json. What was
measured is kept (--cache): a stopped run goes on.

Exit code 1 where ours, as an audit measures it, has an AUC below 0.9 on the shipped checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from audit.demo import ASSETS, load_set
from audit.evidence.membership import Level, Predict, level_of, losses, scores
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from benchmarks.grid import SHIPPED, available
from benchmarks.versions import VERSIONS, VIEW_SETS, VIEWS
from testbed.more_sets import prepared
from testbed.sets import few_shot_set

GRID = (50, 100, 200, 300, 400, 500, 600, 700, 800)
NOISES = 4
QUICK = 2
MOST_OTHERS = 30
SHIPPED_GROUP, LEAST_AUC = "medium none", 0.9
BATCH = 64
SETS = {
    "400 600 800": (400, 600, 800), "200 400 600": (200, 400, 600), "100 300 500": (100, 300, 500),
    "300 400 500": (300, 400, 500), "100 200 300": (100, 200, 300), "100 to 600": (100, 200, 300, 400, 500, 600),
    "all": GRID, **{str(t): (t,) for t in GRID},
}  # fmt: skip
CHOSEN = "100 300 500"
TOLD = "400 600 800"  # where CLiD is measured
COUNTS = (1, 2, 4)
PLAIN = ("mean of ratios", "ratio of sums")  # normalisations at all timesteps, others at some


@dataclass(frozen=True)
class Subject:
    """One checkpoint with the pictures it was trained on and others of their kind.

    ``pool`` uint8 [N, 64, 64, 3] are pictures of its source: the first ``members`` it was trained on, the last
    ``others`` it was not.
    """

    name: str
    path: Path
    caption: str
    holdout: bool
    group: str
    source: str
    pool: np.ndarray
    members: int
    others: int

    @property
    def rows(self) -> np.ndarray:
        """Which of the pool are measured, the members first."""
        return np.r_[: self.members, len(self.pool) - self.others : len(self.pool)]


def of_testbed(checkpoints: Path, only: Sequence[str] | None) -> list[Subject]:
    """The testbed's checkpoints in a folder, with their few-shot sets."""
    found = []
    for recipe in available(checkpoints, only):
        few_shot = few_shot_set(recipe.few_shot)
        members, others = (load_set(recipe.few_shot, part) for part in ("train", "control"))
        found.append(
            Subject(recipe.name, recipe.file(checkpoints), few_shot.captions[0], few_shot.holdout,
                    f"{recipe.strength} {recipe.defence}", recipe.few_shot, np.concatenate([members, others]),
                    len(members), len(others))
        )  # fmt: skip
    return found


def realistic(folder: Path) -> list[Subject]:
    """The finished checkpoints of a folder: each with a training.json that says its set, N0 and captions."""
    found = []
    for about in sorted(folder.glob("*/training.json")):
        said = json.loads(about.read_text())
        pictures, count = prepared(said["few_shot"]), said["training_images"]
        images = np.concatenate([pictures.training, pictures.control])
        [path] = about.parent.glob("*.safetensors")
        found.append(
            Subject(about.parent.name, path, said["training_captions"][0], said["holdout"],
                    f"{said['exposures']} exposures", said["few_shot"], images, count,
                    min(MOST_OTHERS, len(images) - count))
        )  # fmt: skip
    return found


class Measured:
    """What the networks answer for a subject; kept in ``cache``, a file a question."""

    def __init__(self, subject: Subject, base: BaseModel, cache: Path) -> None:
        self.subject, self.model, self.cache = subject, base, cache
        self.evaluations, self.seconds = 0, 0.0

    @cached_property
    def pair(self) -> ModelPair:
        """Loaded when something is to be measured."""
        return ModelPair(self.model, open_checkpoint(self.subject.path))

    def level(self, t: int) -> Level:
        """The level ``t`` of this model."""
        return level_of(t, self.pair.prediction_type, self.pair.scheduler)

    def predictor(self, tuned: bool, caption: str = "") -> Predict:
        """One of the models under a caption."""
        condition = self.pair.encode([caption], tuned)
        predict = self.pair.predict_tuned if tuned else self.pair.predict_base
        return lambda x, t: predict(x, t, condition.select(torch.zeros(len(x), dtype=torch.long)))

    def latents(self, tuned: bool, version: str = "whole", view: str = "whole") -> torch.Tensor:
        """Latents of a view of a version of the pictures: of the pool for the base, which many subjects share."""
        pictures = self.subject.pool[self.subject.rows] if tuned else self.subject.pool
        return torch.from_numpy(self.pair.encode_pictures(VIEWS[view](VERSIONS[version](pictures))))

    def losses(
        self, tuned: bool, timesteps: Sequence[int], noises: int, version: str = "whole", view: str = "whole",
        caption: str = "",
    ) -> np.ndarray:  # fmt: skip
        """[pictures, timesteps, noises]; the base's are kept for all subjects of a source."""

        def measure() -> np.ndarray:
            levels = [self.level(t) for t in timesteps]
            latents = self.latents(tuned, version, view)
            return losses(self.predictor(tuned, caption), latents, levels, range(noises), self.pair.fits, "b", BATCH)

        about = [timesteps, noises, version, view, caption]
        return self._kept(tuned, about, measure)

    def _kept(self, tuned: bool, about: list[Any], measure: Callable[[], np.ndarray]) -> np.ndarray:
        rows = slice(None) if tuned else self.subject.rows
        pictures = hashlib.sha256(self.subject.pool.tobytes()).hexdigest()
        whose = [self.subject.name, self.subject.path.stat().st_mtime] if tuned else self.model.revision
        key = hashlib.sha256(json.dumps([whose, pictures, about]).encode()).hexdigest()[:24]
        path = self.cache / f"{key}.npy"
        if path.is_file():
            return np.asarray(np.load(path)[rows])
        _ = self.pair
        started = time.process_time()
        with torch.inference_mode():
            found = measure()
        self.seconds += time.process_time() - started
        self.evaluations += found.size
        self.cache.mkdir(parents=True, exist_ok=True)
        np.save(path, found)
        return np.asarray(found[rows])

    # Scores of others; higher: rather a member

    def _noise(self, x: torch.Tensor, t: int, predict: Predict) -> torch.Tensor:
        """eps that the model sees in x at level ``t``: v and x_0 as eps, which these scores are defined for."""
        level = self.level(t)
        answer = predict(x, torch.tensor(int(level.timestep))).float()
        if level.kind == "v_prediction":
            return level.alpha * answer + level.sigma * x
        return answer if level.kind == "epsilon" else (x - level.alpha * answer) / level.sigma

    def sima(self, t: int, tuned: bool) -> np.ndarray:
        """[pictures]: the norm of the predicted noise of the picture itself, nothing added (SimA, equation 5; l4)."""

        def measure() -> np.ndarray:
            x = self.latents(tuned)
            return np.asarray(self._noise(x, t, self.predictor(tuned)).flatten(1).norm(p=4, dim=1))

        return self._kept(tuned, ["sima", t], measure)

    def pia(self, t: int) -> np.ndarray:
        """[pictures]: how far the noise seen at t = 0 and the one seen where it was added at t differ (PIA, l4)."""

        def measure() -> np.ndarray:
            x, predict, level = self.latents(True), self.predictor(True), self.level(t)
            first = self._noise(x, 0, predict)
            second = self._noise(level.noised(x, first), t, predict)
            return np.asarray((first - second).flatten(1).norm(p=4, dim=1))

        return self._kept(True, ["pia", t], measure)

    def secmi(self, t: int = 100, step: int = 10) -> np.ndarray:
        """[pictures]: SecMI's t-error: there by deterministic steps, one further and one back."""

        def measure() -> np.ndarray:
            x, predict = self.latents(True), self.predictor(True)

            def moved(x: torch.Tensor, now: int, then: int) -> torch.Tensor:
                noise, here, there = self._noise(x, now, predict), self.level(now), self.level(then)
                return there.noised((x - here.sigma * noise) / here.alpha, noise)

            for now in range(0, t, step):
                x = moved(x, now, now + step)
            back = moved(moved(x, t, t + step), t + step, t)
            return np.asarray((back - x).flatten(1).square().sum(1))

        return self._kept(True, ["secmi", t, step], measure)


# Figures


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The share of pairs in which the member scores higher, ties half (Mann and Whitney)."""
    less = np.subtract.outer(members, others)
    return float((less > 0).mean() + (less == 0).mean() / 2)


def tpr(members: np.ndarray, others: np.ndarray, most: float = 0.01) -> float:
    """The share of members above all but ``most`` of the others: above all of them where they are few."""
    allowed = int(most * len(others))
    return float((members > np.sort(others)[::-1][allowed]).mean())


def figures(subject: Subject, scores: np.ndarray) -> tuple[float, float]:
    """AUC and TPR at 1 % FPR of the scores of a subject's pictures."""
    members, others = scores[: subject.members], scores[subject.members :]
    return auc(members, others), tpr(members, others)


def gains(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """1 - L_tuned / L_base, elementwise."""
    return 1 - tuned / base


def _regressed(found: np.ndarray, base: np.ndarray) -> np.ndarray:
    """What is left of scores when the part that follows from the base's loss is taken away (a straight line)."""
    hard = np.log(base)
    return found - np.polyval(np.polyfit(hard, found, 1), hard)


NORMALISED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean of ratios": lambda base, tuned: gains(base, tuned).mean((1, 2)),
    "ratio of sums": scores,
    "log ratio": lambda base, tuned: np.log(base / tuned).mean((1, 2)),
    "difference": lambda base, tuned: (base - tuned).mean((1, 2)),
    "less the base's loss": lambda base, tuned: _regressed(
        gains(base, tuned).mean((1, 2)), base.mean((1, 2))
    ),
}  # fmt: skip


def scores_of(one: Measured, noises: int, quick: bool) -> dict[tuple[str, str, int, str, str, str], np.ndarray]:
    """Scores of all pictures, by (score, timesteps, noises, normalisation, version, views)."""
    found: dict[tuple[str, str, int, str, str, str], np.ndarray] = {}
    base, tuned = (one.losses(side, GRID, noises) for side in (False, True))
    for name, chosen in SETS.items():
        rows = [GRID.index(t) for t in chosen]
        for count in (count for count in COUNTS if count <= noises):
            some = base[:, rows, :count], tuned[:, rows, :count]
            for normal in NORMALISED if name in (CHOSEN, "400 600 800", "100 to 600") else PLAIN:
                found["gain", name, count, normal, "whole", "whole"] = NORMALISED[normal](*some)
            found["loss of the tuned", name, count, "none", "whole", "whole"] = -some[1].mean((1, 2))
    if quick:
        return found
    for t in (50, 100, 200):
        plain, ours = one.sima(t, False), one.sima(t, True)
        found["SimA", str(t), 1, "none", "whole", "whole"] = -ours
        found["SimA", str(t), 1, "by the base's", "whole", "whole"] = -ours / plain
    found["PIA", "200", 1, "none", "whole", "whole"] = -one.pia(200)
    found["SecMI", "100", 1, "none", "whole", "whole"] = -one.secmi()
    told = one.losses(True, SETS[TOLD], 4, caption=one.subject.caption)
    rows = [GRID.index(t) for t in SETS[TOLD]]
    if noises >= 4:
        found["CLiD", TOLD, 4, "none", "whole", "whole"] = (tuned[:, rows, :4] - told).mean((1, 2))
    return found


def views_of(one: Measured, timesteps: Sequence[int], noises: int) -> dict[tuple[str, str], np.ndarray]:
    """Our scores by the version that the reference is, and by the views of it of which the best counts."""
    found = {}
    for version in VERSIONS:
        by_view = {
            view: scores(*(one.losses(side, timesteps, noises, version, view) for side in (False, True)))
            for view in VIEWS
        }
        for views in VIEW_SETS:
            found[version, " + ".join(views)] = np.max([by_view[view] for view in views], axis=0)
    return found


# Rows

COLUMNS = ("score", "timesteps", "noises", "normalisation", "reference", "views")
VIEWED = ((100, 300, 500), 1)  # where views are compared


def rows_of(
    subjects: Sequence[Subject], base: BaseModel, cache: Path, quick: bool, versions: bool
) -> list[dict[str, Any]]:
    """A row a checkpoint and way of scoring."""
    rows = []
    for subject in subjects:
        one = Measured(subject, base, cache)
        found = scores_of(one, QUICK if quick else NOISES, quick)
        for (version, views), values in (views_of(one, *VIEWED) if versions else {}).items():
            found["gain", " ".join(map(str, VIEWED[0])), VIEWED[1], "ratio of sums", version, views] = values
        for key, values in found.items():
            area, rate = figures(subject, values)
            rows.append(
                {"checkpoint": subject.name, "set": subject.source, "group": subject.group,
                 "holdout": subject.holdout, "members": subject.members, "others": subject.others,
                 **dict(zip(COLUMNS, key, strict=True)), "auc": area, "tpr_at_fpr_1": rate}
            )  # fmt: skip
        print(
            f"{subject.name:45.45} {subject.members:3} members, {subject.others:3} others, "
            f"{one.evaluations} evaluations measured in {one.seconds:.0f} s of a processor",
            flush=True,
        )
    return rows


def means(rows: Sequence[dict[str, Any]], by_group: bool = False) -> list[dict[str, Any]]:
    """Means over checkpoints of a split, and of a group of them, by way of scoring."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        split = "holdout" if row["holdout"] else "tuning", row["group"] if by_group else "all"
        grouped.setdefault((*split, *(row[name] for name in COLUMNS)), []).append(row)
    return [
        {"split": split, "group": group, **dict(zip(COLUMNS, key, strict=True)), "checkpoints": len(some),
         **{name: float(np.mean([one[name] for one in some])) for name in ("auc", "tpr_at_fpr_1")}}
        for (split, group, *key), some in grouped.items()
    ]  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"{row['split']:8}{row['group'][:14]:15}{row['score']:18}{row['timesteps']:28.28}{row['noises']:2} "
        f"{row['normalisation']:21}{row['reference']:15}{row['views'][:44]:45}{row['auc']:6.3f}"
        f"{row['tpr_at_fpr_1']:7.3f}{row['checkpoints']:4}"
    )


def main(
    quick: Annotated[bool, typer.Option(help="Few noises, ours and the plain loss alone, no versions.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these checkpoints of the testbed.")] = None,
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    checkpoints: Annotated[Path, typer.Option(help="Folder of the testbed's checkpoints.")] = SHIPPED,
    realistic_folder: Annotated[
        Path | None, typer.Option("--realistic", help="Folder of more checkpoints with their training.json.")
    ] = None,
    versions: Annotated[bool, typer.Option(help="Also measure other versions and views of the pictures.")] = False,
    split: Annotated[str, typer.Option(help="tuning, holdout or both.")] = "both",
    cache: Annotated[Path, typer.Option(help="Where answers of networks are kept.")] = Path(
        "lora-audit-workspace-benchmark/membership"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the means as JSON.")] = None,
) -> None:
    """Measure, and print the means over checkpoints, the best first."""
    torch.set_num_threads(1)
    subjects = of_testbed(checkpoints, only) + (realistic(realistic_folder) if realistic_folder else [])
    subjects = [one for one in subjects if split == "both" or one.holdout == (split == "holdout")]
    rows = rows_of(subjects, load_base(locate_base(str(base))), cache, quick, versions)
    found = means(rows) + means(rows, by_group=True)
    shown = [row for row in found if row["group"] == "all"]
    for row in sorted(
        shown, key=lambda row: (row["split"], row["reference"] != "whole", row["reference"], -row["auc"])
    ):
        print(line(row))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    worst = min((row["auc"] for row in rows if _is_ours(row) and row["group"] == SHIPPED_GROUP), default=1.0)
    if worst < LEAST_AUC:
        print(f"an AUC of {worst:.3f} on a shipped checkpoint is below {LEAST_AUC}")
        raise typer.Exit(1)


def _is_ours(row: dict[str, Any]) -> bool:
    way = row["score"], row["timesteps"], row["normalisation"], row["reference"], row["views"]
    return way == ("gain", CHOSEN, "ratio of sums", "whole", "whole")


if __name__ == "__main__":
    typer.run(main)
