"""How likely what speaks for each reference is by chance: a finished audit's references, among decoys.

Decoys are the pictures of the workspace's backgrounds that are of the kind of a set's references
(audit/references/decoys.py). Where there are none, or too few, nothing is said of that set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.evidence.chance import FEWEST, TAIL_SHARE, agreed_p, rank_p, set_p, tail_p
from audit.evidence.effort import WHOLE
from audit.references.control import ControlGenerations, by_fine_tuning, control_of, drawn_alone
from audit.references.decoys import BLOCK, Paired, caveat_of, questions_of
from audit.references.offer import ORDER, PICTURE, counting, on_offer, pairing_of
from audit.sampling.spooled import vectors_of

WEIGHED = 'audits extractions "references" memberships control_generations'
_REFERENCES = f"""SELECT {PICTURE}, m.score, m.caveat AS score_caveat, m.question
FROM "references" AS r LEFT JOIN memberships AS m
ON m.audit_id = ? AND m.reference_set = r.reference_set AND m.reference_id = r.reference_id
WHERE r.descriptor_name = ? AND """


@dataclass(frozen=True)
class Weighed:
    """Rows of chances and set_chances."""

    chances: list[dict[str, Any]] = field(default_factory=list)
    set_chances: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Question:
    """What is weighed of an audit: its row, its extractions, and each set's references with their decoys.

    ``control`` are its control generations.
    """

    audit: dict[str, Any]
    seen: np.ndarray
    ranks: list[int]
    control: ControlGenerations
    hashes: dict[str, str]
    sets: list[tuple[str, pa.Table, Paired]]


def _question(connection: duckdb.DuckDBPyConnection, audit_id: str, sets: Sequence[str]) -> _Question:
    def table(sql: str, *values: Any) -> pa.Table:
        return connection.sql(sql, params=list(values)).to_arrow_table()

    sql = "SELECT descriptor, threshold, coalesce(descriptor_size, 0) AS size FROM audits WHERE audit_id = ?"
    [audit] = table(sql, audit_id).to_pylist()
    name_of = audit["descriptor"]
    extractions = table("SELECT rank, descriptor FROM extractions WHERE audit_id = ? ORDER BY rank", audit_id)
    asked = _REFERENCES + "list_contains(?::VARCHAR[], r.reference_set)" + ORDER
    references = table(asked, audit_id, name_of, list(sets))
    backgrounds = table(_REFERENCES + "r.kind = 'background'" + ORDER, audit_id, name_of)
    seen = vectors_of(extractions) if extractions.num_rows else np.empty((0, 0), np.float32)
    scores = _scores(backgrounds)
    offer = on_offer(backgrounds, audit["size"], _cosines(backgrounds, seen), scores)
    serves = backgrounds["decoys_of"].to_pylist()
    questions = questions_of(lambda sql, values: table(sql, *values).to_pylist(), name_of, sets)
    found = []
    for name in sets:
        mine = references.filter(pc.equal(references["reference_set"], name))
        if not mine.num_rows:
            continue
        alike = replace(offer, scores=np.where(_measured_alike(backgrounds, mine), scores, np.nan))
        pairing = pairing_of(name, mine, alike, serves, audit["threshold"], audit["size"])
        found.append((name, mine, pairing))
    control = control_of(connection, audit_id)
    return _Question(audit, seen, extractions["rank"].to_pylist(), control, questions.of, found)


def weigh_in(connection: duckdb.DuckDBPyConnection, audit_id: str, sets: Sequence[str]) -> Weighed:
    """Weigh the references of ``sets``, over a connection that sees the tables of ``WEIGHED``."""
    asked, found = _question(connection, audit_id, sets), Weighed()
    for name, mine, pairing in asked.sets:
        size = asked.audit["size"]
        rows = [
            row for start in range(0, mine.num_rows, BLOCK) for row in _rows(mine.slice(start, BLOCK), asked, pairing)
        ]
        about = {"audit_id": audit_id, "reference_set": name}
        found.chances.extend({**about, **row} for row in rows)
        counts = counting(mine, size)
        drawn = _by_fine_tuning(asked, vectors_of(mine), _cosines(mine, asked.seen))[counts]
        of_decoys = _by_fine_tuning(asked, pairing.decoys.vectors, pairing.decoys.cosines)
        whole = _whole(drawn, of_decoys, _scores(mine)[counts], pairing, rows)
        found.set_chances.append(
            {**about, "question": asked.hashes[name], **whole, "backgrounds": pairing.backgrounds,
             "decoy_similarities": _finite(pairing.decoys.cosines), "decoy_scores": _finite(pairing.decoys.scores)}
        )  # fmt: skip
    return found


def _finite(values: np.ndarray) -> list[float]:
    found: list[float] = values[np.isfinite(values)].astype(float).tolist()
    return found


def _cosines(table: pa.Table, seen: np.ndarray) -> np.ndarray:
    """[N]: to the nearest extraction; NaN without extractions."""
    if not len(seen) or not table.num_rows:
        return np.full(table.num_rows, np.nan)
    parts = [vectors_of(table.slice(start, BLOCK)) @ seen.T for start in range(0, table.num_rows, BLOCK)]
    return np.concatenate([part.max(axis=1) for part in parts])


def _scores(table: pa.Table) -> np.ndarray:
    """[N]; NaN for scores that are missing, or that something speaks against."""
    scores = table["score"].to_numpy(zero_copy_only=False).astype(float)
    return np.where(table["score_caveat"].is_null().to_numpy(zero_copy_only=False), scores, np.nan)


def _measured_alike(backgrounds: pa.Table, mine: pa.Table) -> np.ndarray:
    """Of which pictures of ``backgrounds`` the scores compare with those of ``mine``, booleans [N].

    Those that were measured for the same question, or with all noises, as ``mine`` were: a score of fewer noises is
    another one.
    """
    known = {_measured(one) for one in mine["question"].to_pylist()}
    return np.array([_measured(one) in known for one in backgrounds["question"].to_pylist()], bool)


def _measured(question: str | None) -> str | None:
    return WHOLE if question and question.startswith(WHOLE) else question


def _by_fine_tuning(asked: _Question, vectors: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """``cosines`` [N] to the nearest extractions, the least of all where the base alone draws the picture as well.

    References and decoys are treated alike, so that a set without a part has no higher ranks than its decoys.
    """
    return by_fine_tuning(cosines, asked.control.nearest(vectors)[0], asked.audit["threshold"])


def _rows(part: pa.Table, asked: _Question, pairing: Paired) -> list[dict[str, Any]]:
    seen, ranks, size = asked.seen, asked.ranks, asked.audit["size"]
    vectors = vectors_of(part)
    controls, controlled_by = asked.control.nearest(vectors)
    cosines = vectors @ seen.T if len(seen) else np.full((part.num_rows, 0), np.nan)
    alone = drawn_alone(cosines.max(axis=1, initial=-1.0), controls, asked.audit["threshold"])
    counted, decoys, problem = _scores(part), pairing.decoys, pairing.problem
    rows = []
    for number, row in enumerate(part.drop_columns(["descriptor", "look"]).to_pylist()):
        best = int(cosines[number].argmax()) if len(seen) else None
        similarity = None if best is None else float(cosines[number, best])
        caveat = caveat_of(row, size)
        extraction_p, extraction_decoys = _p(similarity, decoys.cosines, problem)
        extraction_p = 1.0 if alone[number] and extraction_p is not None else extraction_p
        control = float(controls[number]) if np.isfinite(controls[number]) else None
        membership_p, membership_decoys = _p(float(counted[number]), decoys.scores, problem)
        told = [one for one in (extraction_p, membership_p) if one is not None]
        rows.append(
            {
                "reference_id": row["reference_id"], "score": row["score"],
                "similarity": similarity, "rank": None if best is None else ranks[best],
                "extraction_p": extraction_p, "extraction_decoys": extraction_decoys,
                "membership_p": membership_p, "membership_decoys": membership_decoys,
                "p": agreed_p(told) if told and caveat is None else None,
                "caveat": caveat or row["score_caveat"], "uncalibrated": problem, "control_similarity": control,
                "control_index": None if control is None else int(controlled_by[number]),
            }
        )  # fmt: skip
    return rows


def _p(value: float | None, of_decoys: np.ndarray, problem: str | None) -> tuple[float | None, int]:
    """The p of one reference's value among the decoys that have one, and how many they are."""
    decoys = of_decoys[np.isfinite(of_decoys)]
    if problem is not None or value is None or not np.isfinite(value) or len(decoys) < FEWEST:
        return None, len(decoys)
    values = np.array([value])
    p = float(rank_p(values, decoys)[0])
    return (float(tail_p(values, decoys)[0]) if p <= TAIL_SHARE else p), len(decoys)


def _whole(
    cosines: np.ndarray, of_decoys: np.ndarray, scores: np.ndarray, pairing: Paired, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a row of set_chances says beside its keys; of the references that count, what was drawn and membership."""
    decoys, problem = pairing.decoys, pairing.problem
    extraction_p, membership_p = (
        _set_p(mine, others, problem) for mine, others in ((cosines, of_decoys), (scores, decoys.scores))
    )
    told = [one for one in (extraction_p, membership_p) if one is not None]
    if problem is None and all(row["p"] is None for row in rows):
        problem = f"neither what was drawn nor membership can be compared with {FEWEST} decoys or more"
    return {
        "pictures": len(cosines), "decoys": len(decoys.cosines), "extraction_p": extraction_p,
        "membership_p": membership_p, "p": agreed_p(told) if told else None, "uncalibrated": problem,
    }  # fmt: skip


def _set_p(mine: np.ndarray, decoys: np.ndarray, problem: str | None) -> float | None:
    mine, decoys = mine[np.isfinite(mine)], decoys[np.isfinite(decoys)]
    return set_p(mine, decoys) if problem is None and len(mine) and len(decoys) >= FEWEST else None
