"""What verdicts with an error rate are worth: matches, wrong ones, and whole sets, by rule.

    python -m benchmarks.evidence [--quick] [--json FILE]
    python -m benchmarks.evidence --realistic DIR --most 20 --json benchmarks/results/evidence.json

Every checkpoint is scanned as a user would: its training pictures, unseen pictures of the same source and near-misses
are reference sets, other unseen pictures of it are decoys. The unseen pictures and decoys of realistic fine-tunes are
a random split; those of the testbed's were chosen by hand, and are more like the training pictures than the decoys
are. Rules: fixed (the descriptor's threshold), pdq (31 bits of 256 or fewer differ), and at an error rate of 5 %
extraction (p of what was drawn), membership (p of what the model knows), either (`--rule either`: the smaller of both,
twice, of decoys declared a random split, which those of the testbed are not) and combined (`--rule calibrated`: the
larger of both). A wrong match is one of an unseen picture or a near-miss. A whole set has
one p by the same rule; with --quick only the shipped checkpoints are scanned. Sets that had no part at all are those of
`python -m benchmarks.no_part`.

Exit code 1 where the combined rule is wrong in more cases than its rate allows (95 % interval), or an unseen set is
called a part at 1 %.
"""

from __future__ import annotations

import json
import time
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
from audit.config import Rule, VerdictSettings
from audit.demo import ASSETS, DECOYS, load_folder, load_set
from audit.evidence.chance import false_discovery_rates
from audit.references.sets import ReferenceSets
from audit.report.facts import AuditFacts, collect
from audit.workspace import Workspace
from benchmarks.grid import SHIPPED, available
from benchmarks.tables import table
from testbed.controls import FOLDER as CONTROLS
from testbed.controls import near_misses
from testbed.design import REALISTIC
from testbed.more_sets import prepared
from testbed.sets import few_shot_set, training_captions

RATE = VerdictSettings.fdr
IMAGES = 6  # sampled for each training picture
MOST_UNSEEN = 20  # of a realistic fine-tune's pictures that it never saw; the others are decoys
PDQ_NEAR = 31  # bits of 256
OWN_SOURCE = {"animals-3d": "@lobehub/fluent-emoji-3d", "transport-3d": "@lobehub/fluent-emoji-3d"}
GROUPS = ("trained", "unseen", "near")
LEVELS = (0.05, 0.01, 0.001)
RULES = ("fixed", "pdq", "extraction", "membership", "either", "combined")
P_VALUES = [f"{rule}_p" for rule in RULES[2:]]


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
    near: np.ndarray
    decoys: np.ndarray
    of: str  # the set that the pictures are of
    n0: int
    lora_scale: float = 1.0


def shipped(folder: Path) -> Iterator[Subject]:
    """The testbed's checkpoints in ``folder``: strong fine-tunes of 5 to 20 pictures."""
    for recipe in available(folder):
        few_shot = few_shot_set(recipe.few_shot)
        captions = list(dict.fromkeys(training_captions(recipe.few_shot)))
        trained, near = load_set(recipe.few_shot, "train"), near_misses(recipe.few_shot)
        unseen = load_set(recipe.few_shot, "control")
        bank = DECOYS / recipe.few_shot
        decoys = load_folder(bank if bank.is_dir() else CONTROLS / recipe.few_shot / "control")
        file = recipe.file(folder)
        yield Subject(
            recipe.name, "testbed", few_shot.holdout, file, captions, trained, unseen, near, decoys, recipe.few_shot,
            len(trained),
        )  # fmt: skip


def realistic(folder: Path, most: int) -> Iterator[Subject]:
    """Of the realistic fine-tunes in ``folder`` those that saw their pictures most often, ``most`` of them."""
    found = [one for one in REALISTIC if (one.file(folder).parent / "training.json").is_file()]
    for recipe in sorted(found, key=lambda one: (-one.exposures, one.name))[:most]:
        pictures = prepared(recipe.few_shot)
        count = recipe.training_images
        others = np.concatenate([pictures.control, pictures.training[count:], pictures.others])
        others = others[np.random.default_rng(0).permutation(len(others))]
        truth = json.loads((recipe.file(folder).parent / "training.json").read_text())
        captions = list(dict.fromkeys(truth["training_captions"]))[:8]
        kind, trained, file = f"{recipe.exposures} exposures", pictures.training[:count], recipe.file(folder)
        unseen, decoys = others[:MOST_UNSEEN], others[MOST_UNSEEN:]
        yield Subject(
            recipe.name, kind, recipe.holdout, file, captions, trained, unseen, others[:0], decoys, recipe.few_shot,
            count,
        )  # fmt: skip


