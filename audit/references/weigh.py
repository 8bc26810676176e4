"""How likely what speaks for each reference is by chance: a finished audit's references, among decoys.

Decoys are the pictures of the workspace's backgrounds that are of the kind of a set's references
(audit/references/decoys.py). Where there are none, or too few, nothing is said of that set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.evidence.chance import FEWEST, TAIL_SHARE, agreed_p, rank_p, set_p, tail_p
from audit.evidence.effort import WHOLE
from audit.references.control import ControlGenerations, by_fine_tuning, control_of, drawn_alone
from audit.references.decoys import Paired, caveat_of, questions_of
from audit.references.index import Bank, open_bank
from audit.references.index.known import Known
from audit.references.offer import ABOUT, BACKGROUND, ORDER, PICTURE, counting, on_offer, pairing_of
from audit.references.parts import Parts, best_of, open_parts, parts_of
from audit.references.silence import Rule
from audit.sampling.spooled import vectors_of
from audit.workspace import Workspace

WEIGHED = 'audits extractions "references" memberships control_generations'
_MEASURED = """m.score, m.caveat AS score_caveat, m.question
FROM "references" AS r LEFT JOIN memberships AS m
ON m.audit_id = ? AND m.reference_set = r.reference_set AND m.reference_id = r.reference_id
WHERE r.descriptor_name = ? AND """
BLOCK = 1024  # pictures at a time
KNOWN_GOOD = "the allow bank {} has a copy of it: it is known-good, and counts neither for nor against"
NOTED = 2000  # references of a set that have a row, where it has more: the nearest, and those known best


@dataclass(frozen=True)
class Weighed:
    """Rows of chances and set_chances."""

    chances: list[dict[str, Any]] = field(default_factory=list)
    set_chances: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Audit:
    """What is known of an audit: its row, its extractions as unit vectors [E, D] with their ranks, and its control
    generations.
    """

    row: dict[str, Any]
    seen: np.ndarray
    ranks: list[int]
    control: ControlGenerations


@dataclass(frozen=True)
class _Set:
    """The N references of a set: ``pictures``, and beside each its row of the ``bank`` and of ``parts``, the cosines to
    the nearest extraction and control generation, of the whole or the best part, its membership score (NaN: none),
    and whether it counts; and its rule.
    """

    pictures: pa.Table
    bank: Bank
    parts: Parts | None
    place: np.ndarray
    cosines: np.ndarray
    controls: np.ndarray
    scores: np.ndarray
    counts: np.ndarray
    rule: Rule

    def vectors(self, some: np.ndarray) -> np.ndarray:
        """Of ``some`` references, numbers [K], the whole and then the parts, unit float32 [K, 1 + P, D]."""
        rows = self.place[some]
        whole = np.asarray(self.bank.vectors[rows])[:, None]
        return np.concatenate([whole, self.parts.vectors[rows]], axis=1) if self.parts else whole


def weigh_in(
    connection: duckdb.DuckDBPyConnection,
    workspace: Workspace,
    audit_id: str,
    sets: Sequence[str],
    rules: dict[str, Rule],
) -> Weighed:
    """Weigh the references of ``sets`` by their ``rules``, over a connection that sees the tables of ``WEIGHED``.

    What is kept of large sets is with the ``workspace``.
    """

    def table(sql: str, *values: Any) -> pa.Table:
        return connection.sql(sql, params=list(values)).to_arrow_table()

    audit, found = _audit(table, connection, audit_id), Weighed()
    size, name_of = audit.row["size"], audit.row["descriptor"]
    backgrounds = table(f"SELECT {PICTURE}, {_MEASURED}{BACKGROUND}{ORDER}", audit_id, name_of)
    scores = _scores(backgrounds)
    offer = on_offer(backgrounds, size, *_cosines(backgrounds, audit), scores)
    serves = backgrounds["decoys_of"].to_pylist()
    questions = questions_of(
        lambda sql, values: table(sql, *values).to_pylist(), name_of, sets, Known(workspace.files.scratch)
    )
    for name in sets:
        pictures = table(f"SELECT {ABOUT}, {_MEASURED}r.reference_set = ?{ORDER}", audit_id, name_of, name)
        if not pictures.num_rows:
            continue
        bank = open_bank(connection, workspace, name, name_of)
        mine = _set(pictures, bank, open_parts(connection, bank, name, name_of), audit, rules[name])
        alike = replace(offer, scores=np.where(_measured_alike(backgrounds, pictures), scores, np.nan))
        pairing = pairing_of(name, bank, mine.parts, pictures, alike, serves, audit.row["threshold"], size)
        about = {"audit_id": audit_id, "reference_set": name}
        found.chances.extend({**about, **row} for row in _rows(mine, audit, pairing))
        found.set_chances.append(
            {**about, "question": questions.of[name], **_whole(mine, audit, pairing),
             "policy": rules[name].applied.as_text(),
             "backgrounds": pairing.backgrounds, "decoy_similarities": _finite(pairing.decoys.cosines),
             "decoy_scores": _finite(pairing.decoys.scores)}
        )  # fmt: skip
    return found


def _audit(table: Callable[..., pa.Table], connection: duckdb.DuckDBPyConnection, audit_id: str) -> _Audit:
    sql = "SELECT descriptor, threshold, coalesce(descriptor_size, 0) AS size FROM audits WHERE audit_id = ?"
    [row] = table(sql, audit_id).to_pylist()
    extractions = table("SELECT rank, descriptor FROM extractions WHERE audit_id = ? ORDER BY rank", audit_id)
    seen = vectors_of(extractions) if extractions.num_rows else np.empty((0, 0), np.float32)
    return _Audit(row, seen, extractions["rank"].to_pylist(), control_of(connection, audit_id))


def _set(pictures: pa.Table, bank: Bank, parts: Parts | None, audit: _Audit, rule: Rule) -> _Set:
    place = pc.index_in(pictures["reference_id"], value_set=bank.ids).to_numpy()
    best, control = (
        (np.fmax(bank.best(vectors), parts.best(vectors)) if parts else bank.best(vectors))[place]
        for vectors in (audit.seen, audit.control.vectors)
    )
    allowed = pc.is_in(pictures["reference_id"], value_set=pa.array(rule.allowed, pa.string()))
    counts = counting(pictures, audit.row["size"]) & ~allowed.to_numpy(zero_copy_only=False)
    return _Set(pictures, bank, parts, place, best, control, _scores(pictures), counts, rule)


def _finite(values: np.ndarray) -> list[float]:
    found: list[float] = values[np.isfinite(values)].astype(float).tolist()
    return found


def _cosines(table: pa.Table, audit: _Audit) -> tuple[np.ndarray, np.ndarray]:
    """[N] each: to the nearest extraction and control generation, of the whole or the best part; NaN without any."""
    vectors = vectors_of(table) if table.num_rows else np.empty((0, 0), np.float32)
    parts = parts_of(table)
    return best_of(vectors, parts, audit.seen), best_of(vectors, parts, audit.control.vectors)


def _scores(table: pa.Table) -> np.ndarray:
    """[N]; NaN for scores that are missing, or that something speaks against."""
    scores = table["score"].to_numpy(zero_copy_only=False).astype(float)
    return np.where(table["score_caveat"].is_null().to_numpy(zero_copy_only=False), scores, np.nan)


def _measured_alike(backgrounds: pa.Table, mine: pa.Table) -> np.ndarray:
    """Of which pictures of ``backgrounds`` the scores compare with those of ``mine``, booleans [N].

    Those that were measured for the same question, or with all noises, as ``mine`` were: a score of fewer noises is
    another one.
    """
    known = {_measured(one) for one in pc.unique(mine["question"]).to_pylist()}
    return np.array([_measured(one) in known for one in backgrounds["question"].to_pylist()], bool)


def _measured(question: str | None) -> str | None:
    return WHOLE if question and question.startswith(WHOLE) else question


def _noted(mine: _Set, threshold: float) -> np.ndarray:
    """The numbers of the references that have a row: all of a small set."""
    number = len(mine.place)
    if number <= NOTED:
        return np.arange(number)
    drawn = by_fine_tuning(mine.cosines, mine.controls, threshold)
    chosen = []
    for values in (drawn, mine.scores):
        values = np.where(mine.counts & np.isfinite(values), values, -np.inf)
        best = np.argpartition(values, -NOTED // 2)[-NOTED // 2 :]
        chosen.append(best[np.isfinite(values[best])])
    return np.unique(np.concatenate(chosen))


def _rows(mine: _Set, audit: _Audit, pairing: Paired) -> Iterator[dict[str, Any]]:
    decoys, problem, threshold = pairing.decoys, pairing.problem, mine.rule.control_threshold
    noted = _noted(mine, threshold)
    for start in range(0, len(noted), BLOCK):
        some = noted[start : start + BLOCK]
        vectors = mine.vectors(some)
        controls, controlled_by = _controlled(vectors, audit)
        by_part = vectors @ audit.seen.T if len(audit.seen) else np.full((len(some), 1, 0), np.nan)
        cosines = by_part.max(axis=1)
        alone = drawn_alone(cosines.max(axis=1, initial=-1.0), controls, threshold)
        rows = mine.pictures.drop_columns(["look"]).take(pa.array(some)).to_pylist()
        for number, (row, score) in enumerate(zip(rows, mine.scores[some], strict=True)):
            best = int(cosines[number].argmax()) if len(audit.seen) else None
            similarity = None if best is None else float(cosines[number, best])
            part = 0 if best is None else int(by_part[number, :, best].argmax())
            bank = mine.rule.allowed.get(row["reference_id"])
            caveat = KNOWN_GOOD.format(bank) if bank else caveat_of(row, audit.row["size"])
            extraction_p, extraction_decoys = _p(similarity, decoys.cosines, problem)
            extraction_p = 1.0 if alone[number] and extraction_p is not None else extraction_p
            control = float(controls[number]) if np.isfinite(controls[number]) else None
            membership_p, membership_decoys = _p(float(score), decoys.scores, problem)
            told = [one for one in (extraction_p, membership_p) if one is not None]
            yield {
                "reference_id": row["reference_id"], "score": row["score"],
                "similarity": similarity, "rank": None if best is None else audit.ranks[best],
                "extraction_p": extraction_p, "extraction_decoys": extraction_decoys,
                "membership_p": membership_p, "membership_decoys": membership_decoys,
                "p": agreed_p(told) if told and caveat is None else None,
                "caveat": caveat or row["score_caveat"], "uncalibrated": problem, "control_similarity": control,
                "control_index": None if control is None else int(controlled_by[number]),
                "part": list(mine.parts.boxes[part - 1]) if mine.parts and part else None,
            }  # fmt: skip


def _controlled(vectors: np.ndarray, audit: _Audit) -> tuple[np.ndarray, np.ndarray]:
    """For the whole and the parts of references [N, 1 + P, D] the highest cosine [N] to a control generation, NaN
    without any, and which has it [N].
    """
    number, each, width = vectors.shape
    cosines, which = (one.reshape(number, each) for one in audit.control.nearest(vectors.reshape(-1, width)))
    best = np.where(np.isnan(cosines), -np.inf, cosines).argmax(axis=1)
    return cosines[np.arange(number), best], which[np.arange(number), best]


def _p(value: float | None, of_decoys: np.ndarray, problem: str | None) -> tuple[float | None, int]:
    """The p of one reference's value among the decoys that have one, and how many they are."""
    decoys = of_decoys[np.isfinite(of_decoys)]
    if problem is not None or value is None or not np.isfinite(value) or len(decoys) < FEWEST:
        return None, len(decoys)
    values = np.array([value])
    p = float(rank_p(values, decoys)[0])
    return (float(tail_p(values, decoys)[0]) if p <= TAIL_SHARE else p), len(decoys)


