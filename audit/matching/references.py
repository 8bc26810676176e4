"""Reference sets: images (or only their descriptors and hashes) that extractions are compared with."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from audit.descriptors import Descriptor, open_image, pdq_hash
from audit.descriptors.base import read_picture, to_png
from audit.errors import ReferenceSetError
from audit.storage import Workspace

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
THUMBNAIL = 256
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHUNK = 256


@dataclass(frozen=True)
class SkippedImage:
    """A file that is named like a picture but is none, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Added:
    """What `add` did: the set's name, how many images it now has, and what was passed over."""

    name: str
    images: int
    skipped: list[SkippedImage]


def image_files(folder: Path) -> list[Path]:
    """The pictures below ``folder`` by suffix, sorted; links that lead out of it are passed over.

    Raises ReferenceSetError where it is missing, unreadable, or holds none.
    """
    if not folder.is_dir():
        raise ReferenceSetError(f"{folder} is not a folder: give a folder of pictures")
    root = folder.resolve()
    errors: list[OSError] = []
    found = []
    for parent, folders, names in os.walk(root, onerror=errors.append):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if path.suffix.lower() in SUFFIXES and path.resolve().is_relative_to(root) and path.is_file():
                found.append(path)
    if errors and not found:
        raise ReferenceSetError(f"{folder} cannot be read: {errors[0].strerror}")
    if not found:
        raise ReferenceSetError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return found


def known_pictures(folder: Path) -> list[Image.Image]:
    """All pictures below ``folder``, for scoring. Raises ReferenceSetError where one cannot be read: a score over the
    rest would be another score.
    """
    pictures = []
    for path in image_files(folder):
        try:
            pictures.append(open_image(path))
        except ValueError as error:
            raise ReferenceSetError(f"{path} cannot be scored against: {error}; remove or replace it") from error
    return pictures


class ReferenceSets:
    """The reference sets of a workspace. A set has one key a descriptor; adding again replaces it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @staticmethod
    def _key(name: str, descriptor_name: str) -> str:
        if not SET_NAME.fullmatch(name):
            raise ReferenceSetError(
                f"{name!r} cannot name a reference set: use up to 64 letters, digits, '.', '_', '-'"
            )
        return f"{name}.{hashlib.sha256(descriptor_name.encode()).hexdigest()[:12]}"

    def add(
        self,
        name: str,
        folder: Path,
        descriptor: Descriptor,
        thumbnails: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Added:
        """Describe the pictures below ``folder`` and keep them as the set ``name``.

        Pictures that cannot be read are passed over and listed; the same file twice counts once. Raises
        ReferenceSetError where nothing can be read.
        """
        key = self._key(name, descriptor.name)
        paths = image_files(folder)
        skipped: list[SkippedImage] = []
        rows: dict[str, dict[str, Any]] = {}
        now = datetime.now(UTC)
        done = 0
        for chunk in (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)):
            fresh: list[tuple[str, Path, Image.Image]] = []
            for digest, path, picture in self._opened(chunk, skipped, folder):
                if digest not in rows and all(digest != other for other, _, _ in fresh):
                    fresh.append((digest, path, picture))
            vectors = descriptor.describe(picture for _, _, picture in fresh)
            for (digest, path, picture), vector in zip(fresh, vectors, strict=True):
                packed, quality = pdq_hash(picture)
                small = picture.copy()
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                rows[digest] = {
                    "reference_set": name,
                    "reference_id": digest,
                    "name": str(path.relative_to(folder.resolve())),
                    "width": picture.width,
                    "height": picture.height,
                    "descriptor_name": descriptor.name,
                    "descriptor": vector,
                    "pdq": packed,
                    "pdq_quality": quality,
                    "thumbnail": to_png(small) if thumbnails else None,
                    "added_at": now,
                }
            done += len(chunk)
            if progress:
                progress(done, len(paths))
        if not rows:
            listed = "; ".join(f"{one.name}: {one.reason}" for one in skipped[:3])
            raise ReferenceSetError(f"none of the {len(paths)} pictures in {folder} can be read ({listed})")
        self.workspace.write("references", key, list(rows.values()))
        return Added(name, len(rows), skipped)

    @staticmethod
    def _opened(
        paths: list[Path], skipped: list[SkippedImage], folder: Path
    ) -> Iterator[tuple[str, Path, Image.Image]]:
        """(SHA256 of the file, path, picture) of every readable one; each file is read once."""
        for path in paths:
            try:
                data = read_picture(path)
                yield hashlib.sha256(data).hexdigest(), path, open_image(data)
            except ValueError as error:
                skipped.append(SkippedImage(str(path.relative_to(folder.resolve())), str(error)))

    def list(self) -> list[dict[str, Any]]:
        """A row a set and descriptor: reference_set, descriptor_name, images, added_at."""
        return self.workspace.rows(
            'SELECT reference_set, descriptor_name, count(*) AS images, max(added_at) AS added_at FROM "references" '
            "GROUP BY ALL ORDER BY ALL"
        )

    def remove(self, name: str) -> int:
        """Remove the set ``name`` under every descriptor and the matches with it; under how many it was there.

        No file holds them afterwards. Raises ReferenceSetError where there is no such set.
        """
        descriptors = [row["descriptor_name"] for row in self.list() if row["reference_set"] == name]
        if not descriptors:
            known = ", ".join(sorted({row["reference_set"] for row in self.list()})) or "none"
            raise ReferenceSetError(f"there is no reference set {name!r} (there are: {known})")
        self.workspace.erase("reference_set", name)
        return len(descriptors)

    def require(self, name: str, descriptor: Descriptor) -> None:
        """Raise ReferenceSetError where the set does not exist, or only under another descriptor."""
        described_by = {row["descriptor_name"] for row in self.list() if row["reference_set"] == name}
        if descriptor.name in described_by:
            return
        if described_by:
            raise ReferenceSetError(
                f"the reference set {name!r} was described by {', '.join(sorted(described_by))}, the audit uses "
                f"{descriptor.name}: add it again with 'lora-audit references add {name} FOLDER --descriptor ...'"
            )
        known = ", ".join(sorted({row["reference_set"] for row in self.list()})) or "none"
        raise ReferenceSetError(
            f"{name!r} is neither a folder nor a reference set of this workspace (there are: {known})"
        )
