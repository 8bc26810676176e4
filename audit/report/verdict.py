"""The verdict of a question: what is said of the references and sets that were asked about. It is made here alone.

By the rules "calibrated" and "either" it follows from decoys, at an error rate; by "fixed" from the descriptor's
threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from audit.config import Rule, VerdictSettings
from audit.evidence.chance import FEWEST
from audit.references.policy import Applied
from audit.report.chance import Chance, Pairing, SetChance
from audit.report.policies import by_policies
from audit.report.possible import possible_by_threshold
from audit.sampling.pictures import NOT_SAMPLED
from audit.states import Verdict

NOT_CLEAN = (
    "That does not show that they were not used: most training pictures do not come out of a model, and few are known "
    "by it well enough to be told."
)


ONE_IS_ENOUGH = (
    "One kind of evidence is enough by the rule that was asked for (--rule either): what was drawn from the model, or "
    "what it knows. That rests on the declaration that decoys and references are a random split of one collection "
    "(--drawn). Where they are not, pictures that only look like what the model was trained on are accused."
)


BY_EXTRACTION_ALONE = (
    " It rests on what was drawn alone: what the model knows of the set was not measured, or of too few decoys, and "
    "nothing else bears it out."
)


@dataclass(frozen=True)
class Found:
    """A reference that is a match, possible, or alike: with the extraction nearest to it, and its chances.

    ``control_similarity`` is how near the base alone comes to it, ``allowed_by`` the allow bank that silenced it, and
    ``metadata`` what its set's input says of it. ``part`` is the box of the nearest part, None: the whole is nearest;
    ``by_part``: the part alone is alike.
    """

    reference_set: str
    reference_id: str
    name: str
    similarity: float | None
    pdq_distance: int | None
    evidence: str
    rank: int | None
    score: float | None = None
    p: float | None = None
    fdr: float | None = None
    alone_fdr: float | None = None
    expected: float | None = None
    control_similarity: float | None = None
    allowed_by: str | None = None
    metadata: Any = None
    part: list[float] | None = None
    by_part: bool = False


@dataclass(frozen=True)
class Unanswered:
    """A set of which nothing can be said with an error rate, and why."""

    reference_set: str
    reason: str


@dataclass(frozen=True)
class Alike:
    """References that the fixed threshold would call a match, and those too small for it or alike by a part.

    ``common`` are those that reach it, and that the base alone draws as well, ``silenced`` those that an allow bank
    has a copy of.
    """

    large: list[Found]
    small: list[Found]
    common: list[Found] = field(default_factory=list)
    silenced: list[Found] = field(default_factory=list)


@dataclass(frozen=True)
class QuestionVerdict:
    """What is said: match, possible, none or uncalibrated; None where nothing was asked, or the audit tells nothing.

    ``matched`` and ``possible`` are references, ``matched_sets`` whole sets, ``alike`` what the fixed threshold would
    call a match, ``common`` what it would if the base alone did not draw it as well, ``unanswered`` sets without a
    verdict; ``compared`` references have a p, and ``expected`` of those that match would be so by chance.
    ``by_extraction_alone`` says how many of those that match by both kinds of evidence had but what was drawn, by the
    reason why. ``silenced`` are alike and known-good, ``applied`` is what sets were matched by. ``rate`` is None by the
    fixed rule: it is not known.
    """

    said: Verdict | None
    rule: Rule
    rate: float | None
    sets: list[str]
    references: int
    threshold: float
    compared: int = 0
    expected: float = 0.0
    matched: list[Found] = field(default_factory=list)
    possible: list[Found] = field(default_factory=list)
    alike: list[Found] = field(default_factory=list)
    matched_sets: list[SetChance] = field(default_factory=list)
    possible_sets: list[SetChance] = field(default_factory=list)
    unanswered: list[Unanswered] = field(default_factory=list)
    tells_nothing: str | None = None
    warnings: list[str] = field(default_factory=list)
    common: list[Found] = field(default_factory=list)
    by_extraction_alone: dict[str, int] = field(default_factory=dict)
    silenced: list[Found] = field(default_factory=list)
    applied: dict[str, Applied] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """One line, with its denominator."""
        return _headline(self)

    @property
    def explanation(self) -> list[str]:
        """Sentences: what the headline rests on, how often such a one is wrong, and what it does not say."""
        return list(_explained(self))

    def label(self, reference_id: str, rank: int, similar: bool) -> str:
        """What is said of an extraction and a reference; ``similar``: it is alike by the fixed threshold."""
        for said, some in ((Verdict.match, self.matched), (Verdict.possible, self.possible)):
            if any(one.reference_id == reference_id and (similar or one.rank == rank) for one in some):
                return said
        if any((one.reference_id, one.rank) == (reference_id, rank) for one in self.silenced):
            return "known-good"
        return "looks alike" if similar and self.rule is not Rule.fixed else "no match"

    def as_json(self) -> dict[str, Any]:
        """Plain values for scripts, without the references themselves."""
        return {
            "said": self.said, "rule": self.rule, "rate": self.rate, "headline": self.headline,
            "explanation": self.explanation, "compared": self.compared, "expected": self.expected,
            "matched_sets": [one.as_json() for one in self.matched_sets],
            "possible_sets": [one.as_json() for one in self.possible_sets],
            "unanswered": [asdict(one) for one in self.unanswered], "warnings": self.warnings,
        }  # fmt: skip


@dataclass(frozen=True)
class Evidenced:
    """All that a verdict is made of, as the tables have it; ``unnamed`` references were compared and have no chance of
    their own here.
    """

    sets: Sequence[str]
    references: int
    threshold: float
    alike: Alike
    chances: Sequence[Chance]
    set_chances: Sequence[SetChance]
    pairings: Sequence[Pairing]
    tells_nothing: str | None
    unnamed: int = 0
    applied: dict[str, Applied] = field(default_factory=dict)


def verdict_of(found: Evidenced, asked: VerdictSettings) -> QuestionVerdict:
    """The verdict of a question by the rule and at the rate that are ``asked`` for."""
    said = (_fixed if asked.rule is Rule.fixed else _among_decoys)(found, asked)
    return replace(said, silenced=found.alike.silenced, applied=found.applied)


def _fixed(found: Evidenced, asked: VerdictSettings) -> QuestionVerdict:
    large, small = found.alike.large, found.alike.small
    tells_nothing = None if large else found.tells_nothing
    said: Verdict | None = Verdict.possible if small else Verdict.none
    if large:
        said = Verdict.match
    elif tells_nothing or not found.sets:
        said = None
    return QuestionVerdict(
        said, asked.rule, None, list(found.sets), found.references, found.threshold, matched=large, possible=small,
        alike=large, tells_nothing=tells_nothing, common=found.alike.common,
    )  # fmt: skip


def _among_decoys(found: Evidenced, asked: VerdictSettings) -> QuestionVerdict:
    told = [one for one in found.chances if one.p is not None]
    matched = [one for one in told if one.verdict is Verdict.match]
    possible = [one for one in told if one.verdict is Verdict.possible]
    matched_sets, possible_sets = (
        [one for one in found.set_chances if one.verdict is said] for said in (Verdict.match, Verdict.possible)
    )
    weighed = {one.reference_set: one.uncalibrated for one in found.set_chances}
    late = "it was not compared with its decoys as they are now: 'lora-audit match --references NAME' does it"
    reasons = {name: weighed.get(name, late) for name in found.sets}
    unanswered = [Unanswered(name, reason) for name, reason in reasons.items() if reason]
    silent = None if found.tells_nothing == NOT_SAMPLED else found.tells_nothing  # membership alone tells something
    tells_nothing = None if matched or matched_sets else silent
    said: Verdict | None = Verdict.possible if possible or possible_sets else Verdict.none
    if matched or matched_sets:
        said = Verdict.match
    elif tells_nothing or not found.sets:
        said = None
    elif unanswered:
        said = Verdict.uncalibrated
    return QuestionVerdict(
        said, asked.rule, asked.fdr, list(found.sets), found.references, found.threshold, len(told) + found.unnamed,
        max((one.expected or 0.0 for one in matched), default=0.0),
        [_plain(one, found.alike) for one in matched], [_plain(one, found.alike) for one in possible],
        found.alike.large, matched_sets, possible_sets, unanswered, tells_nothing, list(_warnings(found.pairings)),
        found.alike.common,
        dict(Counter(_not_known(one) for one in matched if one.membership_p is None)),
    )  # fmt: skip


def _not_known(one: Chance) -> str:
    """Why nothing follows from what the model knows of a reference that has a p."""
    if one.score is None:
        return "what the model knows of them was not measured"
    if one.caveat:
        return "their membership scores do not count, for what stands beside them below"
    return (
        f"{one.membership_decoys} decoys have a membership score that compares with theirs, and {FEWEST} is the least "
        "(--membership-evaluations takes more)"
    )


def _plain(one: Chance, alike: Alike) -> Found:
    near = {other.reference_id: other for other in alike.large + alike.small}.get(one.reference_id)
    return Found(
        one.reference_set, one.reference_id, one.name, one.similarity, near.pdq_distance if near else None,
        near.evidence if near else "none", one.rank, one.score, one.p, one.fdr, one.alone_fdr,
        one.expected, one.control_similarity, metadata=near.metadata if near else None, part=one.part,
    )  # fmt: skip


def _warnings(pairings: Sequence[Pairing]) -> list[str]:
    """Decoys that may have been trained on themselves, each once."""
    names = {f"{one.background}: {name}" for one in pairings for name in one.suspects}
    if not names:
        return []
    return [
        f"{len(names)} of the decoys stand out so far that the model may have been trained on them: "
        f"{', '.join(sorted(names))}. They are kept, and can only hide matches; where you know that they were trained "
        "on, leave them out of the background and add it again."
    ]


def _assumed(rule: Rule) -> str:
    """What the error rate rests on."""
    if rule is Rule.either:
        return "decoys and references are a random split of one collection, as was declared"
    return "the decoys are of the references' kind"


def _known(one: SetChance, rule: Rule) -> str:
    """What was seen of a set that matches: of either kind of evidence, it can have been measured, or not."""
    drawn, known = "are nearer to what was drawn from the model", "known by it better"
    if one.membership_p is None:
        return drawn
    if one.extraction_p is None:
        return f"are {known}"
    return f"{drawn}, {'or' if rule is Rule.either else 'and'} {known},"


def _of(count: int, whole: int, noun: str) -> str:
    return f"{count} of your {whole} {noun}{'s' if whole != 1 else ''}"


def _share(rate: float) -> str:
    return f"{100 * rate:.3g}"


def _headline(verdict: QuestionVerdict) -> str:
    pictures, many = len(verdict.matched), len(verdict.matched) != 1
    if pictures and verdict.rule is Rule.fixed:
        told = "were recovered from this model" if many else "was recovered from this model"
        return f"{_of(pictures, verdict.references, 'reference picture')} {told}, by a fixed threshold."
    if pictures:
        told = "match" if many else "matches"
        what = f"{_of(pictures, verdict.references, 'reference picture')} {told}"
        return f"{what}: the evidence says the model was trained on {'them' if many else 'it'}, or on near copies."
    if verdict.matched_sets:
        names = ", ".join(one.reference_set for one in verdict.matched_sets)
        many, p = len(verdict.matched_sets) != 1, ", ".join(f"{one.p:.2g}" for one in verdict.matched_sets)
        return f"The set{'s' if many else ''} {names} as a whole had a part in the training of this model (p = {p})."
    if verdict.tells_nothing:
        return "This audit tells nothing."
    if not verdict.sets:
        return "Not compared with any reference set."
    if verdict.said is Verdict.uncalibrated:
        names = ", ".join(one.reference_set for one in verdict.unanswered)
        return f"No verdict with an error rate can be given on {names}."
    if verdict.said is Verdict.possible and not verdict.possible:
        return "No match; a set as a whole possibly had a part in the training of this model."
    if verdict.said is Verdict.possible:
        return f"{_of(len(verdict.possible), verdict.references, 'reference picture')} possible, none a match."
    whole = f"{verdict.references} reference picture{'s' if verdict.references != 1 else ''}"
    return f"None of your {whole} is a match."


def _explained(verdict: QuestionVerdict) -> list[str]:
    if not verdict.sets:
        return ["Compare it with pictures of your own: lora-audit scan ... --references FOLDER --background DECOYS."]
    if verdict.tells_nothing:
        return [f"{verdict.tells_nothing}. Nothing follows from no match being found in it."]
    said = _by_threshold(verdict) if verdict.rule is Rule.fixed else _by_decoys(verdict)
    came_out = [one.allowed_by or "" for one in verdict.silenced]
    return (
        said
        + _drawn_alone(verdict)
        + list(by_policies(verdict.applied, verdict.references, verdict.threshold, came_out))
    )


def _drawn_alone(verdict: QuestionVerdict) -> list[str]:
    count = len(verdict.common)
    if not count:
        return []
    what = "it is a picture" if count == 1 else "they are pictures"
    return [
        f"{_of(count, verdict.references, 'reference picture')} came out, and the base model alone, without any "
        f"fine-tuning, draws {'it' if count == 1 else 'them'} as well: {what} that the base knows, or of a common "
        f"motif. That {'it' if count == 1 else 'they'} came out says nothing, and is no match."
    ]


def _by_threshold(verdict: QuestionVerdict) -> list[str]:
    reach = f"similarity {verdict.threshold:.2f}, the descriptor's fixed threshold"
    said = [f"What was drawn from the model, without showing it any reference, counts where it reaches {reach}."]
    by_part = sum(one.by_part for one in verdict.possible)
    said += possible_by_threshold(len(verdict.possible) - by_part, by_part)
    said.append(
        "How often this rule is wrong is not known (--rule fixed). With decoys, --rule calibrated gives a verdict with "
        "an error rate."
    )
    return [*said, NOT_CLEAN] if verdict.said is not Verdict.match else said


def _by_decoys(verdict: QuestionVerdict) -> list[str]:
    share = _share(verdict.rate or 0)
    said: list[str] = [ONE_IS_ENOUGH] if verdict.rule is Rule.either and verdict.compared else []
    if verdict.matched:
        said.append(
            f"Of 100 such matches, at most {share} are wrong on average, if {_assumed(verdict.rule)}; of "
            f"the {verdict.compared} references compared, {verdict.expected:.2g} would come out so by chance."
        )
    for reason, count in verdict.by_extraction_alone.items() if verdict.rule is Rule.calibrated else ():
        said.append(
            f"{count} of these matches rest{'s' if count == 1 else ''} on what was drawn from the model alone: "
            f"{reason}. Nothing else bears it out; otherwise a match takes both kinds of evidence."
        )
    for one in verdict.matched_sets:
        said.append(
            f"{one.pictures} pictures of the set {one.reference_set} {_known(one, verdict.rule)} than {one.decoys} "
            f"decoys; so much comes about by chance with p = {one.p:.2g}. Of 100 such verdicts on sets, at most "
            f"{share} are wrong on average. It says of no single picture that it was trained on."
            + (BY_EXTRACTION_ALONE if one.membership_p is None and verdict.rule is Rule.calibrated else "")
        )
    if verdict.possible or verdict.possible_sets:
        count = len(verdict.possible) + len(verdict.possible_sets)
        said.append(
            f"{count} possible: as much comes about by chance in one of 20 cases at most (p of 0.05 or less), which is "
            "too often for a match among so many"
            + ("." if verdict.rule is Rule.either else "; or only one kind of evidence speaks for it.")
        )
    alone = sum(one.alone_fdr is not None and one.alone_fdr <= (verdict.rate or 0) for one in verdict.possible)
    if alone and verdict.rule is Rule.calibrated:
        said.append(
            f"{alone} of these would be a match by one kind of evidence alone, at the same error rate. That is not "
            "enough: what the model knows and does not draw may be another version of what it was trained on."
        )
    for reason in dict.fromkeys(one.reason for one in verdict.unanswered):
        names = ", ".join(one.reference_set for one in verdict.unanswered if one.reason == reason)
        said.append(f"Of {names} nothing is said, neither for nor against: {reason}.")
    if verdict.said in (Verdict.none, Verdict.possible):
        said.append(
            f"At an error rate of {share} %, {verdict.compared} of {verdict.references} were compared with decoys. "
            + NOT_CLEAN
        )
    called = {one.reference_id for one in verdict.matched}
    alike = [one for one in verdict.alike if one.reference_id not in called]
    if alike:
        said.append(
            f"{len(alike)} of {verdict.references} look{'s' if len(alike) == 1 else ''} alike (similarity "
            f"{verdict.threshold:.2f} or more to what the model gave back). That is no verdict: how often it is chance "
            "is not known."
        )
    return said
