"""Everything a report says about one audit, read back from the workspace's tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import duckdb

from audit.config import VerdictSettings
from audit.custody.keep import KeptHashes
from audit.custody.record import Record, SetHashes, record_of
from audit.descriptors.pdq import MATCH_DISTANCE
from audit.errors import WorkspaceError
from audit.references.decoys import Questions, questions_of
from audit.references.index.known import Known
from audit.references.inputs.metadata import plain
from audit.references.parts import frame_of, place_of
from audit.references.policy import Applied
from audit.report.chance import Chance, Pairing, SetChance, chances_of, pairings_of, set_chances_of, unnamed
from audit.report.control import DrawnAlone, drawn_alone_of
from audit.report.estimates import Estimates, estimates_of
from audit.report.membership import Denoised, Member, Unmeasured, denoised_of, members_of, unmeasured_of
from audit.report.policies import applied_of
from audit.report.references import Reference, references_of
from audit.report.verdict import Alike, Evidenced, Found, QuestionVerdict, verdict_of
from audit.states import Verdict
from audit.workspace import Workspace

WHOLE_ID = 32  # hex digits
_TABLES = (
    'audits checkpoints matches "references" extractions evaluations passed_over generations memberships latents '
    "chances set_chances denoised control_generations recoveries"
)

NOT_TOLD = ("thumbnail", "frame")  # to scripts


@dataclass(frozen=True)
class Match:
    """One reference near an extraction, with both similarities; its verdict is the fixed threshold's.

    ``control_similarity`` is that to what the base alone draws, None without control generations. It is alike
    ``alike_from`` a similarity, and by PDQ up to ``pdq_limit`` bits; ``allowed_by`` is the allow bank that has silenced
    it, ``metadata`` what the set's input says of it, plain values. ``inliers``, ``coverage`` and ``mirrored`` are what
    a second look found (audit/references/second_look.py), None without one;
    ``normalized_similarity`` is beside what the extraction has in common with decoys, None where there are too few.
    """

    reference_set: str
    reference_id: str
    name: str
    similarity: float
    pdq_distance: int | None
    verdict: str
    evidence: str
    thumbnail: bytes | None
    control_similarity: float | None = None
    allowed_by: str | None = None
    alike_from: float = 0.0
    pdq_limit: int = MATCH_DISTANCE
    metadata: Any = None
    inliers: int | None = None
    coverage: float | None = None
    mirrored: bool | None = None
    normalized_similarity: float | None = None
    part: list[float] | None = None
    whole_similarity: float | None = None
    frame: str | None = None

    def is_drawn_alone(self, threshold: float) -> bool:
        """Whether it is alike by the fixed threshold, and no match as the base alone draws it as well."""
        control = self.control_similarity
        if self.is_match:  # by the whole, to which no control generation is as near
            return False
        return control is not None and self.is_alike and control >= min(self.alike_from, threshold)

    @property
    def by_part(self) -> bool:
        """Whether it is alike by a part, and not by the whole."""
        return self.part is not None and self.is_alike and (self.whole_similarity or -1.0) < self.alike_from

    @property
    def place(self) -> str | None:
        """Its part in words."""
        return place_of(self.part) if self.part else None

    @property
    def is_alike(self) -> bool:
        """Whether it reaches the set's own threshold, or else the descriptor's."""
        return self.similarity >= self.alike_from

    @property
    def is_match(self) -> bool:
        """Whether it is alike by the fixed threshold."""
        return self.verdict == Verdict.match


@dataclass(frozen=True)
class Extraction:
    """One extraction, and its nearest references, the nearest first."""

    rank: int
    confidence: float
    size: int
    tightness: float
    image: bytes | None
    matches: list[Match]


@dataclass(frozen=True)
class PassedOver:
    """A file of a set's folder that was not compared, and why."""

    reference_set: str
    name: str
    reason: str


