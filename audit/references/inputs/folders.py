"""Folders of pictures."""

from __future__ import annotations

from pathlib import Path

from audit.references.folder import survey
from audit.references.inputs.given import Given, Pictures
from audit.storable import path_as_text


def folder_pictures(folder: Path) -> Pictures:
    """The pictures below ``folder``. Raises ReferenceSetError as ``survey`` does."""
    paths, passed = survey(folder)
    root = folder.resolve()
    given = (Given(path_as_text(str(path.relative_to(root))), path) for path in paths)
    return Pictures(str(folder), given, len(paths), passed)
