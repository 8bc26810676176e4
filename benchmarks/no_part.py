"""False matches: scans of reference sets that had no part in the fine-tuning, by the product's rule.

    python -m benchmarks.no_part --foreign --json benchmarks/results/no_part.json
    python -m benchmarks.no_part --growth --json benchmarks/results/no_part.json

--foreign: each shipped checkpoint is asked about portfolios of twelve pictures of a source that it was not trained on,
with decoys of that source; so is the base against itself, a shipped LoRA scaled to next to nothing. --growth: reference
sets of 100, 1,000 and 10,000 pictures that no fine-tune has seen, with 200 or 1,000 decoys out of the same pool, of
which those count that are no near copies of a reference. Every match is wrong. By the rule at a rate of 5 % at most 5
of 100 such questions may have any.

A stopped benchmark goes on with what the JSON file has. Exit code 1 where more scans match than the rate allows (95 %).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats

import audit
from audit.demo import ASSETS, load_set
from audit.states import Verdict
from benchmarks.evidence import OWN_SOURCE, RATE, Subject, keep, realistic, scanned, share, shipped
from benchmarks.grid import SHIPPED
from benchmarks.tables import table
from testbed.controls import controls
from testbed.data import pretraining, textures
from testbed.more_sets import MORE_SETS, prepared
from testbed.sets import SETS

FOREIGN = 12  # pictures of a portfolio
PORTFOLIOS = 3  # of each source, for each checkpoint; they share pictures
NEXT_TO_NOTHING = 0.02  # of a LoRA: the base against itself
# references of a set, decoys on offer, and draws of such a set for each checkpoint
GROWTH = ((100, 200, 2), (1_000, 200, 1), (1_000, 1_000, 1), (10_000, 200, 1), (10_000, 1_000, 1))
ENDLESS_SKY = ("spaceships", "landscapes")  # of more_sets: no shipped checkpoint or few-shot set is of their source


def itself(subjects: Sequence[Subject]) -> Iterator[Subject]:
    """The base against itself: the LoRAs among ``subjects``, scaled to next to nothing."""
    for one in subjects:
        if one.file.is_file():
            yield replace(one, name=f"{one.name}-itself", kind="the base itself", lora_scale=NEXT_TO_NOTHING)


@cache
def source_of(name: str) -> str | None:
    """The package that the pictures of a set come from."""
    found = next((item.source for item in SETS if item.name == name), None)
    return found or OWN_SOURCE.get(name)


@cache
def pictures_of(name: str) -> np.ndarray:
    """uint8 [N, 64, 64, 3]: all pictures of a few-shot set, or of one of more_sets."""
    if name in (item.name for item in MORE_SETS):
        found = prepared(name)
        return np.concatenate([found.training, found.control, found.others])
    return np.concatenate([load_set(name, "train"), controls(name)])


def foreign(one: Subject, few_shot: str, draw: int = 0) -> Subject:
    """``one`` with pictures that had no part in it: FOREIGN of a set as references, the others as decoys."""
    pictures = pictures_of(few_shot)
    pictures = pictures[np.random.default_rng(draw).permutation(len(pictures))]
    none = pictures[:0]
    return replace(
        one, trained=none, unseen=pictures[:FOREIGN], near=none, decoys=pictures[FOREIGN:], of=f"{few_shot}-{draw}"
    )


def questions(subjects: Sequence[Subject], portfolios: int = PORTFOLIOS) -> Iterator[tuple[Subject, str, int]]:
    """(checkpoint, set, draw) of every scan of a foreign portfolio; the base itself is asked about its own, too."""
    for draw in range(portfolios):
        for one in subjects:
            fine_tuned = one.lora_scale == 1
            own = source_of(one.of) if fine_tuned else None
            names = [item.name for item in SETS if item.source != own]
            names += [name for name in ENDLESS_SKY if one.of not in ENDLESS_SKY or not fine_tuned]
            for name in names:
                yield one, name, draw


def row_of(one: Subject, facts: Any, seconds: float) -> dict[str, Any]:
    """What is kept of a scan whose references had no part: all that matches is wrong."""
    return {
        "checkpoint": one.name, "kind": one.kind, "of": one.of, "references": len(one.unseen),
        "offered": len(one.decoys), "decoys": max((item.extraction_decoys for item in facts.chances), default=0),
        "uncalibrated": sorted({item.uncalibrated for item in facts.chances if item.uncalibrated}),
        "matches": sum(item.verdict is Verdict.match for item in facts.chances),
        "possible": sum(item.verdict is Verdict.possible for item in facts.chances),
        "matched_sets": sum(item.verdict is Verdict.match for item in facts.set_chances),
        "fixed": len(facts.verdict.alike), "drawn_by_the_base": len(facts.verdict.common),
        "set_p": [item.p for item in facts.set_chances], "seconds": round(seconds, 1),
    }  # fmt: skip


@cache
def pool() -> np.ndarray:
    """uint8 [N, 64, 64, 3]: what the base was pretrained on, and crops of the same pages; no fine-tune has seen any."""
    return np.concatenate([pretraining().images, textures()])


def grown(one: Subject, count: int, offered: int, draw: int) -> Subject:
    """``one`` with ``count`` pictures of the pool as references, and ``offered`` others as decoys."""
    order = np.random.default_rng(draw).permutation(len(pool()))[: offered + count]
    none, pictures = pool()[:0], pool()[order]
    references, decoys = pictures[offered:], pictures[:offered]
    return replace(one, trained=none, unseen=references, near=none, decoys=decoys, of=_pool(count, offered, draw))


def _pool(count: int, offered: int, draw: int) -> str:
    return f"pool-{count}-{offered}-{draw}"


def asked(subjects: Sequence[Subject], of_growth: bool, portfolios: int) -> Iterator[tuple[str, str, Any]]:
    """(checkpoint, what it is asked about, what makes the subject) of every scan, small sets first."""
    if of_growth:
        for count, offered, draws in GROWTH:
            for one in subjects:
                for draw in range(draws):
                    what = count, offered, draw
                    yield one.name, _pool(*what), lambda a=one, b=what: grown(a, *b)
        return
    for one, name, draw in questions([*subjects, *itself(subjects)], portfolios):
        yield one.name, f"{name}-{draw}", lambda a=one, b=name, c=draw: foreign(a, b, c)


def of_foreign(rows: Sequence[dict[str, Any]]) -> str:
    """A table of foreign portfolios by kind of checkpoint."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        told = [row for row in mine if not row["uncalibrated"]]
        sets = [p for row in told for p in row["set_p"] if p is not None]
        lines.append(
            (kind, len(mine), len(told), share(sum(row["matches"] > 0 for row in told), len(told)),
             share(sum(row.get("matched_sets", 0) > 0 for row in told), len(told)),
             share(sum(p <= 0.01 for p in sets), len(sets)), share(sum(row["fixed"] > 0 for row in mine), len(mine)))
        )  # fmt: skip
    head = ("fine-tunes", "scans", "calibrated", "with a match", "with a set that matches", "sets at p of 1 %",
            "with a match by the threshold")  # fmt: skip
    return table(head, lines)


