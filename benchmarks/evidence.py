"""What verdicts with an error rate are worth: matches, wrong ones, and whole sets, by rule.

    python -m benchmarks.evidence [--quick] [--json FILE]
    python -m benchmarks.evidence --realistic DIR --most 20 --json benchmarks/results/evidence.json

Every checkpoint is scanned as a user would: its training pictures and unseen pictures of the same source are two
reference sets, other unseen pictures of it are decoys. Rules: fixed (the descriptor's threshold), and at an error rate
of 5 % extraction (p of what was drawn), membership (p of what the model knows) and combined (the product's verdict). A
wrong match is one of an unseen picture. A whole set has one p; with --quick only the shipped checkpoints are scanned.

Exit code 1 where the combined rule is wrong in more cases than its rate allows (95 % interval), or an unseen set is
called a part at 1 %.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from scipy import stats

import audit
from audit.demo import ASSETS, load_set
from audit.evidence.chance import FEWEST, false_discovery_rates
from audit.report.chance import RATE
from benchmarks.grid import SHIPPED, available
from benchmarks.tables import table
from testbed.controls import controls
from testbed.design import REALISTIC
from testbed.more_sets import prepared
from testbed.sets import few_shot_set, training_captions

IMAGES = 6  # sampled for each training picture
MOST_DECOYS, LEAST_UNSEEN = 40, 5
RULES = ("fixed", "extraction", "membership", "combined")


@dataclass(frozen=True)
class Subject:
    """A checkpoint, with uint8 pictures [N, 64, 64, 3] that it was trained on and that it never saw."""

    name: str
    kind: str
    holdout: bool
    file: Path
    captions: list[str]
    trained: np.ndarray
    unseen: np.ndarray


def shipped(folder: Path) -> Iterator[Subject]:
    """The testbed's checkpoints in ``folder``: strong fine-tunes of 5 to 20 pictures."""
    for recipe in available(folder):
        few_shot = few_shot_set(recipe.few_shot)
        captions = list(dict.fromkeys(training_captions(recipe.few_shot)))
        trained = load_set(recipe.few_shot, "train")
        yield Subject(
            recipe.name, "testbed", few_shot.holdout, recipe.file(folder), captions, trained, controls(recipe.few_shot)
        )


def realistic(folder: Path, most: int) -> Iterator[Subject]:
    """Of the realistic fine-tunes in ``folder`` those that saw their pictures most often, ``most`` of them."""
    found = [one for one in REALISTIC if (one.file(folder).parent / "training.json").is_file()]
    for recipe in sorted(found, key=lambda one: (-one.exposures, one.name))[:most]:
        pictures = prepared(recipe.few_shot)
        count = recipe.training_images
        unseen = np.concatenate([pictures.control, pictures.training[count:], pictures.others])
        truth = json.loads((recipe.file(folder).parent / "training.json").read_text())
        captions = list(dict.fromkeys(truth["training_captions"]))[:8]
        kind, trained = f"{recipe.exposures} exposures", pictures.training[:count]
        yield Subject(recipe.name, kind, recipe.holdout, recipe.file(folder), captions, trained, unseen)


def folder_of(pictures: np.ndarray, folder: Path) -> Path:
    """The pictures as PNG files."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
    return folder


def scanned(one: Subject, base: Path, workspace: Path, place: Path, bench: audit.Bench) -> audit.Result:
    """Scan ``one`` with its training pictures, unseen pictures and decoys, split by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(one.unseen))
    decoys = min(MOST_DECOYS, max(FEWEST, len(order) - LEAST_UNSEEN))
    parts = {"decoys": one.unseen[order[:decoys]], "unseen": one.unseen[order[decoys:]], "trained": one.trained}
    folders = {name: folder_of(pictures, place / one.name / name) for name, pictures in parts.items()}
    settings = audit.Settings(images_per_training_image=IMAGES)
    return audit.scan(
        one.file, str(base), references=[folders["trained"], folders["unseen"]], background=[folders["decoys"]],
        descriptor="nano", captions=one.captions, n0=len(one.trained), settings=settings, bench=bench,
        workspace=workspace / one.name,
    )  # fmt: skip


