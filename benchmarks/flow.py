"""What was fitted on Stable Diffusion 1.x, on a model that was trained by flow matching: nano-flow and its LoRAs.

    python -m testbed.train_flow loras --output nano-flow-loras
    python -m testbed.train_flow loras --output nano-flow-gentle --steps-a-picture 2
    python -m benchmarks.flow --checkpoints nano-flow-loras --gentle nano-flow-gentle [--quick] [--json FILE]

* Recovery: direct sampling, classifier-free guidance and model guidance under `--w auto`, on equal numbers of images,
  by nano's descriptor and by SSCD where its package is installed; the base alone, which has seen nothing of the set, on
  as many; model guidance at fixed weights (--w), and with the paper's correction (--k) under `--w auto`.
* What `--w auto` gains over each of them, paired by LoRA, and over the best of the fixed weights of each, which is
  known only afterwards.
* Membership: the AUC of its score on training pictures against controls, at the times of the flow that audits take and
  at others, on equal numbers of evaluations (benchmarks/flow_levels.py); on gentler LoRAs too, where it is not certain.

Without options it takes the LoRA that is shipped. Means over sets carry a 95 % bootstrap interval. A set is done before
the next begins, the JSON is written after each, and the workspace keeps what is done: a stopped run goes on. The zero
vectors in T5's place are attended to as one that counts 256 times, as in training (equal to 1e-4, a fifth of the time);
--every-zero samples as `lora-audit scan` does.

Exit code 1 where model guidance falls behind CFG in the mean AS, or membership has a mean AUC below 0.9 on the LoRAs of
--checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from audit.bench import Bench
from audit.config import Method, Settings
from audit.demo import FLOW_BASE, FLOW_CHECKPOINTS
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.evidence import density_peaks, score
from audit.job import Job as AuditJob
from audit.job import resolve
from audit.models.base import BaseModel, load_base, locate_base
from audit.sampling.guidance import CFG_WEIGHT
from audit.sampling.spooled import vectors_of
from audit.stages import Control
from audit.workspace import Workspace
from benchmarks import extraction, flow_levels, judge
from benchmarks.grid import Job, available, pictures_of, request_of, rows_at
from benchmarks.judge import Asked, JudgeName
from benchmarks.membership import LEAST_AUC
from testbed.finetune import Recipe, Tuning
from testbed.flow import with_zeros_once

IMAGES, QUICK_IMAGES = 8, 4  # a training image
WEIGHTS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
CORRECTIONS = (-0.02,)  # the paper's, of DreamBooth
GAINED = ("as", "a_esr_07", "a_esr_06", judge.key("native", "as"), judge.key("native", "a_esr"))
FIGURES = (
    *GAINED, "control_as", "control_a_esr_07", judge.key("native", "control_as"), judge.key("native", "control_a_esr"),
)  # fmt: skip
BASE_ALONE = "base"  # in place of a method
Way = tuple[str, float | None, float]  # method, w, k


def way_of(row: dict[str, Any]) -> Way:
    """By what the images of a row were sampled."""
    return row["method"], row["w"], row["k"]


AUTO: Way = ("model_guidance", None, 0.0)
CFG: Way = ("cfg", CFG_WEIGHT, 0.0)
DIRECT: Way = ("direct", None, 0.0)
ALONE: Way = (BASE_ALONE, CFG_WEIGHT, 0.0)


def settings_of(images: int, weights: Sequence[float], corrections: Sequence[float]) -> tuple[Settings, ...]:
    """The ways of sampling that are compared, what is always asked for first."""
    common: dict[str, Any] = {"images_per_training_image": images}
    corrected = (Settings(method=Method.model_guidance, k=k, **common) for k in corrections)
    return (*extraction.ways([None, *weights], **common), *corrected)


class BenchOfOnce(Bench):
    """A bench whose bases are nano-flow as it was trained."""

    def base(self, job: AuditJob) -> BaseModel:
        """The base model of ``job``, with the zeros in T5's place once."""
        return with_zeros_once(super().base(job))


def opened(workspace: Path, every_zero: bool) -> Place:
    """Where audits run: with the base as audits have it, or as it was trained."""
    if every_zero:
        return Place(Workspace(workspace / "every-zero"), Bench())
    return Place(Workspace(workspace / "zeros-once"), BenchOfOnce())