@dataclass(frozen=True)
class AuditFacts:
    """One finished audit and one question: which of the pictures in ``reference_sets`` were recovered.

    ``row`` is its line of the audits table; ``pictures`` says how many the sets have, one in several sets once, and
    ``references`` are they, of large sets those that came nearest;
    ``guidance_weights`` are those that its images were sampled with, none where sampling was direct. ``members`` are
    the references with their membership scores, ``unmeasured`` the sets that have none; ``chances`` are the
    references with their error rates, ``set_chances`` whole sets, ``pairings`` the backgrounds that decoys are of.
    ``verdict`` is what follows by the rule and at the rate that were ``asked`` for; ``questions`` tell the sets and
    decoys that it is about from others under the same names. ``denoised`` are pictures of membership, and ``decoys``
    what the decoys of each set have: cosines to the nearest extraction, and membership scores. ``estimates`` stand in
    for what nobody knows, and ``record`` has the hashes of all of it. ``control_generations`` says how many pictures of
    the base alone there are, of which ``drawn_alone`` are those that are as near to a reference as what came out.
    """

    row: dict[str, Any]
    checkpoint: dict[str, Any]
    captions: list[dict[str, Any]]
    extractions: list[Extraction]
    evaluations: list[dict[str, Any]]
    reference_sets: list[str]
    pictures: int
    references: list[Reference]
    passed_over: list[PassedOver]
    questions: Questions
    asked: VerdictSettings
    verdict: QuestionVerdict
    guidance_weights: list[float] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    unmeasured: list[Unmeasured] = field(default_factory=list)
    chances: list[Chance] = field(default_factory=list)
    set_chances: list[SetChance] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)
    denoised: list[Denoised] = field(default_factory=list)
    decoys: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    estimates: Estimates = field(default_factory=Estimates)
    record: Record = field(default_factory=lambda: Record({}, {}, []))
    control_generations: int = 0
    drawn_alone: list[DrawnAlone] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it ran under."""
        return json.loads(self.row["settings"])

    def as_json(self) -> dict[str, Any]:
        """Plain values for scripts: everything but pictures and vectors."""
        row = {**self.row, "settings": self.settings, "versions": json.loads(self.row["versions"])}
        row["finished_at"] = self.row["finished_at"].isoformat()
        checkpoint = {
            name: value.isoformat() if isinstance(value, datetime) else value for name, value in self.checkpoint.items()
        } | {"claimed_metadata": json.loads(self.checkpoint["claimed_metadata"])}
        return {
            "audit": row,
            "checkpoint": checkpoint,
            "captions": self.captions,
            "estimates": self.estimates.as_json(),
            "reference_sets": self.reference_sets,
            "references": self.pictures,
            "verdict": self.verdict.as_json(),
            "matched_references": [vars(one) for one in self.verdict.matched],
            "possible_references": [vars(one) for one in self.verdict.possible],
            "alike_references": [vars(one) for one in self.verdict.alike],
            "common_references": [vars(one) for one in self.verdict.common],
            "silenced_references": [vars(one) for one in self.verdict.silenced],
            "policies": {name: asdict(one) for name, one in self.verdict.applied.items()},
            "control_generations": self.control_generations,
            "tells_nothing": self.verdict.tells_nothing,
            "passed_over": [vars(one) for one in self.passed_over],
            "extractions": [
                {"rank": extraction.rank, "confidence": extraction.confidence, "size": extraction.size,
                 "tightness": extraction.tightness,
                 "matches": [
                     {name: value for name, value in vars(match).items() if name not in NOT_TOLD}
                     | {"is_match": match.is_match}
                     for match in extraction.matches
                 ]}
                for extraction in self.extractions
            ],
            "evaluations": self.evaluations,
            "guidance_weights": self.guidance_weights,
            "memberships": [vars(one) for one in self.members],
            "unmeasured": [vars(one) for one in self.unmeasured],
            "chances": [vars(one) for one in self.chances],
            "set_chances": [one.as_json() for one in self.set_chances],
            "pairings": [vars(one) for one in self.pairings],
        }  # fmt: skip


def _alike(extractions: Sequence[Extraction], threshold: float) -> Alike:
    """Each picture that the fixed threshold speaks for, once, with the extraction nearest to it; nearest first."""
    best: dict[str, tuple[Extraction, Match]] = {}
    silenced: dict[str, Found] = {}
    for extraction in extractions:
        for match in extraction.matches:
            known = best.get(match.reference_id)
            if match.allowed_by is not None:
                if match.is_alike:
                    silenced.setdefault(match.reference_id, _found(extraction, match))
                continue
            if match.verdict == Verdict.none and not match.is_drawn_alone(threshold):
                continue
            order = match.is_match, match.similarity
            if known is None or (known[1].is_match, known[1].similarity) < order:
                best[match.reference_id] = (extraction, match)
    found: dict[str, list[Found]] = {Verdict.match: [], Verdict.possible: [], Verdict.none: []}
    for extraction, match in sorted(best.values(), key=lambda pair: -pair[1].similarity):
        found[match.verdict].append(_found(extraction, match))
    large, small, common = found.values()
    return Alike(large, small, common, list(silenced.values()))


def _found(extraction: Extraction, match: Match) -> Found:
    return Found(
        match.reference_set, match.reference_id, match.name, match.similarity, match.pdq_distance, match.evidence,
        extraction.rank, control_similarity=match.control_similarity, allowed_by=match.allowed_by,
        metadata=match.metadata, part=match.part, by_part=match.by_part,
    )  # fmt: skip


def find_audit(workspace: Workspace, beginning: str) -> str:
    """The id of the finished audit that starts with ``beginning``. Raises WorkspaceError for none or several."""
    rows = workspace.rows(
        "SELECT audit_id FROM audits WHERE starts_with(audit_id, ?) ORDER BY finished_at", [beginning]
    )
    if len(rows) == 1:
        return str(rows[0]["audit_id"])
    if rows:
        raise WorkspaceError(f"{len(rows)} audits start with {beginning!r}: give more of the id")
    raise no_audit(workspace, beginning)


def no_audit(workspace: Workspace, beginning: str) -> WorkspaceError:
    """What is said where there is no such audit."""
    return WorkspaceError(
        f"no finished audit starts with {beginning!r} in {workspace.files}: see 'lora-audit query \"SELECT audit_id, "
        "checkpoint_name FROM audits\"'"
    )


def collect(
    workspace: Workspace, audit_id: str, sets: Sequence[str] | None = None, asked: VerdictSettings | None = None,
    hashes: SetHashes | None = None,
) -> AuditFacts:  # fmt: skip
    """Read one finished audit back, as far as it concerns the reference ``sets``; None: all it was matched with.

    ``asked`` is what counts as a match. ``hashes`` are what manifests say of sets, for many audits in a row. Nothing
    of another set is in it. Raises WorkspaceError where there is no such audit.
    """
    if len(audit_id) < WHOLE_ID:
        audit_id = find_audit(workspace, audit_id)
    asked = asked or VerdictSettings()
    known = hashes or KeptHashes(workspace)
    return workspace.asked(lambda connection: _collected(connection, workspace, audit_id, sets, asked, known), _TABLES)


def _collected(
    connection: duckdb.DuckDBPyConnection, workspace: Workspace, audit_id: str, sets: Sequence[str] | None,
    asked: VerdictSettings, hashes: SetHashes,
) -> AuditFacts:  # fmt: skip
    """All of it from one view of the tables."""

    def ask(sql: str, parameters: list[Any]) -> list[dict[str, Any]]:
        return connection.sql(sql, params=parameters).to_arrow_table().to_pylist()

    if sets is None:
        rows = ask("SELECT DISTINCT reference_set FROM matches WHERE audit_id = ?", [audit_id])
        sets = [one["reference_set"] for one in rows]
    names = sorted(set(sets))
    found_rows = ask("SELECT * FROM audits WHERE audit_id = ?", [audit_id])
    if not found_rows:
        raise no_audit(workspace, audit_id)
    row = found_rows[0]
    checkpoint = ask("SELECT * FROM checkpoints WHERE checkpoint_sha256 = ?", [row["checkpoint_sha256"]])[0]
    captions = row.pop("captions")
    matches = ask(
        """SELECT m.*, r.name, r.thumbnail, r.metadata, r.width, r.height FROM matches AS m LEFT JOIN "references" AS r
        ON r.reference_set = m.reference_set AND r.reference_id = m.reference_id AND r.descriptor_name = ?
        WHERE m.audit_id = ? AND list_contains(?::VARCHAR[], m.reference_set)
        ORDER BY m.rank, m.similarity DESC, m.position""",
        [row["descriptor"], audit_id, names],
    )
    by_rank: dict[int, list[Match]] = {}
    applied = applied_of(ask, audit_id, names)
    for found in matches:
        rule = applied.get(found["reference_set"], Applied())
        match = Match(
            found["reference_set"], found["reference_id"], found["name"] or "(removed from the workspace)",
            found["similarity"], found["pdq_distance"],
            found["verdict"] or (Verdict.match if found["is_match"] else Verdict.none), found["evidence"],
            found["thumbnail"], found["control_similarity"], found["allowed_by"],
            row["threshold"] if rule.threshold is None else rule.threshold, rule.bits, plain(found["metadata"]),
            found["inliers"], found["coverage"], found["mirrored"],
            found["normalized_similarity"], found["part"], found["whole_similarity"],
            frame_of(found["part"], found["width"], found["height"]),
        )  # fmt: skip
        by_rank.setdefault(found["rank"], []).append(match)
    extractions = [
        Extraction(matches=by_rank.get(found["rank"], []), **found)
        for found in ask(
            "SELECT rank, confidence, size, tightness, image FROM extractions WHERE audit_id = ? ORDER BY rank",
            [audit_id],
        )
    ]
    evaluations = ask("SELECT * EXCLUDE (audit_id) FROM evaluations WHERE audit_id = ? ORDER BY kind DESC", [audit_id])
    passed = ask(
        """SELECT reference_set, name, reason FROM passed_over
        WHERE descriptor_name = ? AND list_contains(?::VARCHAR[], reference_set) ORDER BY ALL""",
        [row["descriptor"], names],
    )
    weights = ask("SELECT DISTINCT w FROM generations WHERE audit_id = ? AND w IS NOT NULL ORDER BY w", [audit_id])
    members = members_of(ask, audit_id, row["descriptor"], names)
    [control] = ask("SELECT count(*) AS n FROM control_generations WHERE audit_id = ?", [audit_id])
    settings = json.loads(row["settings"])
    questions = questions_of(ask, row["descriptor"], names, Known(workspace.files.scratch))
    pictures, references = references_of(ask, audit_id, row["descriptor"], names, questions)
    set_chances = set_chances_of(ask, audit_id, questions, asked)  # of others nothing is said: their decoys changed
    chances = chances_of(ask, audit_id, row["descriptor"], set_chances, asked)
    pairings = pairings_of(set_chances, questions)
    verdict = verdict_of(
        Evidenced(names, pictures, row["threshold"], _alike(extractions, row["threshold"]), chances,
                  set_chances, pairings, row["tells_nothing"], unnamed(ask, audit_id, set_chances), applied),
        asked,
    )  # fmt: skip
    return AuditFacts(
        row, checkpoint, captions, extractions, evaluations, names,
        pictures, references, [PassedOver(**one) for one in passed], questions, asked,
        verdict, [found["w"] for found in weights], members,
        unmeasured_of(ask, names, members, row["base_revision"], settings.get("resolution")),
        chances, set_chances, pairings, denoised_of(ask, audit_id, row["descriptor"], names),
        {one.reference_set: (one.decoy_similarities or [], one.decoy_scores or []) for one in set_chances},
        estimates_of(ask, audit_id, checkpoint["identity"], row["base_revision"], captions),
        record_of(connection, audit_id, names, hashes), control["n"],
        drawn_alone_of(ask, audit_id, row["descriptor"], verdict.common),
    )  # fmt: skip
