"""What the index of a diffusers folder says: of a pipeline, or of a modular one. It is read and never followed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.untrusted.documents import parse_json

if TYPE_CHECKING:
    from audit.models.families.base import ModelFamily

INDICES = ("model_index.json", "modular_model_index.json")
MAX_INDEX_BYTES = 1 << 20


def index_of(folder: Path) -> Path:
    """The file that is the index of ``folder``. Raises CheckpointError where there is none."""
    found = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(INDICES)}: give a folder that save_pretrained() of a pipeline wrote"
        )
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """The index of ``folder``. Raises CheckpointError where there is none, or it is damaged."""
    path = index_of(folder)
    try:
        with path.open("rb") as file:
            index = parse_json(file.read(MAX_INDEX_BYTES))
        if not isinstance(index["_class_name"], str):
            raise TypeError("_class_name is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error)[:200]}") from error
    return dict(index)


def class_of(index: Mapping[str, Any], part: str) -> str:
    """The class that an index names for ``part``. Raises ValueError where it names none.

    An index has [library, class] for it; a modular one a third entry besides, of where it may be had, which is not
    looked at: what is used lies in the folder.
    """
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        raise ValueError(f"its index says nothing of {part}")
    if entry[1] is None and len(entry) == 3 and isinstance(entry[2], dict):
        hint = entry[2].get("type_hint")
        entry = hint if isinstance(hint, list) and len(hint) == 2 else entry
    if not isinstance(entry[1], str):
        raise ValueError(f"its index names no class of {part}")
    return entry[1]


def is_absent(index: Mapping[str, Any], part: str) -> bool:
    """Whether the pipeline has been saved without ``part``."""
    return index.get(part) in (None, [None, None])


def left_out_of(folder: Path, architecture: ModelFamily) -> dict[str, None]:
    """The optional encoders that a folder has not, with their tokenizers: diffusers wants to be told."""
    index = read_index(folder)
    pairs = zip(architecture.encoders, architecture.tokenizers, strict=True)
    absent = [pair for pair in pairs if pair[0] in architecture.optional and is_absent(index, pair[0])]
    return dict.fromkeys(name for pair in absent for name in pair)
