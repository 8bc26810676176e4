"""Folders of pictures: which files are pictures, and why the others are none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from audit.descriptors.pictures import SUFFIXES, opened_ahead
from audit.errors import ReferenceSetError
from audit.storable import path_as_text


@dataclass(frozen=True)
class SkippedImage:
    """A file that was passed over, and why."""

    name: str
    reason: str


def survey(folder: Path, or_other: bool = False) -> tuple[list[Path], list[SkippedImage]]:
    """The pictures below ``folder`` by suffix, sorted, and every other file with the reason why it is none.

    Links that lead out of the folder are passed over. Raises ReferenceSetError where it is missing, unreadable, or
    holds no picture, unless ``or_other``: something else there is.
    """
    if not folder.is_dir():
        raise ReferenceSetError(f"{folder} is not a folder: give a folder of pictures")
    root = folder.resolve()
    errors: list[OSError] = []
    found, passed = [], []
    for parent, folders, names in os.walk(root, onerror=errors.append):
        folders.sort()
        passed += [
            SkippedImage(
                path_as_text(str((Path(parent) / name).relative_to(root))), "a link to a folder is not followed"
            )
            for name in folders
            if (Path(parent) / name).is_symlink()
        ]
        for name in sorted(names):
            path = Path(parent) / name
            reason = _passed_over(path, root)
            if reason is None:
                found.append(path)
            else:
                passed.append(SkippedImage(path_as_text(str(path.relative_to(root))), reason))
    if errors and not found:
        raise ReferenceSetError(f"{folder} cannot be read: {errors[0].strerror}")
    if not found and not or_other:
        raise ReferenceSetError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    passed += [SkippedImage(path_as_text(os.path.relpath(one.filename, root)), f"{one.strerror}") for one in errors]
    return found, passed


def _passed_over(path: Path, root: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return f"the ending {suffix} is no picture's" if suffix else "it has no ending"
    try:
        if not path.resolve().is_relative_to(root):
            return "a link that leads out of the folder"
        return None if path.is_file() else "not a file"
    except (OSError, RuntimeError) as error:  # links in a circle
        return f"not a readable picture ({getattr(error, 'strerror', None) or error})"


def image_files(folder: Path) -> list[Path]:
    """The pictures below ``folder`` by suffix, sorted. Raises ReferenceSetError as ``survey`` does."""
    return survey(folder)[0]


def known_pictures(folder: Path) -> list[Image.Image]:
    """All pictures below ``folder``, for scoring. Raises ReferenceSetError where one cannot be read: a score over the
    rest would be another score.
    """
    pictures = []
    for one in opened_ahead(image_files(folder)):
        if isinstance(one.picture, ValueError):
            raise ReferenceSetError(
                f"{one.path} cannot be scored against: {one.picture}; remove or replace it"
            ) from one.picture
        pictures.append(one.picture)
    return pictures
