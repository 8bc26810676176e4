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
from audit.references.parts import Parts

VERSION = 4  # raised when the same pictures and decoys come to have other chances, or more is kept of them
ANOTHER_LOOK = "its pictures are of another look than the references"
UNCLEAR = "several backgrounds could be of the references' look, and are of different looks themselves"
OTHER_PARTS = "it is not described in the same parts as the references: of these the best counts, and so it has to here"
MOST_SUSPECTS = 20  # that are named
Ask = Callable[[str, list[Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Decoys:
    """Pictures of backgrounds, arrays of one length M: unit vectors [M, D], looks [M, F], cosines to the nearest
    extraction and membership scores (NaN: none), whether a picture counts at all, cosines to the nearest control
    generation (NaN: none), and in what parts it is described, with these, [P, D] or None. Cosines are those of the
    whole or of the best part.
    """

    backgrounds: np.ndarray
    ids: np.ndarray
    names: np.ndarray
    vectors: np.ndarray
    looks: np.ndarray
    cosines: np.ndarray
    scores: np.ndarray
    counts: np.ndarray
    controls: np.ndarray
    layouts: np.ndarray
    parts: np.ndarray

    def where(self, chosen: np.ndarray) -> Decoys:
        """Those that ``chosen``, booleans or numbers, names."""
        return Decoys(*(getattr(self, one.name)[chosen] for one in fields(self)))


@dataclass(frozen=True)
class Paired:
    """The decoys of one reference set, each picture once; why nothing follows from them; what was taken of each."""

    decoys: Decoys
    problem: str | None
    backgrounds: list[dict[str, Any]]


def paired(
    bank: Bank, looks: np.ndarray, on_offer: Decoys, threshold: float, parts: Parts | None = None
) -> Paired:  # fmt: skip
    """The decoys of the references ``bank``, of which those that count look like ``looks`` [K, F].

    ``on_offer`` are the pictures of all backgrounds that are for the set; what is nearer than ``threshold`` to a
    reference is a copy of it. Of references with ``parts`` backgrounds are taken that are described in the same ones.
    """
    copies = _copies(bank, parts, on_offer, threshold)
    usable = on_offer.counts & ~copies
    backgrounds = list(dict.fromkeys(on_offer.backgrounds.tolist()))
    where = [on_offer.backgrounds == background for background in backgrounds]
    alike = [bool((on_offer.layouts[here] == (parts.layout if parts else "")).all()) for here in where]
    passed: list[bool] | None = [True] * sum(alike)
    if sum(alike) > 1:
        passed = of_their_kind(
            looks, [on_offer.looks[here & usable] for here, fits in zip(where, alike, strict=True) if fits]
        )
    by_look = iter([UNCLEAR] * sum(alike) if passed is None else [None if one else ANOTHER_LOOK for one in passed])
    taken = np.zeros(len(usable), bool)
    rows = []
    for number, (background, here) in enumerate(zip(backgrounds, where, strict=True)):
        why = next(by_look) if alike[number] else OTHER_PARTS
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
        problem = f"{len(passed) - sum(passed)} of {len(rows)} backgrounds are of another look; {problem}"
    if problem and passed is not None and not all(alike) and len(decoys.ids) < FEWEST:
        how = "'lora-audit references add ... --parts'" if parts else "'lora-audit references add' without --parts"
        problem = f"a background is {OTHER_PARTS.partition(':')[0].removeprefix('it is ')} ({how}); {problem}"
    drawn = standing_out(decoys.cosines) & (decoys.cosines >= threshold)
    suspects = decoys.where(standing_out(decoys.scores) | drawn) if problem is None else None
    for row in rows:
        mine = () if suspects is None else suspects.names[suspects.backgrounds == row["background"]].tolist()
        row["suspects"] = sorted(mine)[:MOST_SUSPECTS]
    return Paired(decoys, problem, rows)


def _copies(bank: Bank, parts: Parts | None, on_offer: Decoys, threshold: float) -> np.ndarray:
    """Which of ``on_offer`` are copies of a reference, or where there are parts, of a part, or have a part that is."""
    copies = bank.has_near(on_offer.vectors, threshold)
    if parts and len(copies):
        copies |= parts.bank.has_near(on_offer.vectors, threshold)
        mine = np.flatnonzero(on_offer.layouts == parts.layout)
        if len(mine):
            flat = np.concatenate(on_offer.parts[mine].tolist())
            copies[mine] |= bank.has_near(flat, threshold).reshape(len(mine), -1).any(axis=1)
    return copies


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
    set, ``layouts`` in what parts sets are described.
    """

    of: dict[str, str]
    has_decoys: bool
    drawn: dict[str, frozenset[str]] = field(default_factory=dict)
    pictures: dict[str, tuple[int, str]] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)


_ASKED = """SELECT reference_set, coalesce(any_value(kind), 'reference') AS kind, any_value(decoys_of) AS decoys_of,
any_value(drawn_with) AS drawn_with, any_value(parts_layout) AS layout, count(*) AS n,
max(added_at) AS newest, sum(epoch_us(added_at)) AS added
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
        mine = [row for row in rows if row["reference_set"] == name]
        own = [row["pictures"] for row in mine]
        asked = own + [one for row in mine for one in _said(row["layout"])]
        serving = [
            row for row in rows
            if row["kind"] == "background" and row["reference_set"] != name and is_for(row["decoys_of"], name)
        ]  # fmt: skip
        declared = [row["reference_set"] for row in serving if not set(own).isdisjoint(row["drawn_with"] or ())]
        decoys = [
            [row["reference_set"], row["pictures"], row["reference_set"] in declared, *_said(row["layout"])]
            for row in serving
        ]
        has_decoys |= bool(decoys)
        drawn[name] = frozenset(declared)
        found[name] = hashlib.sha256(repr([VERSION, asked, decoys]).encode()).hexdigest()[:16]
    pictures = {row["reference_set"]: (row["n"], row["pictures"]) for row in rows if row["reference_set"] in sets}
    layouts = {row["reference_set"]: row["layout"] for row in rows if row["reference_set"] in sets and row["layout"]}
    return Questions(found, has_decoys, drawn, pictures, layouts)


def _said(layout: str | None) -> list[str]:
    """A layout of parts, where there is one: questions about sets without keep the hash that they had."""
    return [layout] if layout else []


def is_for(decoys_of: Sequence[str] | None, name: str) -> bool:
    """Whether a background that names the sets ``decoys_of`` serves the set ``name``."""
    return not decoys_of or name in decoys_of
