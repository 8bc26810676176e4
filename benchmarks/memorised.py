"""What each realistic fine-tune memorises, and what that depends on: rank, captions, regularisation, duration.

    python -m testbed.realistic --workers 2                       # trains them, out of the repository
    python -m benchmarks.memorised --json benchmarks/results/memorised.json [--audits 20]
    python -m benchmarks.memorised --table benchmarks/results/memorised.json

For every checkpoint: by how much it denoises its training pictures better than the base does, against the same of 20
pictures of the same source that it never saw (the gain; AUC), and what the trigger adds. Of as many as ``--audits``
says: what audits with the true captions and with the class caption, which lacks the trigger, recover, by nano's
descriptor and by SSCD (benchmarks/judge.py).

The effect of each factor is that of an additive least-squares model over the checkpoints there are; over all 80 it is
the plain mean of a level. Rows that the JSON file has already are not measured again, and what was sampled is kept in
the workspace: a stopped run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from audit.bench import Bench
from audit.config import Method, Settings
from audit.demo import ASSETS
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.evidence.membership import level_of, losses, scores
from audit.job import Request, resolve
from audit.models.base import load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.stages import Cluster, Sample, Scores
from audit.states import Known as Kind
from audit.workspace import Workspace
from benchmarks import judge
from benchmarks.judge import Asked, JudgeName
from benchmarks.tables import table

try:
    from testbed.design import REALISTIC, Recipe
    from testbed.more_sets import TRIGGER, more_set, prepared
    from testbed.realistic import TRAINED
except ModuleNotFoundError as error:
    if error.name != "testbed":
        raise
    raise SystemExit(
        "benchmarks.memorised needs testbed/, which is in the repository and not in the wheel: run it from the top "
        "folder of a checkout of lora-audit"
    ) from None

TIMESTEPS = (400, 600, 800)
NOISES = 4
BATCH = 32
IMAGES = 6  # sampled for each training picture
METHODS = {Method.direct: "direct", Method.model_guidance: "guided"}
FACTORS = [one.name for one in fields(Recipe)]
MEMBERSHIP = {"gain": "gain, training", "control_gain": "gain, control", "auc": "AUC", "trigger": "trigger"}
FIGURES = MEMBERSHIP | {
    "guided_true_as": "AS", "guided_true_a_esr_07": "A-ESR 0.7", "guided_true_control_as": "control AS",
    "guided_class_as": "AS, class caption", "direct_true_as": "AS, direct", "direct_class_as": "AS, direct, class",
    "guided_true_sscd_288_as": "AS, SSCD", "guided_true_sscd_288_a_esr": "A-ESR, SSCD",
    "guided_true_sscd_288_control_as": "control AS, SSCD", "guided_class_sscd_288_as": "AS, SSCD, class",
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A set's pictures, controls first, as latents [N, 8, 16, 16], and the base's losses on them, empty caption."""

    latents: torch.Tensor
    losses: np.ndarray


def losses_of(pair: ModelPair, latents: torch.Tensor, caption: str, tuned: bool) -> np.ndarray:
    """The denoising losses [N, timesteps, noises] of one side of ``pair`` under a caption, on fixed noise."""
    condition = pair.encode([caption], tuned)
    network = pair.predict_tuned if tuned else pair.predict_base

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return network(x, timestep, condition.select(torch.zeros(len(x), dtype=torch.long)))

    levels = [level_of(t, pair.prediction_type, pair.scheduler) for t in TIMESTEPS]
    return losses(predict, latents, levels, range(NOISES), pair.fits, "losses", BATCH)


def known(pair: ModelPair, pictures: np.ndarray) -> Known:
    """What does not depend on the checkpoint, of uint8 [N, 64, 64, 3]."""
    latents = torch.from_numpy(pair.encode_pictures(pictures))
    return Known(latents, losses_of(pair, latents, "", tuned=False))


