"""Which pictures are the decoys of a reference set: those of the backgrounds of its kind, without copies of it.

Each background is tested for kind by itself, where there are several, and what is left of them once more together: a
background of another look takes nothing from the others, and none is chosen by what it scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from audit.descriptors.pdq import MIN_QUALITY
from audit.evidence.chance import FEWEST, standing_out
from audit.evidence.kind import kind_problem, of_their_kind
from audit.references.index import Bank
from audit.references.index.known import Known

VERSION = 4  # raised when the same pictures and decoys come to have other chances, or more is kept of them
ANOTHER_LOOK = "its pictures are of another look than the references"
UNCLEAR = "several backgrounds could be of the references' look, and are of different looks themselves"
MOST_SUSPECTS = 20  # that are named
Ask = Callable[[str, list[Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Decoys:
    """Pictures of backgrounds, arrays of one length M: unit vectors [M, D], looks [M, F], cosines to the nearest
    extraction and membership scores (NaN: none), and whether a picture counts at all.
    """

    backgrounds: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    vectors: np.ndarray
    looks: np.ndarray
    cosines: np.ndarray
    scores: np.ndarray
    counts: np.ndarray

    def where(self, chosen: np.ndarray) -> Decoys:
        """Those that ``chosen``, booleans or numbers, names."""
        return Decoys(*(getattr(self, one.name)[chosen] for one in fields(self)))


@dataclass(frozen=True)
class Paired:
    """The decoys of one reference set, each picture once; why nothing follows from them; what was taken of each."""

    decoys: Decoys
    problem: str | None
    backgrounds: list[dict[str, Any]]


def paired(bank: Bank, looks: np.ndarray, on_offer: Decoys, threshold: float) -> Paired:
    """The decoys of the references ``bank``, of which those that count look like ``looks`` [K, F].

    ``on_offer`` are the pictures of all backgrounds that are for the set; what is nearer than ``threshold`` to a
    reference is a copy of it.
    """
    copies = bank.has_near(on_offer.vectors, threshold)
    usable = on_offer.counts & ~copies
    backgrounds = list(dict.fromkeys(on_offer.backgrounds.tolist()))
    where = [on_offer.backgrounds == background for background in backgrounds]
    passed: list[bool] | None = [True] * len(backgrounds)
    if len(backgrounds) > 1:
        passed = of_their_kind(looks, [on_offer.looks[here & usable] for here in where])
    taken = np.zeros(len(usable), bool)
    rows = []
    for number, (background, here) in enumerate(zip(backgrounds, where, strict=True)):
        why = UNCLEAR if passed is None else None if passed[number] else ANOTHER_LOOK
        taken |= here & usable & (why is None)
        rows.append(
            {"background": background, "pictures": here.sum(), "copies": (here & copies).sum(),
             "trivial": (here & ~copies & ~on_offer.counts).sum(), "decoys": 0 if why else (here & usable).sum(),
             "problem": why}
        )  # fmt: skip
    chosen = np.flatnonzero(taken)
    once = np.unique(on_offer.ids[chosen], return_index=True)[1]
    decoys = on_offer.where(chosen[once])
    problem = kind_problem(looks, decoys.looks)
    if passed is None:
        problem = f"{UNCLEAR}: 'lora-audit references add NAME DIR --kind background --of SET' says it"
    elif problem and not all(passed) and len(decoys.ids) < FEWEST:
        problem = f"{len(rows) - sum(passed)} of {len(rows)} backgrounds are of another look; {problem}"
    drawn = standing_out(decoys.cosines) & (decoys.cosines >= threshold)
    suspects = decoys.where(standing_out(decoys.scores) | drawn) if problem is None else None
    for row in rows:
        mine = () if suspects is None else suspects.names[suspects.backgrounds == row["background"]].tolist()
        row["suspects"] = sorted(mine)[:MOST_SUSPECTS]
    return Paired(decoys, problem, rows)


def caveat_of(row: dict[str, Any], input_size: int) -> str | None:
    """Why a picture, a reference or a decoy, does not count: nothing follows from its being like others."""
    quality = row["pdq_quality"]
    if quality is not None and quality < MIN_QUALITY:
        return f"there is too little in it to be told from others (PDQ quality {quality} of 100)"
    if row["width"] and row["height"] and min(row["width"], row["height"]) < input_size:
        return f"{row['width']} x {row['height']} pixels are less than the descriptor's {input_size}"
    return None


@dataclass(frozen=True)
class Questions:
    """What the chances of sets depend on, beside the audit: ``of`` has a hash a set, of its pictures and decoys.

    ``pictures`` has how many each has, and the SHA256 of their ids. ``has_decoys`` says whether there is any background
    for one of them, ``drawn`` which backgrounds were declared a random split of one collection with the pictures of a
    set.
    """

    of: dict[str, str]
    has_decoys: bool
    drawn: dict[str, frozenset[str]] = field(default_factory=dict)
    pictures: dict[str, tuple[int, str]] = field(default_factory=dict)


_ASKED = """SELECT reference_set, coalesce(any_value(kind), 'reference') AS kind, any_value(decoys_of) AS decoys_of,
any_value(drawn_with) AS drawn_with, count(*) AS n, max(added_at) AS newest, sum(epoch_us(added_at)) AS added
FROM "references" WHERE descriptor_name = ? AND (kind = 'background' OR list_contains(?::VARCHAR[], reference_set))
GROUP BY reference_set ORDER BY reference_set"""
_PICTURES = """SELECT reference_set, sha256(string_agg(reference_id, ',' ORDER BY reference_id)) AS pictures
FROM "references" WHERE descriptor_name = ? AND list_contains(?::VARCHAR[], reference_set) GROUP BY reference_set"""


def questions_of(ask: Ask, descriptor: str, sets: Sequence[str], known: Known | None = None) -> Questions:
    """The questions of ``sets`` as the tables are now; what is ``known`` of large ones is not worked out again."""
    rows = ask(_ASKED, [descriptor, list(sets)])
    for row in rows:
        row["held"] = [row["n"], row.pop("newest"), row.pop("added")]
        about = row["reference_set"], descriptor
        row["pictures"] = known.get("pictures", about, row["n"], row["held"]) if known else None
    missing = [row for row in rows if row["pictures"] is None]
    found_of = ask(_PICTURES, [descriptor, [row["reference_set"] for row in missing]]) if missing else []
    worked_out = {one["reference_set"]: one["pictures"] for one in found_of}
    for row in missing:
        row["pictures"] = worked_out.get(row["reference_set"])
        if known and row["pictures"]:
            known.put("pictures", (row["reference_set"], descriptor), row["n"], row["held"], row["pictures"])
    rows = [row for row in rows if row["pictures"]]  # but for a set that went away meanwhile
    found, drawn, has_decoys = {}, {}, False
    for name in sets:
        own = [row["pictures"] for row in rows if row["reference_set"] == name]
        serving = [
            row for row in rows
            if row["kind"] == "background" and row["reference_set"] != name and is_for(row["decoys_of"], name)
        ]  # fmt: skip
        declared = [row["reference_set"] for row in serving if not set(own).isdisjoint(row["drawn_with"] or ())]
        decoys = [[row["reference_set"], row["pictures"], row["reference_set"] in declared] for row in serving]
        has_decoys |= bool(decoys)
        drawn[name] = frozenset(declared)
        found[name] = hashlib.sha256(repr([VERSION, own, decoys]).encode()).hexdigest()[:16]
    pictures = {row["reference_set"]: (row["n"], row["pictures"]) for row in rows if row["reference_set"] in sets}
    return Questions(found, has_decoys, drawn, pictures)


def is_for(decoys_of: Sequence[str] | None, name: str) -> bool:
    """Whether a background that names the sets ``decoys_of`` serves the set ``name``."""
    return not decoys_of or name in decoys_of