def row_of(one: Subject, result: audit.Result) -> dict[str, Any]:
    """What each rule says of the references, and the p of both sets."""
    facts = result.facts
    whole = {item.reference_set.split("-")[0]: item for item in facts.set_chances}
    chances = [item for item in facts.chances if item.caveat is None]
    seen = np.array([item.reference_set.startswith("trained-") for item in chances])
    row: dict[str, Any] = {
        "checkpoint": one.name, "kind": one.kind, "holdout": one.holdout, "trained": int(seen.sum()),
        "unseen": int((~seen).sum()), "trivial": len(facts.chances) - len(chances),
        "decoys": max((item.membership_decoys for item in chances), default=0),
        "uncalibrated": sorted({item.uncalibrated for item in chances if item.uncalibrated}),
        "set_p": whole["trained"].p if "trained" in whole else None,
        "unseen_set_p": whole["unseen"].p if "unseen" in whole else None,
        "null_p": [item.p for item, mine in zip(chances, seen, strict=True) if not mine and item.p is not None],
    }  # fmt: skip
    matched_ids = {match.reference_id for _, match in facts.matched}
    for rule in RULES:
        if rule == "fixed":
            called = np.array([item.reference_id in matched_ids for item in chances], bool)
        else:
            name = "p" if rule == "combined" else f"{rule}_p"
            values = [getattr(item, name) for item in chances]
            called = np.zeros(len(chances), bool)
            told = [number for number, value in enumerate(values) if value is not None]
            called[told] = false_discovery_rates(np.array([values[number] for number in told])) <= RATE
        row |= {f"{rule}_right": int(called[seen].sum()), f"{rule}_wrong": int(called[~seen].sum())}
    return row


def share(part: int, whole: int) -> str:
    """A share with its exact 95 % interval."""
    if not whole:
        return ""
    low, high = stats.binomtest(part, whole).proportion_ci(method="exact")
    return f"{part / whole:.2f} ({low:.2f} to {high:.2f})"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """By split and kind of checkpoint: recall, wrong matches and whole sets; and how nulls are distributed."""
    lines, sets = [], []
    for holdout, kind in dict.fromkeys((row["holdout"], row["kind"]) for row in rows):
        mine = [row for row in rows if (row["holdout"], row["kind"]) == (holdout, kind)]
        split = "holdout" if holdout else "tuning"
        for rule in RULES:
            some = mine if rule == "fixed" else [row for row in mine if not row["uncalibrated"]]
            right, wrong = (sum(row[f"{rule}_{part}"] for row in some) for part in ("right", "wrong"))
            references = sum(row["trained"] for row in some)
            lines.append((split, kind, len(some), rule, share(right, references), wrong, share(wrong, right + wrong)))
        told = [row for row in mine if row["set_p"] is not None]
        others = [row for row in mine if row["unseen_set_p"] is not None]
        found = [sum(row[name] <= 0.01 for row in some) for name, some in (("set_p", told), ("unseen_set_p", others))]
        refused = len(mine) - len(told)
        sets.append((split, kind, refused, share(found[0], len(told)), share(found[1], len(others))))
    nulls = np.array([p for row in rows for p in row["null_p"]])
    parts = [
        table(("sets", "fine-tunes", "checkpoints", "rule", "recall", "wrong", "share of wrong matches"), lines),
        table(("sets", "fine-tunes", "uncalibrated", "trained sets found at 1 %", "unseen sets found at 1 %"), sets),
    ]
    if len(nulls):
        levels = ", ".join(f"{share(int((nulls <= level).sum()), len(nulls))} below {level}" for level in (0.05, 0.01))
        parts.append(f"Of {len(nulls)} unseen pictures: {levels}.\n")
    return "\n".join(parts)


def failing(rows: Sequence[dict[str, Any]]) -> str | None:
    """What does not hold; None where all does."""
    right, wrong = (sum(row[f"combined_{part}"] for row in rows) for part in ("right", "wrong"))
    if wrong and stats.binomtest(wrong, right + wrong, RATE, alternative="greater").pvalue < 0.05:
        return f"{wrong} of {right + wrong} matches are wrong, which is more than {RATE:.0%}"
    accused = [row for row in rows if row["unseen_set_p"] is not None and row["unseen_set_p"] <= 0.01]
    compared = sum(row["unseen_set_p"] is not None for row in rows)
    if accused and stats.binomtest(len(accused), compared, 0.01, alternative="greater").pvalue < 0.05:
        return (
            f"{len(accused)} of {compared} unseen sets are called a part: {', '.join(r['checkpoint'] for r in accused)}"
        )
    return None


def main(
    quick: Annotated[bool, typer.Option(help="The shipped checkpoints alone.")] = False,
    checkpoints: Annotated[Path, typer.Option(help="Folder of the testbed's checkpoints.")] = SHIPPED,
    realistic_in: Annotated[
        Path | None, typer.Option("--realistic", help="Folder of the realistic fine-tunes (testbed.realistic).")
    ] = None,
    most: Annotated[int, typer.Option(help="Realistic fine-tunes, the longest trained first.", min=1)] = 20,
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("lora-audit-workspace-evidence"),
) -> None:
    """Scan every checkpoint, print what each rule says, and the tables; a stopped run goes on."""
    subjects = list(shipped(checkpoints))
    if realistic_in and not quick:
        subjects += realistic(realistic_in, most)
    bench, rows = audit.Bench("cpu"), []
    with TemporaryDirectory() as place:
        for one in subjects:
            rows.append(row_of(one, scanned(one, base, workspace, Path(place), bench)))
            said = {name: value for name, value in rows[-1].items() if name != "null_p"}
            print(json.dumps(said), flush=True)
            if json_file:
                json_file.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(rows))
    problem = failing(rows)
    if problem:
        print(problem)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