def of_growth(rows: Sequence[dict[str, Any]]) -> str:
    """A table of sets of growing size: false matches by picture and by question, beside the rate."""
    lines = []
    for count, offered in sorted({(row["references"], row["offered"]) for row in rows}):
        mine = [row for row in rows if (row["references"], row["offered"]) == (count, offered)]
        told = [row for row in mine if not row["uncalibrated"]]
        pictures, wrong = sum(row["references"] for row in told), sum(row["matches"] for row in told)
        decoys = f"{round(np.mean([row['decoys'] for row in mine]))} of {offered:,}"
        lines.append(
            (f"{count:,}", decoys, len(mine), len(told), share(sum(row["matches"] > 0 for row in told), len(told)),
             f"at most {RATE:.2f}", f"{wrong} of {pictures:,}", sum(row["possible"] for row in told),
             f"{sum(row['fixed'] for row in mine)} of {sum(row['references'] for row in mine):,}",
             sum(row["drawn_by_the_base"] for row in mine))
        )  # fmt: skip
    head = ("unseen references", "decoys that count", "scans", "calibrated", "with a match", "stated",
            "pictures that match", "possible", "alike by the threshold", "drawn by the base as well")  # fmt: skip
    return table(head, lines)


def failing(rows: Sequence[dict[str, Any]]) -> str | None:
    """What does not hold; None where all does."""
    told = [row for row in rows if not row["uncalibrated"]]
    for key, what in (("matches", "pictures"), ("matched_sets", "sets")):
        wrong = sum(row.get(key, 0) > 0 for row in told)
        if wrong and stats.binomtest(wrong, len(told), RATE, alternative="greater").pvalue < 0.05:
            return f"{wrong} of {len(told)} scans of {what} that had no part match, which is more than {RATE:.0%}"
    return None


def main(
    growth: Annotated[bool, typer.Option("--growth", help="Sets of growing size.")] = False,
    of_others: Annotated[bool, typer.Option("--foreign", help="Portfolios of other sources.")] = False,
    portfolios: Annotated[int, typer.Option(help="Of each source, for each checkpoint.", min=1)] = PORTFOLIOS,
    checkpoints: Annotated[Path, typer.Option(help="Folder of the testbed's checkpoints.")] = SHIPPED,
    realistic_in: Annotated[
        Path | None, typer.Option("--realistic", help="Folder of the realistic fine-tunes, to be asked as well.")
    ] = None,
    most: Annotated[int, typer.Option(help="Realistic fine-tunes, the longest trained first.", min=1)] = 20,
    base: Annotated[Path, typer.Option(help="The base model.")] = ASSETS / "base",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also keep the rows as JSON; go on from it.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where audits are kept.")] = Path("lora-audit-workspace-no-part"),
) -> None:
    """Scan, and print the tables; without options, of what the JSON file has."""
    subjects = list(shipped(checkpoints))
    if realistic_in:
        subjects += realistic(realistic_in, most)
    found: dict[str, Any] = {"foreign": [], "growth": []}
    if json_file and json_file.is_file():
        found |= json.loads(json_file.read_text())
    bench = audit.Bench("cpu")
    with TemporaryDirectory() as place:
        for key in [name for name, wanted in (("foreign", of_others), ("growth", growth)) if wanted]:
            there = {(row["checkpoint"], row["of"]) for row in found[key]}
            for name, of, made in asked(subjects, key == "growth", portfolios):
                if (name, of) in there:
                    continue
                one, started = made(), time.monotonic()
                facts, _ = scanned(one, base, workspace, Path(place), bench)
                found[key].append(row_of(one, facts, time.monotonic() - started))
                print(json.dumps(found[key][-1]), flush=True)
                keep(found, json_file)
    for rows, said in ((found["foreign"], of_foreign), (found["growth"], of_growth)):
        if rows:
            print(said(rows))
    problem = failing([*found["foreign"], *found["growth"]])
    if problem:
        print(problem)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