def folder_of(pictures: np.ndarray, folder: Path) -> Path:
    """The pictures as PNG files."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
    return folder


def scanned(
    one: Subject, base: Path, workspace: Path, place: Path, bench: audit.Bench
) -> tuple[AuditFacts, AuditFacts]:
    """Scan ``one`` with its training pictures, unseen pictures and near-misses, and its decoys.

    What is said by the rule "calibrated", and by the rule "either".
    """
    folders = {
        name: folder_of(getattr(one, name), place / one.name / one.of / name)
        for name in ("trained", "unseen", "near", "decoys") if len(getattr(one, name))
    }  # fmt: skip
    background = [folders.pop("decoys")]
    _without_sets(workspace / one.name)  # those of a scan that was stopped
    settings = audit.Settings(images_per_training_image=IMAGES, lora_scale=one.lora_scale)
    result = audit.scan(
        one.file, str(base), references=list(folders.values()), background=background, drawn=True,
        descriptor="nano", captions=one.captions, n0=one.n0, settings=settings, bench=bench,
        workspace=workspace / one.name,
    )  # fmt: skip
    kept = Workspace(workspace / one.name)
    either = collect(kept, result.audit_id, result.facts.reference_sets, VerdictSettings(Rule.either, RATE))
    _without_sets(workspace / one.name)  # the next scan of this checkpoint has no decoys but its own
    return result.facts, either


def _without_sets(workspace: Path) -> None:
    """Remove all reference sets and backgrounds of a workspace."""
    sets = ReferenceSets(Workspace(workspace))
    for row in sets.list():
        sets.remove(row["reference_set"])


def row_of(one: Subject, facts: AuditFacts, either: AuditFacts) -> dict[str, Any]:
    """What each rule says of the references, and the p of the sets."""
    by_either = {item.reference_id: item.p for item in either.chances}
    chances = [item for item in facts.chances if item.caveat is None]
    group = np.array([item.reference_set.split("-")[0] for item in chances], dtype=object)
    spent = [item.evaluations for item in facts.members]
    row: dict[str, Any] = {
        "checkpoint": one.name, "kind": one.kind, "holdout": one.holdout,
        "trivial": len(facts.chances) - len(chances),
        "decoys": max((item.membership_decoys for item in chances), default=0),
        "evaluations_per_reference": round(float(np.mean(spent)), 1) if spent else None,
        "uncalibrated": sorted({item.uncalibrated for item in chances if item.uncalibrated}),
        "set_p": {item.reference_set.split("-")[0]: item.p for item in facts.set_chances},
    }  # fmt: skip
    rules = {name: _values(chances, name, by_either) for name in RULES[2:]}
    called = {"fixed": _near(facts, chances, by_hash=False), "pdq": _near(facts, chances, by_hash=True)}
    for name, values in rules.items():
        called[name] = np.zeros(len(chances), bool)
        told = np.isfinite(values)
        called[name][told] = false_discovery_rates(values[told]) <= RATE
    for part in GROUPS:
        mine = group == part
        row |= {part: int(mine.sum())} | {f"{rule}_{part}": int(found[mine].sum()) for rule, found in called.items()}
    return row | {f"{name}_p": _by_group(values, group) for name, values in rules.items()}


def _near(facts: Any, chances: Sequence[Any], by_hash: bool) -> np.ndarray:
    """Which references [N] are near an extraction, by the descriptor's threshold or by PDQ."""
    near = {
        match.reference_id for extraction in facts.extractions for match in extraction.matches
        if ((match.pdq_distance or 256) <= PDQ_NEAR if by_hash else match.is_match)
    }  # fmt: skip
    return np.array([item.reference_id in near for item in chances], bool)


def _values(chances: Sequence[Any], rule: str, by_either: dict[str, float | None]) -> np.ndarray:
    """The p [N] by which a rule goes; NaN where there is none, and of both kinds together where one has none."""
    both = np.array([[item.extraction_p, item.membership_p] for item in chances], float).reshape(-1, 2)
    if rule in ("extraction", "membership"):
        return both[:, 0 if rule == "extraction" else 1]
    p = [item.p if rule == "combined" else by_either.get(item.reference_id) for item in chances]
    return np.where(np.isfinite(both).all(axis=1), np.array(p, float), np.nan)


def _by_group(values: np.ndarray, group: np.ndarray) -> dict[str, list[float]]:
    return {part: [float(one) for one in values[(group == part) & np.isfinite(values)]] for part in GROUPS}


def share(part: int, whole: int) -> str:
    """A share with its exact 95 % interval."""
    if not whole:
        return ""
    low, high = stats.binomtest(part, whole).proportion_ci(method="exact")
    return f"{part / whole:.2f} ({low:.2f} to {high:.2f})"


