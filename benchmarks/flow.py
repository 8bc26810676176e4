"""What was fitted on Stable Diffusion 1.x, on a model that was trained by flow matching: nano-flow and its LoRAs.

    python -m testbed.train_flow loras --output nano-flow-loras
    python -m testbed.train_flow loras --output nano-flow-gentle --steps-a-picture 16
    python -m benchmarks.flow --checkpoints nano-flow-loras --gentle nano-flow-gentle [--quick] [--json FILE]

* Recovery: direct sampling, classifier-free guidance and model guidance under `--w auto`, on equal numbers of images,
  as benchmarks/extraction.py has them, and how far `--w auto` is from the best of some fixed weights.
* Membership: the AUC of the score on training pictures against controls, at the noise levels that an audit takes, at
  each alone, and at other choices, as benchmarks/membership.py has them; on gentler LoRAs too, where it is not certain.

Without options it takes the LoRA that is shipped.

Means over sets carry a 95 % bootstrap interval. The workspace keeps what is done: a stopped run goes on. Exit code 1
where model guidance falls behind CFG in the mean AS, or membership has a mean AUC below 0.9.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from audit.config import Clustering, Method, Settings
from audit.demo import FLOW_BASE, FLOW_CHECKPOINTS
from audit.models.base import load_base, locate_base
from audit.sampling.guidance import CFG_WEIGHT
from audit.workspace import Workspace
from benchmarks import extraction, membership
from benchmarks.grid import Job, available, interval, run_all, split_settings
from testbed.finetune import Recipe, Tuning

IMAGES, QUICK_IMAGES = 12, 4  # a training image
WEIGHTS = (1.5, 2.0, 3.0, 5.0)
FIGURES = ("as", "a_esr_07", "a_esr_06", "control_as", "control_a_esr_07")


def extracted(
    names: Sequence[str], checkpoints: Path, base: Path, workspace: Path, images: int, weights: Sequence[float]
) -> list[dict[str, Any]]:
    """A row a checkpoint and way of sampling, with the weight that an audit took and what it chose it by."""
    recipes = available(checkpoints, names)
    common: dict[str, Any] = {"images_per_training_image": images}
    settings = (
        *extraction.ways([None], **common),
        *(Settings(method=Method.model_guidance, w=weight, **common) for weight in weights),
    )
    rows = []
    for recipe in recipes:
        for job in split_settings(Job(recipe, settings, checkpoints, base, workspace, (Clustering.peaks,))):
            for done in run_all([job], 1):
                rows += [{**row, **_chosen(workspace, row["audit_id"])} for row in done]
                print(extraction.line(rows[-1]), flush=True)
    return rows


def _chosen(workspace: Path, audit_id: str) -> dict[str, Any]:
    """The weight that an audit's images have, and the change of the prediction that `--w auto` reads."""
    (row,) = Workspace(workspace).rows(
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
    for method, w in dict.fromkeys((row["method"], row["w"]) for row in rows):
        group = [row for row in rows if (row["method"], row["w"]) == (method, w)]
        figures = {name: interval([row[name] for row in group]) for name in FIGURES}
        found.append({"method": method, "w": w, "sets": len(group), **figures})
    return found


def gained(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Model guidance under `--w auto` less the other two, and less the best fixed weight, paired by checkpoint."""
    by_way = {(row["checkpoint"], row["method"], row["w"]): row for row in rows}
    names = dict.fromkeys(row["checkpoint"] for row in rows)
    auto = {name: by_way[name, "model_guidance", None] for name in names}
    fixed = sorted({row["w"] for row in rows if row["method"] == "model_guidance" and row["w"] is not None})
    others: dict[str, dict[str, dict[str, Any]]] = {
        "cfg": {name: by_way[name, "cfg", CFG_WEIGHT] for name in names},
        "direct": {name: by_way[name, "direct", None] for name in names},
        **{f"w = {w}": {name: by_way[name, "model_guidance", w] for name in names} for w in fixed},
    }
    if fixed:
        best = {
            name: max((by_way[name, "model_guidance", w] for w in fixed), key=lambda one: one["as"]) for name in names
        }
        others["best fixed w of each"] = best
    return [
        {"less": other, **{key: interval([auto[name][key] - mine[name][key] for name in names]) for key in FIGURES[:3]}}
        for other, mine in others.items()
    ]


def told(names: Sequence[str], checkpoints: Path, base: Path, cache: Path, quick: bool) -> list[dict[str, Any]]:
    """Membership's rows: the AUC of ours a checkpoint, set of noise levels and number of noises."""
    torch.set_num_threads(1)
    subjects = membership.of_testbed(checkpoints, names)
    rows = membership.rows_of(subjects, load_base(locate_base(str(base))), cache, True, False)
    kept = ("checkpoint", "holdout", "members", "others", "timesteps", "noises", "auc", "tpr_at_fpr_1")
    most = 1 if quick else membership.QUICK
    return [
        {name: row[name] for name in kept}
        for row in rows
        if row["score"] == "gain" and row["normalisation"] == "ratio of sums" and row["noises"] == most
    ]


def remembered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean AUC over checkpoints a set of noise levels, the best first."""
    found = []
    for levels in dict.fromkeys(row["timesteps"] for row in rows):
        group = [row for row in rows if row["timesteps"] == levels]
        about = {"timesteps": levels, "noises": group[0]["noises"], "checkpoints": len(group)}
        found.append({**about, **{name: interval([row[name] for row in group]) for name in ("auc", "tpr_at_fpr_1")}})
    return sorted(found, key=lambda one: -one["auc"][0])


def _span(figure: Sequence[float], sign: str = "") -> str:
    mean, low, high = figure
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def show(found: dict[str, Any]) -> None:
    """The means, for people."""
    for one in found["recovered"]:
        w = "" if one["method"] == "direct" else one["w"] or "auto"
        figures = "  ".join(f"{name} {_span(one[name])}" for name in FIGURES)
        print(f"{one['method']:15} w {w!s:5}{figures}  over {one['sets']} sets")
    for one in found["gained"]:
        print(f"w = auto less {one['less']:22}" + "  ".join(f"{name} {_span(one[name], '+')}" for name in FIGURES[:3]))
    for title, part in (("membership", "remembered"), ("gentle", "remembered_gentle")):
        for one in found[part]:
            print(f"{title:10} at {one['timesteps']:38} AUC {_span(one['auc'])}  TPR {_span(one['tpr_at_fpr_1'])}")


def failing(found: dict[str, Any]) -> list[str]:
    """What is not as it has to be, in words."""
    means = {(one["method"], one["w"]): one["as"][0] for one in found["recovered"]}
    cfg, guided = means["cfg", CFG_WEIGHT], means["model_guidance", None]
    (auc,) = (one["auc"][0] for one in found["remembered"] if one["timesteps"] == membership.CHOSEN)
    said = []
    if guided < cfg:
        said.append(f"model guidance (AS {guided:.3f}) is behind CFG ({cfg:.3f})")
    if auc < membership.LEAST_AUC:
        said.append(f"membership's mean AUC of {auc:.3f} is below {membership.LEAST_AUC}")
    return said


def main(
    quick: Annotated[bool, typer.Option(help="A third of the images, one noise, no fixed weights.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these checkpoints, by folder name.")] = None,
    base: Annotated[Path, typer.Option(help="The base model.")] = FLOW_BASE,
    checkpoints: Annotated[Path, typer.Option(help="Folder of its LoRAs.")] = FLOW_CHECKPOINTS,
    gentle: Annotated[Path | None, typer.Option(help="Folder of LoRAs that only membership is measured on.")] = None,
    weights: Annotated[list[float] | None, typer.Option("--w", help="Fixed weights beside auto.")] = None,
    images: Annotated[int, typer.Option(help="Images a training image.")] = IMAGES,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Measure and print; membership first, which takes least."""
    names = [one.name for one in _kohya(checkpoints, only)]
    count, fixed = (QUICK_IMAGES, weights or ()) if quick else (images, weights or WEIGHTS)
    kept = workspace / "membership"
    scored = told(names, checkpoints, base, kept, quick)
    weak = told([one.name for one in _kohya(gentle)], gentle, base, kept, quick) if gentle else []
    rows = extracted(names, checkpoints, base, workspace, count, fixed)
    found = {
        "images_per_training_image": count, "recovered": recovered(rows), "gained": gained(rows),
        "remembered": remembered(scored), "remembered_gentle": remembered(weak), "extraction": rows,
        "membership": scored, "membership_gentle": weak,
    }  # fmt: skip
    show(found)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    wrong = failing(found)
    if wrong:
        print("\n".join(wrong))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
