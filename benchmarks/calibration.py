"""What the judge's thresholds are set by: pictures and their copies, and different pictures of one kind.

``python -m benchmarks.judge`` prints it and writes it to ``results/judge.json``. The thresholds are set on the tuning
sets; the holdout sets only say how well they hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from audit.demo import ASSETS, load_set
from audit.descriptors import Descriptor
from audit.models.base import load_vae, locate_base
from audit.models.codec import Codec
from benchmarks.judge import CALIBRATION, FALSE_MATCHES, QUANTILES, SHA256, SIDES, best_of, network
from testbed.controls import controls, near_misses
from testbed.sets import SETS, FewShotSet
from testbed.train_descriptor import edited_copies

COPIES = 8  # edited ones of each picture and strength
Described = dict[str, np.ndarray]
Copy = Callable[[np.ndarray], np.ndarray]


def edited(strength: float) -> Copy:
    """A function that makes COPIES edited copies of each of uint8 [N, 64, 64, 3], the pictures of a set in turn."""

    def copies(pictures: np.ndarray) -> np.ndarray:
        torch.manual_seed(7)
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        found = edited_copies(pixels.repeat(COPIES, 1, 1, 1), strength)
        return (found * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return copies


def cosines(descriptor: Descriptor, few_shot: FewShotSet, copies: dict[str, Copy]) -> Described:
    """Of one set: each training picture with its copies, and the best of each other picture with any of them."""
    pictures = load_set(few_shot.name, "train")
    known = descriptor.describe(pictures)
    found = {}
    through = known
    for name, make in copies.items():
        described = descriptor.describe(make(pictures))
        found[name] = (np.tile(known, (len(described) // len(known), 1)) * described).sum(axis=1)
        if name == "codec":
            through = described
    candidates = np.concatenate([known, through])
    for name, others in (("control", controls(few_shot.name)), ("near-miss", near_misses(few_shot.name))):
        found[name] = best_of(descriptor.describe(others), candidates) if len(others) else np.empty(0)
    return found


def threshold_of(values: np.ndarray, share: float) -> float:
    """The least cosine, rounded up to a hundredth, that at most ``share`` of ``values`` are above."""
    allowed = int(share * len(values))
    return round(float(np.ceil(np.sort(values)[::-1][allowed] * 100)) / 100, 2)


def described(values: np.ndarray, threshold: float) -> dict[str, Any]:
    """How many there are, how many are above the threshold, and their quantiles."""
    return {
        "pictures": len(values),
        "above": round(float((values > threshold).mean()), 4),
        "quantiles": [round(float(one), 3) for one in np.quantile(values, QUANTILES)],
    }


def calibrate(base: Path) -> dict[str, Any]:
    """The thresholds of both views and how often they err, as ``results/judge.json`` keeps them."""
    codec = Codec(load_vae(locate_base(str(base))))
    copies = {"codec": codec.reconstruct, "light copy": edited(0.5), "heavy copy": edited(1.0)}
    found: dict[str, Any] = {"sha256": SHA256, "sides": SIDES, "false_matches": FALSE_MATCHES, "views": {}}
    for view in SIDES:
        descriptor = network(view)
        of_sets = [(one.holdout, cosines(descriptor, one, copies)) for one in SETS]
        parts = {
            name: {
                kind: np.concatenate([values[kind] for is_holdout, values in of_sets if is_holdout is holdout])
                for kind in of_sets[0][1]
            }
            for name, holdout in (("tuning", False), ("holdout", True))
        }
        threshold = threshold_of(parts["tuning"]["control"], FALSE_MATCHES)
        found["views"][view] = {
            "threshold": threshold,
            **{part: {kind: described(one, threshold) for kind, one in kinds.items()} for part, kinds in parts.items()},
        }
    return found


def main(
    base: Annotated[Path, typer.Option(help="The base model, whose codec makes copies.")] = ASSETS / "base",
    output: Annotated[Path, typer.Option(help="The file that the thresholds are kept in.")] = CALIBRATION,
) -> None:
    """Set the judge's thresholds again, print how often they err, and write both down."""
    torch.set_num_threads(1)
    found = calibrate(base)
    for view, figures in found["views"].items():
        print(f"{view}: above {figures['threshold']:.2f}")
        for part in ("tuning", "holdout"):
            for kind, one in figures[part].items():
                spread = "  ".join(f"{value:.2f}" for value in one["quantiles"])
                print(f"  {part:8}{kind:12}{one['pictures']:5} pictures  above {one['above']:6.1%}   {spread}")
    output.write_text(json.dumps(found, indent=2) + "\n")