def tpr_at(trained: np.ndarray, unseen: np.ndarray, rate: float) -> float:
    """The share of ``trained`` p-values below all but the share ``rate`` of ``unseen`` ones; NaN without both."""
    if not len(trained) or not len(unseen):
        return float("nan")
    return float((trained < np.sort(unseen)[int(rate * len(unseen))]).mean())


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """By split and kind of checkpoint: recall, wrong matches and whole sets; and how nulls are distributed."""
    lines, sets = [], []
    for holdout, kind in dict.fromkeys((row["holdout"], row["kind"]) for row in rows):
        mine = [row for row in rows if (row["holdout"], row["kind"]) == (holdout, kind)]
        split = "holdout" if holdout else "tuning"
        for rule in RULES:
            right, unseen, near = (sum(row[f"{rule}_{part}"] for row in mine) for part in GROUPS)
            asked = [sum(_asked(row, rule, part) for row in mine) for part in GROUPS]
            told = "" if rule in RULES[:2] else _tpr(mine, rule)
            lines.append(
                (
                    split, kind, sum(_asked(row, rule, "trained") > 0 for row in mine), rule, share(right, asked[0]),
                    f"{unseen} of {asked[1]}", f"{near} of {asked[2]}", share(unseen + near, right + unseen + near),
                    told,
                )
            )  # fmt: skip
        found = [_found(mine, part) for part in GROUPS]
        sets.append((split, kind, sum(row["set_p"].get("trained") is None for row in mine), *found))
    nulls = _pooled(rows, "combined", "unseen")
    head = ("sets", "fine-tunes", "checkpoints", "rule", "recall", "unseen", "near-misses", "share of wrong matches",
            "TPR at 1 % FPR")  # fmt: skip
    parts = [
        table(head, lines),
        table(("sets", "fine-tunes", "uncalibrated", *(f"{part} sets found at 1 %" for part in GROUPS)), sets),
    ]
    for rule in ("extraction", "membership", "combined"):
        nulls = _pooled([row for row in rows if row["kind"] != "testbed"], rule, "unseen")
        if len(nulls):
            levels = (f"{share(int((nulls <= level).sum()), len(nulls))} below {level}" for level in LEVELS)
            above = stats.kstest(nulls, "uniform", alternative="greater").pvalue
            said = f"of {len(nulls)} unseen pictures {', '.join(levels)}; more small p than uniform: KS p = {above:.2g}"
            parts.append(f"p by {rule}: {said}.\n")
    return "\n".join(parts)


def _asked(row: dict[str, Any], rule: str, part: str) -> int:
    """The references of a group of which the rule says something: all, or those that have a p."""
    return row[part] if rule in RULES[:2] else len(row[f"{rule}_p"][part])


def _tpr(rows: Sequence[dict[str, Any]], rule: str) -> str:
    found = tpr_at(_pooled(rows, rule, "trained"), _pooled(rows, rule, "unseen"), 0.01)
    return f"{found:.2f}" if np.isfinite(found) else ""


def _pooled(rows: Sequence[dict[str, Any]], rule: str, part: str) -> np.ndarray:
    return np.array([p for row in rows for p in row[f"{rule}_p"][part]], float)


def _found(rows: Sequence[dict[str, Any]], part: str) -> str:
    told = [row["set_p"][part] for row in rows if row["set_p"].get(part) is not None]
    return share(sum(p <= 0.01 for p in told), len(told))


def failing(rows: Sequence[dict[str, Any]]) -> str | None:
    """What does not hold; None where all does."""
    right, *others = (sum(row[f"combined_{part}"] for row in rows) for part in GROUPS)
    wrong = sum(others)
    if wrong and stats.binomtest(wrong, right + wrong, RATE, alternative="greater").pvalue < 0.05:
        return f"{wrong} of {right + wrong} matches are wrong, which is more than {RATE:.0%}"
    told = [(row["checkpoint"], row["set_p"].get("unseen")) for row in rows]
    compared = [(name, p) for name, p in told if p is not None]
    accused = [name for name, p in compared if p <= 0.01]
    if accused and stats.binomtest(len(accused), len(compared), 0.01, alternative="greater").pvalue < 0.05:
        return f"{len(accused)} of {len(compared)} unseen sets are called a part: {', '.join(accused)}"
    found = [row["set_p"].get("trained") for row in rows if row["kind"] == "testbed"]
    lost = sum(p is not None and p > 0.01 for p in found)
    return f"{lost} of {len(found)} sets that strong fine-tunes were trained on are not found" if lost else None


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
    bench, found = audit.Bench("cpu"), {"rows": []}
    with TemporaryDirectory() as place:
        for one in subjects:
            started = time.monotonic()
            row = row_of(one, *scanned(one, base, workspace, Path(place), bench)) | {
                "seconds": round(time.monotonic() - started, 1)
            }
            print(json.dumps({key: value for key, value in row.items() if key not in P_VALUES}), flush=True)
            found["rows"].append(row)
            keep(found, json_file)
    print(markdown(found["rows"]))
    problem = failing(found["rows"])
    if problem:
        print(problem)
        raise typer.Exit(1)


def keep(found: dict[str, Any], file: Path | None) -> None:
    """Write ``found`` as JSON, where a file is named."""
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
