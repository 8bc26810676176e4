"""What an audit on another base than the true one finds, and what tells the true one.

    python -m testbed.derived --output DIR            # a child and a sibling of nano, their mean, fine-tunes of them
    python -m benchmarks.bases --derived DIR [--quick] [--json FILE]

"audits": every LoRA trained on the child, audited with the child, its parent, its sibling and the mean of child
and sibling: AS and A-ESR (nano's descriptor at 0.7), the A-ESR of controls that nothing was trained on, and how well
membership tells training images from controls (AUC; pictures without a score count as the lowest). "fits": how far the
weights of each full fine-tune are from each base, and how each LoRA lies in it (the energy of a base's weights in the
LoRA's output space, 1 for a space drawn at random, mean over layers). --quick samples a fifth.

Exit code 1 where a full fine-tune is not nearest to its true base.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from audit import api
from audit.bench import Bench
from audit.config import Rule, Settings
from audit.demo import set_folder
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import Checkpoint, open_checkpoint
from audit.models.formats.adapter import Places
from audit.models.formats.names import read_names
from audit.models.formats.parts import gathered
from audit.models.formats.tensors import Tensors
from audit.models.tuning import tune
from audit.workspace import Workspace
from benchmarks.membership import auc
from testbed.derived import SHIPPED, TRAINED, Derived, FineTune
from testbed.finetune import Tuning
from testbed.sets import few_shot_set

BASES = ("child", "parent", "sibling", "merged")
QUICK_IMAGES, IMAGES = 10, 50


def audited(one: FineTune, base: str, derived: Derived, images: int, place: Workspace, bench: Bench) -> dict[str, Any]:
    """The row of one LoRA on one base."""
    few_shot = few_shot_set(one.recipe.few_shot)
    folders = {part: set_folder(few_shot.name, part) for part in ("train", "control")}
    started = time.monotonic()
    result = api.scan(
        derived.file(one), str(derived.base(base)), references=list(folders.values()), descriptor="nano",
        workspace=place, captions=few_shot.captions, n0=len(few_shot.train),
        settings=Settings(images_per_training_image=images), training_images=folders["train"],
        control=folders["control"], rule=Rule.fixed, bench=bench,
    )  # fmt: skip
    scored = {row["kind"]: row for row in result.facts.evaluations}
    trained_on = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folders["train"].iterdir()}
    scores: dict[bool, list[float]] = {True: [], False: []}
    for member in result.facts.members:
        scores[member.reference_id in trained_on].append(-1e9 if member.score is None else member.score)
    return {
        "fine_tune": one.name, "base": base, "true": base == one.base,
        "as": scored["training"]["average_similarity"], "a_esr": scored["training"]["extraction_rate_07"],
        "control_a_esr": scored["control"]["extraction_rate_07"],
        "membership_auc": auc(np.array(scores[True]), np.array(scores[False])),
        "prediction_change": result.facts.row["prediction_change"],
        "problem": result.tells_nothing, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def energy(base: BaseModel, checkpoint: Checkpoint) -> float:
    """|Q^T W|^2 / |W|^2 times outputs over rank, mean over layers, with Q the space of a LoRA's outputs."""
    places, found = Places(base), []
    with Tensors(list(checkpoint.files.values())) as tensors:
        for group in read_names(tensors.info).groups:
            place = places.find(group)
            assert place is not None
            weight = gathered(base.part(place[0]), place[1])
            assert weight is not None
            space, _ = torch.linalg.qr(tensors.get(group.tensors["up"]).flatten(1))
            flat = weight.float().flatten(1)
            share = float((space.T @ flat).square().sum() / flat.square().sum())
            found.append(share * len(flat) / space.shape[1])
    return sum(found) / len(found)


def fits(derived: Derived) -> list[dict[str, Any]]:
    """A row a fine-tune: its distance to every base, or how it lies in each; and the base that this would choose."""
    files = {name: (path, "parent") for name, path in SHIPPED.items()}
    files |= {one.name: (derived.file(one), one.base) for one in TRAINED if derived.file(one).exists()}
    bases = {name: load_base(locate_base(str(derived.base(name)))) for name in BASES}
    rows = []
    for name, (path, true) in files.items():
        checkpoint = open_checkpoint(path)
        row: dict[str, Any] = {"fine_tune": name, "true": true, "kind": "energy"}
        if checkpoint.format.is_adapter:
            row["of"] = {base: round(energy(model, checkpoint), 4) for base, model in bases.items()}
            row["told"] = max(row["of"], key=row["of"].__getitem__)
        else:
            row["kind"] = "distance"
            moved = {base: tune(model, checkpoint).changes for base, model in bases.items()}
            row["of"] = {
                base: round(sum(one.norm**2 for one in changes) ** 0.5 / bases[base].weight_norm, 5)
                for base, changes in moved.items()
            }
            row["told"] = min(row["of"], key=row["of"].__getitem__)
        rows.append(row)
        print(f"{name:44}true {true:8}told {row['told']:8}{row['kind']:9}{row['of']}", flush=True)
    return rows


def main(
    derived: Annotated[Path, typer.Option(help="The folder that testbed.derived made.")],
    quick: Annotated[bool, typer.Option(help="A fifth of the images.")] = False,
    only_fits: Annotated[bool, typer.Option("--only-fits", help="No audits.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-benchmark"),
) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    made = Derived(derived)
    loras = [
        one for one in TRAINED
        if one.base == "child" and one.recipe.tuning is not Tuning.dreambooth and made.file(one).exists()
    ]  # fmt: skip
    found: dict[str, Any] = {"audits": [], "fits": fits(made)}
    for base in () if only_fits else BASES:
        bench = Bench()
        for one in loras:
            row = audited(one, base, made, QUICK_IMAGES if quick else IMAGES, Workspace(workspace), bench)
            found["audits"].append(row)
            print(
                f"{row['fine_tune']:44}{base:9}AS {row['as']:.3f}  A-ESR {row['a_esr']:.2f}  control "
                f"{row['control_a_esr']:.2f}  membership AUC {row['membership_auc']:.3f}  {row['seconds']:.0f} s",
                flush=True,
            )
            if json_file:
                json_file.write_text(json.dumps(found, indent=2) + "\n")
    if json_file:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if any(row["told"] != row["true"] for row in found["fits"] if row["kind"] == "distance"):
        print("a full fine-tune is nearer to another base than to its own")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
