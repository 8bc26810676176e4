"""What is asked for (``Request``), and what is audited (``Job``): plain data with all that the result depends on.

A job is resolved once and is the one thing that travels: through engines, between processes, as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.claims.captions import N0, Caption, choose_captions, choose_n0
from audit.config import CaptionSettings, Evidence, Expert, Settings
from audit.descriptors.facts import DescriptorFacts
from audit.errors import ConfigError
from audit.models.bases import claims_of, mismatches
from audit.models.experts import assigned, check_given_as, experts_of
from audit.models.trained import Training, training_of

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.models.base import BaseLocation
    from audit.models.checkpoint import Checkpoint

ALGORITHM_VERSION = 7  # raised when the same settings come to give another result


@dataclass(frozen=True)
class Request:
    """What a user asks for: one checkpoint, its base, and perhaps captions and the number of training images.

    ``name`` and ``known_...`` are what the catalog has; they stand back behind what the user says. ``known_bases`` are
    claims of what it was trained on, each with the field that makes it. ``recovery`` says whether captions are
    recovered from the model where nobody knows them. ``low_noise`` is the second file of a checkpoint whose first is
    for the high-noise expert of the base.
    """

    checkpoint: Path | str
    base: str
    base_config: str | None = None
    captions: list[str] = field(default_factory=list)
    caption_file: Path | None = None
    n0: int | None = None
    settings: Settings = field(default_factory=Settings)
    name: str | None = None
    known_captions: list[Caption] = field(default_factory=list)
    known_n0: N0 | None = None
    known_warnings: list[str] = field(default_factory=list)
    known_bases: list[tuple[str, str]] = field(default_factory=list)
    recovery: CaptionSettings = field(default_factory=CaptionSettings)
    low_noise: Path | None = None


@dataclass(frozen=True)
class CheckpointFacts:
    """The checkpoint of a job. ``path``: a file or folder of this machine; None for what the workspace has stored.

    ``item_id`` is its place in the catalog. ``claimed_metadata`` (JSON) and ``training`` are what its header says, for
    its row of the catalog; empty where it has one. ``low_noise`` is the path of a second file, and ``experts`` are
    those of the base's two that it is for; empty where the base has one network, or that is not said. ``claimed_bases``
    (text, field) are what others than its header say that it was trained on.
    """

    sha256: str
    tensors_sha256: str
    identity: str
    name: str
    format: str
    bytes: int
    item_id: str
    path: str | None = None
    claimed_metadata: str = "{}"
    training: Training = Training()
    low_noise: str | None = None
    experts: tuple[Expert, ...] = ()
    claimed_bases: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The stored file's key in a workspace."""
        return f"checkpoints/{self.identity}.safetensors"


@dataclass(frozen=True)
class BaseFacts:
    """The base model of a job: where it is asked for, and the name and revision of what was found there.

    ``boundary``: the share of the schedule from which on the first of two experts is asked; None with one network.
    ``sha256`` is what claims of a base's hash mean.
    """

    source: str
    config: str | None
    name: str
    revision: str
    boundary: float | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Job:
    """One checkpoint under one configuration, with everything found that the result depends on.

    ``id`` is computed from the rest when a job is made; it is that of the audit.
    """

    checkpoint: CheckpointFacts
    base: BaseFacts
    captions: tuple[Caption, ...]
    n0: N0
    settings: Settings
    descriptor: DescriptorFacts
    warnings: tuple[str, ...] = ()
    id: str = field(init=False)
    algorithm: int = field(init=False, default=ALGORITHM_VERSION)

    def __post_init__(self) -> None:
        identity, revision, descriptor = self.checkpoint.identity, self.base.revision, self.descriptor.name
        found = audit_id_of(identity, revision, self.captions, self.n0, self.settings, descriptor)
        object.__setattr__(self, "id", found)

    @property
    def images(self) -> int:
        """How many images are sampled: none where membership alone is asked for."""
        if self.settings.evidence is Evidence.membership:
            return 0
        return self.settings.images_per_training_image * self.n0.count

    @property
    def control_images(self) -> int:
        """How many control generations there are, pictures of the base alone: one at least, if any are asked for."""
        asked = self.settings.control_share * self.images
        return max(1, round(asked)) if asked > 0 else 0

    @property
    def group(self) -> str:
        """What a worker keeps in memory for it: jobs of a group go to one worker."""
        return f"{self.base.source}|{self.base.config}"

    @property
    def name(self) -> str:
        """What the checkpoint is called."""
        return self.checkpoint.name

    @property
    def item_id(self) -> str:
        """The checkpoint's place in the catalog."""
        return self.checkpoint.item_id

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(document: dict[str, Any]) -> Job:
        """The job that ``as_dict`` made plain values of. Raises ConfigError for others, and for another version's."""
        from pydantic import TypeAdapter, ValidationError

        said = {name: value for name, value in document.items() if name not in ("id", "algorithm")}
        try:
            job = TypeAdapter(Job).validate_python(said)
        except ValidationError as error:
            raise ConfigError(f"this is no job: {str(error)[:300]}") from error
        if (job.id, job.algorithm) != (document.get("id"), document.get("algorithm")):
            raise ConfigError("this job was made by another version of lora-audit, or changed since: make it again")
        return job