def gains_of(pair: ModelPair, of_base: Known, count: int) -> np.ndarray:
    """The membership scores [count] of the first pictures: by how much they are denoised better than by the base."""
    return scores(of_base.losses[:count], losses_of(pair, of_base.latents[:count], "", tuned=True))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that one of ``positive`` is above one of ``negative`` (Mann-Whitney; ties count half)."""
    above = positive[:, None] - negative
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def membership(recipe: Recipe, pair: ModelPair, sets: dict[str, Known]) -> dict[str, Any]:
    """The gains of training and control pictures, and what the trigger does; ``sets`` keeps what the base gives.

    ``trigger``: by what share of the base's loss the tuned model's falls on training pictures where the trigger stands
    before the class caption.
    """
    found = prepared(recipe.few_shot)
    if recipe.few_shot not in sets:
        sets[recipe.few_shot] = known(pair, np.concatenate([found.control, found.training]))
    of_base, controls = sets[recipe.few_shot], len(found.control)
    count = controls + recipe.training_images
    gain = gains_of(pair, of_base, count)
    unseen, seen = gain[:controls], gain[controls:]
    named = more_set(recipe.few_shot).class_caption
    without, with_it = (
        losses_of(pair, of_base.latents[controls:count], caption, tuned=True)
        for caption in (named, f"{TRIGGER} {named}")
    )
    trigger = ((without - with_it) / of_base.losses[controls:count]).mean()
    return {
        "gain": float(seen.mean()), "control_gain": float(unseen.mean()), "auc": auc(seen, unseen),
        "trigger": float(trigger),
    }  # fmt: skip


def audits(
    recipe: Recipe, captions: dict[str, list[str]], folder: Path, base: Path, place: Place, by: JudgeName
) -> dict[str, Any]:
    """AS and A-ESR of training pictures and controls, by nano and the judge, by method and by captions."""
    found = prepared(recipe.few_shot)
    parts = {Kind.training: found.training[: recipe.training_images], Kind.control: found.control}
    stages = [Scores(kind, [Image.fromarray(one) for one in pictures]) for kind, pictures in parts.items()]
    row: dict[str, Any] = {}
    for method, name in METHODS.items():
        for given, texts in captions.items():
            settings = Settings(method=method, images_per_training_image=IMAGES)
            request = Request(
                recipe.file(folder), str(base), captions=texts, n0=recipe.training_images, settings=settings
            )
            job = resolve(request, "nano", place.bench)
            run_stages([Sample(), Cluster(), *stages], job, place)
            rows = place.workspace.rows("SELECT * FROM evaluations WHERE audit_id = ?", [job.id])
            for kind, prefix in (("training", ""), ("control", "control_")):
                (one,) = (one for one in rows if one["kind"] == kind)
                row[f"{name}_{given}_{prefix}as"] = one["average_similarity"]
                row[f"{name}_{given}_{prefix}a_esr_07"] = one["extraction_rate_07"]
            if by is JudgeName.sscd:
                pngs = place.workspace.select("SELECT image FROM extractions WHERE audit_id = ?", [job.id])["image"]
                said = judged(recipe, judge.opened(png.as_py() for png in pngs) or [])
                row |= {f"{name}_{given}_{key}": value for key, value in said.items()}
    return row


@cache
def _vectors(few_shot: str, view: str) -> np.ndarray:
    """The judge's vectors of a set's pictures, controls first."""
    found = prepared(few_shot)
    pictures = np.concatenate([found.control, found.training])
    return next(one for one in judge.views() if one.name == view).descriptor.describe(pictures)


def judged(recipe: Recipe, extractions: list[Image.Image]) -> dict[str, float]:
    """AS and A-ESR of training pictures and controls in both views of the judge."""
    controls, row = len(prepared(recipe.few_shot).control), {}
    for view in judge.views():
        described = view.descriptor.describe(extractions) if extractions else np.zeros((0, 512), np.float32)
        vectors = _vectors(recipe.few_shot, view.name)
        training = vectors[controls : controls + recipe.training_images]
        for some, prefix in ((training, ""), (vectors[:controls], "control_")):
            best = judge.best_of(some, described)
            row[judge.key(view.name, f"{prefix}as")] = float(best.mean())
            row[judge.key(view.name, f"{prefix}a_esr")] = float((best > view.threshold).mean())
    return row


def trained(folder: Path) -> list[Recipe]:
    """The recipes whose checkpoints are in ``folder``, the longest trained block first, in a block the smallest sets.

    A block is balanced by itself. Raises FileNotFoundError where there is none.
    """
    order = sorted(REALISTIC, key=lambda one: (-one.exposures, one.training_images))
    found = [recipe for recipe in order if (recipe.file(folder).parent / "training.json").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no realistic checkpoint: train them with `python -m testbed.realistic`")
    return found


def measure(
    folder: Path, base: Path, workspace: Path, measured: list[dict[str, Any]], most: int, by: JudgeName
) -> Iterator[list[Any]]:
    """All rows, ``measured`` among them, again whenever one has been added or completed; ``most`` are audited."""
    model, place = load_base(locate_base(str(base))), Place(Workspace(workspace), Bench())
    rows = {(row["checkpoint"], row["identity"]): row for row in measured}
    recipes, sets = trained(folder), dict[str, Known]()
    checkpoints = {recipe.name: open_checkpoint(recipe.file(folder)) for recipe in recipes}
    current = {name: rows.get((name, one.identity)) or {} for name, one in checkpoints.items()}
    for recipe in recipes:
        checkpoint, row = checkpoints[recipe.name], current[recipe.name]
        if not row:
            plain = {name: getattr(recipe, name) for name in FACTORS}
            row |= {"checkpoint": recipe.name, "identity": checkpoint.identity, "holdout": recipe.holdout, **plain}
            row |= _rounded(membership(recipe, ModelPair(model, checkpoint), sets))
            yield [row for row in current.values() if row]
    for recipe in recipes[:most]:
        row = current[recipe.name]
        wanted = ["guided_true_as", "guided_true_sscd_288_as"][: 1 + (by is JudgeName.sscd)]
        if not set(wanted) <= row.keys():
            truth = json.loads((recipe.file(folder).parent / "training.json").read_text())
            texts = {
                "true": list(dict.fromkeys(truth["training_captions"])),
                "class": [more_set(recipe.few_shot).class_caption],
            }
            row |= _rounded(audits(recipe, texts, folder, base, place, by))
            yield list(current.values())
    yield list(current.values())


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in figures.items()}


def effects(rows: Sequence[dict[str, Any]], figure: str) -> tuple[dict[tuple[str, Any], float], float]:
    """The mean of ``figure`` at every level of every factor, the other factors held at their average, and the scatter.

    From an additive model fitted by least squares: where the design is complete, the plain means. Levels that no row
    has are left out. The scatter is the standard deviation of the residuals: two levels of n rows each differ by
    chance by about that times sqrt(2 / n). Nothing, and NaN, where the rows that have the figure are too few to tell
    the factors apart.
    """
    rows = [row for row in rows if figure in row]
    levels = [(name, value) for name in FACTORS for value in dict.fromkeys(row[name] for row in rows)]
    present = np.array([[row[name] == value for name, value in levels] for row in rows], dtype=float)
    values = np.array([row[figure] for row in rows])
    counts = {name: sum(of == name for of, _ in levels) for name in FACTORS}
    model = np.c_[np.ones(len(rows)), present - [1 / counts[name] for name, _ in levels]]
    # of the many solutions, which differ by a constant a factor, the one whose effects have the mean 0 in every factor
    weights, _, rank, _ = np.linalg.lstsq(model, values, rcond=None)
    if rank < 1 + sum(count - 1 for count in counts.values() if count) or rank == len(rows):
        return {}, float("nan")
    found = {}
    for (name, value), weight in zip(levels, weights[1:], strict=True):
        mine = [other for (of, _), other in zip(levels, weights[1:], strict=True) if of == name]
        found[name, value] = float(weights[0] + weight - np.mean(mine))
    scatter = np.sqrt(np.square(values - model @ weights).sum() / (len(rows) - rank))
    return found, float(scatter)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The effects of the factors, what audits recover, and every checkpoint."""
    audited = [row for row in rows if "guided_true_as" in row]
    holdout = {row["few_shot"] for row in rows if row["holdout"]}
    measured = {name: effects(rows, name) for name in FIGURES}
    told = {name: found for name, found in measured.items() if found[0]}
    lines = []
    for name in FACTORS:
        for value in _levels(rows, name):
            count = sum(row[name] == value for row in rows)
            said = f"{value} (holdout)" if value in holdout else value
            lines.append(
                (
                    name.replace("_", " "),
                    said,
                    count,
                    *(_figure(found.get((name, value))) for found, _ in told.values()),
                )
            )
    lines.append(("(scatter)", "", len(rows), *(_figure(scatter) for _, scatter in told.values())))
    head = f"({len(rows)} of {len(REALISTIC)} checkpoints)"
    recovered = [figure for figure in FIGURES if figure not in MEMBERSHIP]
    return "\n".join(
        [
            f"**What each factor does** {head}:\n",
            table(("factor", "level", "checkpoints", *(FIGURES[name] for name in told)), lines),
            f"**What audits recover** ({len(audited)} audited), and the gain:\n",
            _listed(audited, ["gain", "auc", *recovered]),
            "**Every checkpoint**, those that memorise least first:\n",
            _listed(rows, list(MEMBERSHIP)),
        ]
    )


