"""What a report advises: what would change what it says, and what to do next, in words that follow from its facts."""

from __future__ import annotations

import math

from audit.config import Evidence, Rule, Settings
from audit.evidence.chance import FEWEST, KINDS, TAIL_FEWEST
from audit.report.facts import AuditFacts
from audit.states import Verdict

GENTLE = 0.05  # change of the predictions up to which little comes out of a model


def would_change(facts: AuditFacts) -> list[str]:
    """What would make another verdict of this one, a sentence or two each."""
    if not facts.reference_sets:
        return []
    found = [*_decoys_lacking(facts), *_pictures_lacking(facts)]
    if facts.verdict.said is Verdict.match:
        found += [
            "A picture that the base model makes as well, from the same noise or the same caption, is no evidence: "
            "a match falls with it. " + _looked_for(facts),
            "A picture that is newer than the checkpoint cannot have been trained on: then its match is wrong, and so "
            "may others be.",
            "A second picture of the same motif, or a copy of it elsewhere, may be what the model was trained on.",
        ]
    elif not facts.verdict.tells_nothing:
        found.append("A picture that comes out of the model, or decoys that all score lower, would speak for a match.")
    return found


def _looked_for(facts: AuditFacts) -> str:
    if not facts.control_generations:
        return "That was not looked for (--control-share)."
    count = facts.control_generations
    return f"In {count} picture{'s' if count != 1 else ''} of it that were drawn, it makes none that matches here."


def next_steps(facts: AuditFacts) -> list[str]:
    """What to do next, the most useful first."""
    if facts.verdict.tells_nothing and facts.row["images"]:
        return ["Find the base model that the file was trained on, and audit it again with it: nothing here holds."]
    found = []
    if facts.verdict.said is Verdict.match:
        found.append(
            "Look at each match beside the original in full size, and write down where and since when the original can "
            "be seen. Keep the audited file: its SHA256 stands below."
        )
    found += _more_evidence(facts)
    found += _better_sampling(facts)
    if not found:
        found.append("Nothing that is set stands in the way of finding more. That is no proof that nothing is there.")
    return found


def _decoys_lacking(facts: AuditFacts) -> list[str]:
    """Where so few decoys are compared with that no single picture can be a match among so many references."""
    told = [one for one in facts.chances if one.p is not None]
    if not told or facts.verdict.matched:
        return []
    rate = facts.asked.fdr / (KINDS if facts.asked.rule is Rule.either else 1)
    asked, decoys = len(told), max(max(one.extraction_decoys, one.membership_decoys) for one in told)
    needed, few = math.ceil(round(asked / rate, 6)) - 1, math.floor(round(rate * (1 + decoys), 6))
    if decoys >= min(needed, TAIL_FEWEST):
        return []
    return [
        f"More decoys. Among {decoys} no p is below {facts.asked.fdr / rate / (1 + decoys):.2g}, and one picture of "
        f"{asked} is a match by itself from p = {facts.asked.fdr / asked:.2g} on: that takes "
        f"{min(needed, TAIL_FEWEST)} decoys or more."
        + (f" Or ask about {few} picture{'s' if few != 1 else ''} at most." if few else "")
    ]


def _pictures_lacking(facts: AuditFacts) -> list[str]:
    small = sum(one.caveat is not None for one in facts.chances)
    if not small:
        return []
    does = "s do not count, as they are" if small != 1 else " does not count, as it is"
    return [f"Larger originals: {small} picture{does} too small, or with too little in it to be told from others."]


def _more_evidence(facts: AuditFacts) -> list[str]:
    asked_for = facts.settings.get("evidence")
    found = [f"Measure what the model knows of {one.reference_set}: {one.reason}." for one in facts.unmeasured]
    few = [one for one in facts.chances if one.score is not None and one.membership_p is None and not one.caveat]
    if any(one.uncalibrated is None and one.membership_decoys < FEWEST for one in few):
        found.append(
            "Measure what the model knows of more decoys (--membership-evaluations, and scan again): of too few there "
            "is a score that compares with the references'."
        )
    if asked_for == Evidence.membership:
        found.append("Sample the model, too (--evidence both): a picture that comes out of it says more than a score.")
    if facts.reference_sets and not facts.decoys:
        found.append(
            "Gather decoys: pictures of the same hand, subject or source that are newer than the checkpoint, a hundred "
            "or more, and scan again with --background FOLDER."
        )
    return found


def _better_sampling(facts: AuditFacts) -> list[str]:
    row, settings, found = facts.row, facts.settings, []
    if not row["images"]:
        return []
    if any("of family" in one for one in row["warnings"]):
        found.append("Check the base model: file and base are of different families, as is said above.")
    if any(one["source"] == "default" for one in facts.captions):
        found.append(
            "Give a caption that it was trained with (--caption), or let captions be recovered from the model "
            "(--captions auto): without one less is found."
        )
    if any(one["truncated"] for one in facts.captions):
        found.append("Give shorter captions: the text encoder has not seen the end of one.")
    if row["training_images_source"] == "default":
        found.append(
            f"Say how many pictures it was trained on, if that is known (--n0): {row['training_images']} are assumed."
        )
    usual = Settings()
    for name, what in (("images_per_training_image", "images of a training picture"), ("steps", "solver steps")):
        value, default = settings.get(name), getattr(usual, name)
        if isinstance(value, int) and value < default:
            option = "--" + name.replace("_", "-")
            found.append(f"Sample more: {value} {what} are few, {default} are usual ({option}).")
    if row["prediction_change"] < GENTLE and facts.verdict.said is not Verdict.match:
        found.append(
            f"Go by membership rather than by what was drawn: fine-tuning has changed the answers by "
            f"{row['prediction_change']:.1%} only, and of so gentle a change little comes out."
        )
    return found