def extracted(job: Job, place: Place) -> list[dict[str, Any]]:
    """The rows of a LoRA, a way of sampling each, with the weight that an audit took and what it chose it by."""
    rows = []
    for settings in job.settings:
        for row in rows_at(job, place, settings, 1):
            some = {name: value for name, value in row.items() if not name.startswith(("ranking_", "equal_"))}
            rows.append({**some, **_chosen(place.workspace, row["audit_id"])})
            print(extraction.line(rows[-1]), flush=True)
    rows.append(base_alone(job, place))
    print(f"{'':38}{'the base alone':20}{rows[-1]['as']:16.3f}{rows[-1]['a_esr_07']:7.2f}", flush=True)
    return rows


def base_alone(job: Job, place: Place) -> dict[str, Any]:
    """What the base draws by classifier-free guidance for the same captions and seeds, as many images, as a row.

    Its pictures are kept as WebP, which SSCD sees.
    """
    resolved = resolve(request_of(job, replace(job.settings[0], control_share=1.0)), "nano", place.bench)
    workspace = place.workspace
    run_stages([Control()], resolved, place)
    workspace.spool(resolved.id).discard()  # no audit comes that would
    table = workspace.select(
        'SELECT image, descriptor FROM control_generations WHERE audit_id = ? ORDER BY "index"', [resolved.id]
    )
    vectors, descriptor = vectors_of(table), place.bench.descriptor(resolved)
    chosen = [one.representative for one in density_peaks(vectors, resolved.n0.count, descriptor.threshold)]
    pictures = pictures_of(job.recipe.few_shot)
    against, beside = (score(vectors[chosen], descriptor.describe(pictures[part])) for part in ("train", "control"))
    said = judge.absent(job.judge)
    if job.judge is JudgeName.sscd:
        reconstructed = place.bench.codec(resolved).reconstruct(pictures["train"])
        said = judge.figures(judge.opened(table["image"][at].as_py() for at in chosen), pictures, reconstructed)
    return {
        "checkpoint": job.recipe.name, "set": job.recipe.few_shot, "method": BASE_ALONE, "w": CFG_WEIGHT, "k": 0.0,
        "images": len(vectors), "as": against.average_similarity, "a_esr_07": against.extraction_rate_07,
        "a_esr_06": against.extraction_rate_06, "control_as": beside.average_similarity,
        "control_a_esr_07": beside.extraction_rate_07, **said,
    }  # fmt: skip


def _chosen(workspace: Workspace, audit_id: str) -> dict[str, Any]:
    """The weight that an audit's images have, and the change of the prediction that `--w auto` reads."""
    (row,) = workspace.rows(
        "SELECT a.prediction_change, (SELECT any_value(g.w) FROM generations AS g WHERE g.audit_id = a.audit_id) AS w "
        "FROM audits AS a WHERE a.audit_id = ?",
        [audit_id],
    )
    return {"prediction_change": row["prediction_change"], "w_taken": row["w"]}


def _kohya(checkpoints: Path, only: Sequence[str] | None = None) -> list[Recipe]:
    """The LoRAs of a folder, each once: one has two layouts."""
    return [one for one in available(checkpoints, only) if one.tuning is Tuning.lora_kohya]


