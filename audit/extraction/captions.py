"""Which captions to sample with, and how many training images to expect: from the user, else from the metadata.

Metadata is written by uploaders (kohya's ``ss_*`` fields are JSON inside strings, in a header anybody can edit):
everything is bounded, and where a value came from is kept with it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from audit.errors import AuditError

DEFAULT_TRAINING_IMAGES = 10
MAX_TRAINING_IMAGES = 100
MAX_CAPTIONS = 8
MAX_CAPTION_CHARACTERS = 1000


@dataclass(frozen=True)
class Caption:
    """A caption and where it came from: "user", "file", or the metadata field."""

    text: str
    source: str


@dataclass(frozen=True)
class TrainingImages:
    """N0, the number of training images, and where it came from."""

    count: int
    source: str


def _clean(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"\s+", " ", printable).strip()[:MAX_CAPTION_CHARACTERS]


def _json(text: str | None) -> object:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def read_caption_file(path: Path) -> list[Caption]:
    """One caption a line; empty lines and lines that start with # are passed over.

    Raises AuditError where the file cannot be read or holds none.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(1_000_000).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{path} cannot be read as a UTF-8 text file of captions: {error}") from error
    captions = [Caption(_clean(line), "file") for line in lines if line.strip() and not line.startswith("#")]
    if not captions:
        raise AuditError(f"{path} holds no captions: write one a line")
    return captions


def captions_from_metadata(metadata: dict[str, str]) -> list[Caption]:
    """Captions that a checkpoint's metadata claims, the likeliest first, each once, at most MAX_CAPTIONS.

    The trigger phrase, then the folder names of kohya's data sets ("10_sks dog" is "sks dog"), then the tags that
    most images carry, joined as they are in a caption file.
    """
    found = [Caption(metadata.get("modelspec.trigger_phrase", ""), "modelspec.trigger_phrase")]
    frequency = _json(metadata.get("ss_tag_frequency"))
    folders = _json(metadata.get("ss_dataset_dirs"))
    names = [*(folders if isinstance(folders, dict) else ()), *(frequency if isinstance(frequency, dict) else ())]
    found += [Caption(re.sub(r"^\d+_", "", name), "ss_dataset_dirs") for name in names if re.match(r"^\d+_", name)]
    for tags in frequency.values() if isinstance(frequency, dict) else ():
        counts = {str(tag): n for tag, n in tags.items() if isinstance(n, int)} if isinstance(tags, dict) else {}
        most = max(counts.values(), default=0)
        shared = [tag.strip() for tag, count in counts.items() if count >= 0.8 * most][:20]
        found.append(Caption(", ".join(shared), "ss_tag_frequency"))
    unique: dict[str, Caption] = {}
    for caption in found:
        text = _clean(caption.text)
        if text:
            unique.setdefault(text.lower(), Caption(text, caption.source))
    return list(unique.values())[:MAX_CAPTIONS]


def training_images_from_metadata(metadata: dict[str, str]) -> TrainingImages | None:
    """N0 as kohya's metadata claims it: the sum of ``img_count``; None where nothing usable is claimed."""
    folders = _json(metadata.get("ss_dataset_dirs"))
    if not isinstance(folders, dict):
        return None
    counts = [entry.get("img_count") for entry in folders.values() if isinstance(entry, dict)]
    total = sum(count for count in counts if type(count) is int and count > 0)
    return TrainingImages(total, "ss_dataset_dirs") if total > 0 else None


def choose_training_images(user: int | None, metadata: dict[str, str]) -> tuple[TrainingImages, list[str]]:
    """N0 and warnings: the user's, else the metadata's claim up to MAX_TRAINING_IMAGES, else the default."""
    if user is not None:
        return TrainingImages(user, "user"), []
    claimed = training_images_from_metadata(metadata)
    if claimed is None:
        warning = (
            f"the number of training images is not known: {DEFAULT_TRAINING_IMAGES} are assumed (set it with --n0)"
        )
        return TrainingImages(DEFAULT_TRAINING_IMAGES, "default"), [warning]
    if claimed.count > MAX_TRAINING_IMAGES:
        warning = (
            f"the metadata claims {claimed.count} training images: the audit looks for {MAX_TRAINING_IMAGES} "
            "(raise it with --n0 if the time is worth it)"
        )
        return TrainingImages(MAX_TRAINING_IMAGES, claimed.source), [warning]
    return claimed, []


def choose_captions(user: list[str], file: Path | None, metadata: dict[str, str]) -> tuple[list[Caption], list[str]]:
    """The captions to share the budget, and warnings: the user's, else the file's, else the metadata's.

    With none at all the empty caption is sampled, which a warning says.
    """
    given = [Caption(_clean(text), "user") for text in user]
    if file is not None:
        given += read_caption_file(file)
    captions = [caption for caption in given if caption.text] or captions_from_metadata(metadata)
    if captions:
        return captions, []
    warning = "no caption is known: the empty caption is sampled, which finds less (give one with --caption)"
    return [Caption("", "default")], [warning]
