"""Original files against a manifest: the pictures of its sets, and the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.custody.findings import Finding, cut
from audit.custody.record import keys_of
from audit.errors import CheckpointError, CustodyError
from audit.progress import Tell, quiet
from audit.references.sets import image_files
from audit.states import Agreement
from audit.storable import path_as_text


def file_hash(path: Path) -> str:
    """The SHA256 of a file. Raises CustodyError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CustodyError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Originals:
    """The pictures below some folders: a path for every SHA256, and the SHA256 of every name within its folder."""

    by_hash: dict[str, Path]
    by_name: dict[str, str]

    @staticmethod
    def below(folders: Sequence[Path], tell: Tell = quiet) -> Originals:
        """Read every picture below ``folders`` once. Raises ReferenceSetError as adding them as a set does."""
        by_hash: dict[str, Path] = {}
        by_name: dict[str, str] = {}
        files = [(path, folder.resolve()) for folder in folders for path in image_files(folder)]
        for number, (path, root) in enumerate(files):
            tell("hashing", number, len(files))
            digest = file_hash(path)
            by_hash.setdefault(digest, path)
            by_name[path_as_text(str(path.relative_to(root)))] = digest
        tell("hashing", len(files), len(files))
        return Originals(by_hash, by_name)


def pictures_of(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(SHA256 of the file, its name) of the pictures in the lines of a set."""
    for key, _ in keys_of(lines):
        if len(key) == 4 and key[0] == "references":
            yield str(key[2]), str(key[3])


def check_pictures(name: str, lines: Iterable[str], originals: Originals) -> list[Finding]:
    """How the originals of the set ``name`` stand to what was compared."""
    pictures = list(pictures_of(lines))
    changed, missing = [], 0
    for digest, label in pictures:
        if digest in originals.by_hash:
            continue
        if label in originals.by_name:
            said = f"it is another file than the one compared: SHA256 {originals.by_name[label]} now, {digest} then"
            changed.append(Finding(f"picture {label} of {name}", Agreement.differs, said))
        else:
            missing += 1
    found = cut(changed, f"pictures of {name}")
    there = len(pictures) - len(changed) - missing
    if there:
        said = f"{there} of {len(pictures)} originals are the files that were compared"
        found.append(Finding(f"pictures of {name}", Agreement.agrees, said))
    if missing:
        said = f"{missing} of {len(pictures)} originals are not in the folders given"
        found.append(Finding(f"pictures of {name}", Agreement.unchecked, said))
    return found


def check_checkpoint(path: Path, then: Any) -> Finding:
    """How a checkpoint's file or folder stands to ``then``, what the manifest says of it."""
    sha256 = then.get("sha256") if isinstance(then, dict) else None
    if not path.is_dir():
        now = file_hash(path)
    else:
        from audit.models.checkpoint import open_checkpoint

        try:
            now = open_checkpoint(path).sha256
        except CheckpointError as error:
            return Finding("checkpoint", Agreement.differs, str(error))
    if now == sha256:
        return Finding("checkpoint", Agreement.agrees, f"{path.name} is what was audited")
    return Finding("checkpoint", Agreement.differs, f"{path.name} is not what was audited: SHA256 {now}, then {sha256}")