def recovered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over sets with intervals, a way of sampling."""
    found = []
    for way in dict.fromkeys(way_of(row) for row in rows):
        group = [row for row in rows if way_of(row) == way]
        figures = {name: extraction.known_interval([row.get(name) for row in group]) for name in FIGURES}
        found.append({**dict(zip(("method", "w", "k"), way, strict=True)), "sets": len(group), **figures})
    return found


def gained(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Model guidance under `--w auto` less every other way, and less the best fixed weight, paired by LoRA."""
    by_way: dict[Way, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(way_of(row), {})[row["checkpoint"]] = row
    auto = by_way.get(AUTO, {})
    fixed = [by_way[way] for way in by_way if way[0] == AUTO[0] and way[1] is not None and way[2] == 0]
    others = {called(way): group for way, group in by_way.items() if way != AUTO}
    if fixed:
        shared = set.intersection(*(set(group) for group in fixed))
        others["best fixed w of each"] = {
            name: max((group[name] for group in fixed), key=lambda one: one["as"]) for name in sorted(shared)
        }
    found = []
    for other, group in others.items():
        names = sorted(set(auto) & set(group))
        pairs = [(auto[name], group[name]) for name in names]
        figures = {
            key: extraction.known_interval(
                [None if None in (a.get(key), b.get(key)) else a[key] - b[key] for a, b in pairs]
            )
            for key in GAINED
        }
        found.append({"less": other, "sets": len(names), **figures})
    return found


def called(way: Way) -> str:
    """A way of sampling in few words."""
    method, w, k = way
    if way in (CFG, DIRECT, ALONE):
        return method if method != BASE_ALONE else "base alone"
    return f"w = {w or 'auto'}" + (f", k = {k}" if k else "")


def _span(figure: Sequence[float] | None, sign: str = "") -> str:
    return "absent" if figure is None else f"{figure[0]:{sign}.3f} [{figure[1]:{sign}.3f}, {figure[2]:{sign}.3f}]"


def show(found: dict[str, Any]) -> None:
    """The means, for people."""
    for one in found["recovered"]:
        figures = "  ".join(f"{name} {_span(one[name])}" for name in FIGURES)
        print(f"{called(way_of(one)):22}{figures}  over {one['sets']} sets")
    for one in found["gained"]:
        print(f"w = auto less {one['less']:22}" + "  ".join(f"{name} {_span(one[name], '+')}" for name in GAINED))
    for folder, part in found["remembered"].items():
        for one in part:
            print(
                f"{folder:24}membership at {one['choice']:20} AUC {_span(one['auc'])}  TPR {_span(one['tpr_at_fpr_1'])}"
                f"  chosen less it {_span(one['gain_auc'], '+')}"
            )


def rounded(found: Any) -> Any:
    """The same with five digits behind the point."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return round(found, 5) if isinstance(found, float) else found


def failing(found: dict[str, Any], folder: str) -> list[str]:
    """What is not as it has to be, in words; membership's is that of the LoRAs in ``folder``."""
    means = {way_of(one): one["as"][0] for one in found["recovered"]}
    (auc,) = (one["auc"][0] for one in found["remembered"][folder] if one["choice"] == flow_levels.CHOSEN)
    said = []
    if means[AUTO] < means[CFG]:
        said.append(f"model guidance (AS {means[AUTO]:.3f}) is behind CFG ({means[CFG]:.3f})")
    if auc < LEAST_AUC:
        said.append(f"membership's mean AUC of {auc:.3f} is below {LEAST_AUC}")
    return said


def main(
    quick: Annotated[bool, typer.Option(help="Half of the images, no fixed weights, no correction.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these checkpoints, by folder name.")] = None,
    base: Annotated[Path, typer.Option(help="The base model.")] = FLOW_BASE,
    checkpoints: Annotated[Path, typer.Option(help="Folder of its LoRAs.")] = FLOW_CHECKPOINTS,
    gentle: Annotated[
        list[Path] | None, typer.Option(help="Folders of LoRAs that only membership is measured on.")
    ] = None,
    weights: Annotated[list[float] | None, typer.Option("--w", help="Fixed weights beside auto.")] = None,
    corrections: Annotated[list[float] | None, typer.Option("--k", help="Corrections beside none.")] = None,
    images: Annotated[int, typer.Option(help="Images a training image.")] = IMAGES,
    every_zero: Annotated[bool, typer.Option(help="Sample as audits do: five times as long.")] = False,
    asked: Asked = JudgeName.auto,
    sheets: Annotated[Path | None, typer.Option(help="Folder for a contact sheet a LoRA.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Measure and print; membership first, which takes least."""
    torch.set_num_threads(1)
    speaks = judge.settled(asked)
    count = QUICK_IMAGES if quick else images
    asked_for = (weights or (), corrections or ()) if quick else (weights or WEIGHTS, corrections or CORRECTIONS)
    recipes = _kohya(checkpoints, only)
    network = with_zeros_once(load_base(locate_base(str(base))))
    scored = {
        folder.name: flow_levels.measured(folder, some, network, workspace / "flow-levels")
        for folder, some in [(checkpoints, recipes), *((one, _kohya(one)) for one in gentle or ())]
    }
    found: dict[str, Any] = {
        "images_per_training_image": count, "every_zero": every_zero, "recovered": [], "gained": [],
        "remembered": {folder: flow_levels.remembered(rows) for folder, rows in scored.items()}, "extraction": [],
        "membership": scored,
    }  # fmt: skip
    jobs = [
        Job(recipe, settings_of(count, *asked_for), checkpoints, base, workspace, judge=speaks) for recipe in recipes
    ]
    place = opened(workspace, every_zero)
    for job in jobs:
        rows = extracted(job, place)
        found["extraction"] += rows
        found |= {"recovered": recovered(found["extraction"]), "gained": gained(found["extraction"])}
        if json_file:
            json_file.write_text(json.dumps(rounded(found), indent=1) + "\n")
        if sheets:
            three = [row for way in (DIRECT, CFG, AUTO) for row in rows if way_of(row) == way]
            extraction.contact_sheet(three, place.workspace.root, sheets / f"{job.recipe.name}.png")
    show(found)
    wrong = failing(found, checkpoints.name)
    if wrong:
        print("\n".join(wrong))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
