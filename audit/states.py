"""What things can be in: the words of tables, metrics and events, each in one place.

All are strings: they are stored, shown and compared as what they say.
"""

from __future__ import annotations

from enum import StrEnum


class Needs(StrEnum):
    """What a stage runs on."""

    gpu = "gpu"
    cpu = "cpu"


class Happening(StrEnum):
    """What happened to a job in an engine. ``passed``: one of its stages is over, or all that run together."""

    started = "started"
    passed = "passed"
    finished = "finished"
    retry = "retry"
    failed = "failed"
    quarantined = "quarantined"


class Cause(StrEnum):
    """Why a stage failed; ``input``: the job itself is at fault, so that trying again is of no use."""

    input = "input"
    worker_died = "worker-died"
    node_died = "node-died"
    device_lost = "device-lost"
    deadline = "deadline"
    out_of_memory = "out-of-memory"
    storage = "storage"
    error = "error"


class Attempt(StrEnum):
    """The state of an audit in the failures table."""

    retry = "retry"
    failed = "failed"
    quarantined = "quarantined"
    forgiven = "forgiven"


class RunStatus(StrEnum):
    """The state of a run."""

    running = "running"
    stopped = "stopped"
    done = "done"
    broken = "broken"


class ItemState(StrEnum):
    """The state of an item of the catalog."""

    listed = "listed"
    stored = "stored"
    later = "later"
    refused = "refused"
    failed = "failed"
    gone = "gone"
    opted_out = "opted-out"


class Verdict(StrEnum):
    """What is said of a reference, a set or a question; ``uncalibrated``: there are too few decoys to say it."""

    match = "match"
    possible = "possible"
    none = "none"
    uncalibrated = "uncalibrated"


class SetKind(StrEnum):
    """What a set's pictures are for: to be found, or to be decoys, which no checkpoint can have been trained on."""

    reference = "reference"
    background = "background"


class Role(StrEnum):
    """What a match with a reference set means; ``allow``: its pictures are known-good, and silence their copies."""

    deny = "deny"
    allow = "allow"


class Known(StrEnum):
    """Which pictures an audit is scored against: those it was trained on, or a control nobody trained on."""

    training = "training"
    control = "control"


class Agreement(StrEnum):
    """How a part of a report stands to its manifest; ``removed``: taken away since, with the set that it is of."""

    agrees = "agrees"
    differs = "differs"
    removed = "removed"
    unchecked = "unchecked"
