"""What is to be audited, resolved: the request's files opened, captions and N0 chosen, the audit's id computed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from audit.config import Settings
from audit.descriptors import Descriptor, load_descriptor
from audit.extraction.captions import Caption, TrainingImages, choose_captions, choose_training_images
from audit.models.base import BaseLocation, locate_base
from audit.models.checkpoint import Checkpoint, open_checkpoint

ALGORITHM_VERSION = 6  # raised when the same settings come to give another result


@dataclass(frozen=True)
class Request:
    """What a user asks for: one checkpoint, its base, and perhaps captions and the number of training images.

    ``name`` and ``known_...`` are what the catalog has; they stand back behind what the user says.
    """

    checkpoint: Path
    base: str
    base_config: str | None = None
    captions: list[str] = field(default_factory=list)
    caption_file: Path | None = None
    n0: int | None = None
    settings: Settings = field(default_factory=Settings)
    name: str | None = None
    known_captions: list[Caption] = field(default_factory=list)
    known_training_images: TrainingImages | None = None
    known_warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A request with everything found that the result depends on."""

    checkpoint: Checkpoint
    base: BaseLocation
    captions: list[Caption]
    training_images: TrainingImages
    settings: Settings
    descriptor: Descriptor
    warnings: list[str]

    @property
    def images(self) -> int:
        """How many images are sampled."""
        return self.settings.images_per_training_image * self.training_images.count

    @property
    def audit_id(self) -> str:
        """32 hex digits: a hash of the tensors, the base and every setting that changes the result."""
        return audit_id_of(
            self.checkpoint.identity,
            self.base.revision,
            self.captions,
            self.training_images,
            self.settings,
            self.descriptor.name,
        )


def audit_id_of(
    identity: str,
    base_revision: str,
    captions: list[Caption],
    training_images: TrainingImages,
    settings: Settings,
    descriptor_name: str,
) -> str:
    """32 hex digits: a hash of everything that an audit's result depends on."""
    depends_on = {
        "algorithm": ALGORITHM_VERSION,
        "checkpoint": identity,
        "base": base_revision,
        "captions": [caption.text for caption in captions],
        "n0": training_images.count,
        "n0_known": training_images.source != "default",
        "settings": settings.as_dict(),
        "descriptor": descriptor_name,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def make_plan(
    request: Request,
    descriptor: Descriptor | str,
    device: str = "cpu",
    base: BaseLocation | None = None,
) -> Plan:
    """Open the request's files, choose what it leaves open, load the descriptor. Raises AuditError for bad input.

    ``descriptor`` and ``base`` can be given where they are loaded and located already.
    """
    checkpoint = open_checkpoint(request.checkpoint)
    if request.name:
        checkpoint = replace(checkpoint, label=request.name)
    base = base or locate_base(request.base, request.base_config)
    captions, caption_warnings = choose_captions(
        request.captions, request.caption_file, checkpoint.metadata, request.known_captions
    )
    training_images, count_warnings = choose_training_images(
        request.n0, checkpoint.metadata, request.known_training_images
    )
    warnings = caption_warnings + count_warnings + request.known_warnings
    loaded = load_descriptor(descriptor, device) if isinstance(descriptor, str) else descriptor
    return Plan(checkpoint, base, captions, training_images, request.settings, loaded, warnings)