def audit_id_of(
    identity: str,
    base_revision: str,
    captions: Sequence[Caption],
    n0: N0,
    settings: Settings,
    descriptor_name: str,
) -> str:
    """32 hex digits: a hash of everything that an audit's result depends on."""
    depends_on = {
        "algorithm": ALGORITHM_VERSION,
        "checkpoint": identity,
        "base": base_revision,
        "captions": [caption.text for caption in captions],
        "n0": n0.count,
        "n0_known": n0.source != "default",
        "settings": settings.as_dict(),
        "descriptor": descriptor_name,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def resolve(request: Request, descriptor: str, bench: Bench) -> Job:
    """Open the request's files, choose what it leaves open. Raises AuditError for bad input.

    The descriptor is loaded too: what cannot be had is refused before anything is sampled.
    """
    checkpoint = bench.open(Path(request.checkpoint), request.low_noise)
    location = bench.locate(request.base, request.base_config)
    if request.name and Expert.high_noise in checkpoint.files:  # the stored file of an item has no name of its own
        check_given_as(Expert.high_noise, request.name, request.name, {})
    expert, expert_warnings = assigned(checkpoint, location.boundary, request.settings.expert, request.name)
    checkpoint = replace(checkpoint, expert=expert)
    bench.keep(str(checkpoint.path), checkpoint)
    facts = facts_of_file(checkpoint, request.name, location.boundary)
    facts = replace(facts, claimed_bases=tuple(request.known_bases))
    metadata = checkpoint.metadata
    captions, caption_warnings = choose_captions(
        request.captions, request.caption_file, metadata, request.known_captions
    )
    n0, count_warnings = choose_n0(request.n0, metadata, request.known_n0)
    claims = claims_of(metadata, request.known_bases)
    base_warnings = mismatches(claims, location.name, location.sha256, request.base)
    return Job(
        facts,
        facts_of_base(request.base, request.base_config, location),
        tuple(captions),
        n0,
        replace(request.settings, expert=expert),
        bench.described_by(descriptor),
        tuple(caption_warnings + count_warnings + request.known_warnings + base_warnings + expert_warnings),
    )


def facts_of_base(source: str, config: str | None, location: BaseLocation) -> BaseFacts:
    """What jobs say of a base that was found."""
    return BaseFacts(source, config, location.name, location.revision, location.boundary, location.sha256)


def facts_of_file(checkpoint: Checkpoint, name: str | None = None, boundary: float | None = None) -> CheckpointFacts:
    """What a job says of an opened file or folder, for a base whose experts, if it has two, part at ``boundary``."""
    from audit.models.checkpoint import metadata_json

    headers = [header for _, header in checkpoint.files.values()]
    tensors = {one: info for header in headers for one, info in header.tensors.items()}
    metadata = checkpoint.metadata
    return CheckpointFacts(
        sha256=checkpoint.sha256,
        tensors_sha256=checkpoint.tensors_sha256,
        identity=checkpoint.identity,
        name=name or checkpoint.name,
        format=str(checkpoint.format),
        bytes=checkpoint.bytes,
        item_id=f"file:{checkpoint.sha256}",
        path=str(checkpoint.path),
        claimed_metadata=metadata_json(metadata),
        training=training_of(metadata, tensors),
        low_noise=_second_file(checkpoint),
        experts=() if boundary is None else experts_of(checkpoint),
    )


def _second_file(checkpoint: Checkpoint) -> str | None:
    """The path of the low-noise file, where it is not found by the checkpoint's own path."""
    found = checkpoint.files.get(Expert.low_noise)
    return None if found is None or checkpoint.path.is_dir() else str(found[0])