def _whole(mine: _Set, audit: _Audit, pairing: Paired) -> dict[str, Any]:
    """What a row of set_chances says beside its keys; of the references that count, what was drawn and membership.

    References and decoys that the base alone draws as well have the least cosine, so that a set without a part has no
    higher ranks than its decoys.
    """
    decoys, problem, threshold = pairing.decoys, pairing.problem, mine.rule.control_threshold
    of_decoys = by_fine_tuning(decoys.cosines, decoys.controls, threshold)
    drawn = by_fine_tuning(mine.cosines, mine.controls, threshold)[mine.counts]
    scores = mine.scores[mine.counts]
    kinds = ((drawn, of_decoys), (scores, decoys.scores))
    extraction_p, membership_p = (_set_p(own, others, problem) for own, others in kinds)
    told = [one for one in (extraction_p, membership_p) if one is not None]
    compared = np.zeros(len(drawn), bool)
    for own, others in kinds:
        compared |= np.isfinite(own) & (problem is None and np.isfinite(others).sum() >= FEWEST)
    if problem is None and not compared.any():
        problem = f"neither what was drawn nor membership can be compared with {FEWEST} decoys or more"
    return {
        "pictures": len(drawn), "compared": int(compared.sum()), "decoys": len(decoys.cosines),
        "extraction_p": extraction_p, "membership_p": membership_p, "p": agreed_p(told) if told else None,
        "uncalibrated": problem,
    }  # fmt: skip


def _set_p(mine: np.ndarray, decoys: np.ndarray, problem: str | None) -> float | None:
    mine, decoys = mine[np.isfinite(mine)], decoys[np.isfinite(decoys)]
    return set_p(mine, decoys) if problem is None and len(mine) and len(decoys) >= FEWEST else None