def _listed(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> str:
    """A table of checkpoints, those with the least AUC first."""
    lines = (
        (row["checkpoint"], "yes" if row["holdout"] else "", *(_figure(row.get(figure)) for figure in figures))
        for row in sorted(rows, key=lambda row: (row["auc"], row["gain"]))
    )
    return table(("checkpoint", "holdout", *(FIGURES[figure] for figure in figures)), lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _levels(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """The levels of a factor that ``rows`` have, in the order of the design, numbers sorted."""
    there = {row[name] for row in rows}
    found = [value for value in dict.fromkeys(getattr(one, name) for one in REALISTIC) if value in there]
    return sorted(found) if isinstance(found[0], int) else found


def main(
    checkpoints: Annotated[Path, typer.Option(help="Folder of the realistic checkpoints.")] = TRAINED,
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    audits: Annotated[int, typer.Option(help="How many checkpoints are audited besides.")] = len(REALISTIC),
    by: Asked = JudgeName.auto,
    json_file: Annotated[Path, typer.Option("--json", help="Where the rows are kept.")] = Path("memorised.json"),
    table_of: Annotated[Path | None, typer.Option("--table", help="Only print the tables of this file.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Measure what is not measured yet, keep the rows, and print the tables."""
    if table_of:
        print(markdown(json.loads(table_of.read_text())))
        return
    rows = json.loads(json_file.read_text()) if json_file.is_file() else []
    for found in measure(checkpoints, base, workspace, rows, audits, judge.settled(by)):
        rows = found
        json_file.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    typer.run(main)
