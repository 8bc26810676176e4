"""The paper's tables by name, of the rows of a study, with what the paper says beside each (arXiv 2410.03039).

Its figures are of Stable Diffusion v1.4 by SSCD, 20 artists of 10 pictures and 30 subjects of 5 to 6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from audit.study.compare import alike_but, at_usual
from audit.study.factors import AUDIT, TRAINING
from audit.study.results import ResultTable, Row, costs_table, gains_table, means_table, verdicts_table

PAPER = (
    "The paper (arXiv 2410.03039, on Stable Diffusion v1.4, by SSCD) finds AS higher by 0.02 to 0.05 with model "
    "guidance than with direct sampling or classifier-free guidance, about twice their A-ESR, and about 20 % of the "
    "training pictures recovered."
)
PAPERS = {
    "augmentation": "The paper finds that Cutout and RandAugment weaken extraction, and ruin what the model draws.",
    "defence": (
        "The paper has none of these: the weight filter is after BAF (arXiv 2605.10439), of which the abstract alone "
        "was at hand; dp-sgd is that of arXiv 1607.00133."
    ),
    "n0": "The paper finds that more training pictures need more generated images and longer clustering.",
    "images": "The paper samples 50 images for each training picture.",
    "w": "The paper fixes w at 5 for LoRA and at 3 for DreamBooth.",
    "k": "The paper takes k = -0.02 for DreamBooth and 0 for LoRA.",
    "steps": "The paper trains 200 steps a picture at batch 1.",
    "rank": "The paper trains LoRAs of rank 64.",
    "captions": "The paper recovers captions by gradients on the prompt embedding where they are not known.",
}
NAMES = {
    "w": "Ablation: guidance weight w", "k": "Ablation: correction term k", "n0": "Ablation: training pictures N0",
    "images": "Ablation: images sampled a training picture", "steps": "Ablation: training steps a picture",
    "rank": "Ablation: rank of the LoRA", "captions": "What the auditor knows of captions",
    "augmentation": "Defences: changes of the training pictures", "defence": "Defences of the trainer",
    "noise_multiplier": "Defences: noise of DP-SGD", "filter_kept": "Defences: share that the weight filter keeps",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # the paper's own, by method
    "w": {"lora": 5.0, "dreambooth": 3.0}, "k": {"lora": 0.0, "dreambooth": -0.02},
    "images": {"lora": 50, "dreambooth": 50}, "steps": {"lora": 200, "dreambooth": 200}, "rank": {"lora": 64},
    "captions": {"lora": "known", "dreambooth": "known"},
}  # fmt: skip
WEAKER = "weaker, and the pictures ruined"


def tables_of(rows: Sequence[Row], varied: Sequence[str]) -> list[ResultTable]:
    """The main table, one by set, one a varied factor, and what verdicts and defences come to."""
    by = [name for name in ("method", "extraction") if name in varied] or ["method"]
    plain = at_usual(rows, [name for name in varied if name not in by])
    found = [means_table("methods", "Main table: methods of extraction, by fine-tuning", plain, by, PAPER)]
    if (gained := gains_table(plain)) is not None:
        found.append(gained)
    found.append(means_table("sets", "Main table, by set", plain, ["few_shot", *by]))
    for name in varied:
        if name not in ("method", "extraction", "rule", "evidence"):
            some = alike_but(rows, name, varied)
            if some:
                title, note = NAMES.get(name, f"By {name}"), PAPERS.get(name, "")
                found.append(means_table(f"by-{name}", title, some, [*by, name], note, _beside(name)))
    found.append(_worth(rows, varied))
    verdicts = verdicts_table(rows)
    return [*found, verdicts] if verdicts else found


def _worth(rows: Sequence[Row], varied: Sequence[str]) -> ResultTable:
    audits = at_usual(rows, [name for name in varied if name in AUDIT])
    trained = [name for name in varied if name in TRAINING and name not in ("method", "repeat")]
    return costs_table(
        "worth", "What leaks, and what the fine-tune is worth to its owner", audits, ["method", *trained],
        "Similarity: mean cosine of samples and training pictures. Sharpness: of samples over that of training "
        "pictures, below 1 is blurred. Losses are of denoising, on fixed noise. epsilon: of DP-SGD, at delta 1e-5.",
    )  # fmt: skip


def _beside(name: str) -> Callable[[dict[str, Any]], str] | None:
    """What the paper says of a row: that it is its setting, or what it finds; None where it says nothing."""
    if name == "augmentation":
        return lambda key: WEAKER if key["augmentation"] in ("cutout", "randaugment") else ""
    if name not in SETTINGS:
        return None
    return lambda key: "its setting" if SETTINGS[name].get(key["method"], ...) == key[name] else ""


def markdown(document: Path) -> str:
    """The tables of an exported study (``STUDY.json``) in Markdown."""
    study = json.loads(document.read_text())
    names = list(study["columns"])
    rows = [dict(zip(names, values, strict=True)) for values in zip(*study["columns"].values(), strict=True)]
    parts = []
    for table in tables_of(rows, study["varied"]):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        shown = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append("\n\n".join(part for part in (f"**{table.title}.** {table.note}".strip(), shown) if part))
    return "\n\n".join(parts) + "\n"
