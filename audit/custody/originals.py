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
from audit.references.folder import image_files
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
    """The pictures below some folders: the path of every SHA256, and the SHA256 of every name, folder by folder."""

    by_hash: dict[str, Path]
    folders: list[dict[str, str]]

    @staticmethod
    def below(folders: Sequence[Path], tell: Tell = quiet) -> Originals:
        """Read every picture below ``folders`` once. Raises ReferenceSetError as adding them as a set does."""
        files = [image_files(folder) for folder in folders]
        found = Originals({}, [{} for _ in folders])
        done, total = 0, sum(map(len, files))
        for paths, folder, names in zip(files, folders, found.folders, strict=True):
            for path in paths:
                tell("hashing", done, total)
                digest = file_hash(path)
                found.by_hash.setdefault(digest, path)
                names[path_as_text(str(path.relative_to(folder.resolve())))] = digest
                done += 1
        tell("hashing", done, total)
        return found

    def instead(self, digest: str, name: str, others: set[str]) -> str | None:
        """The SHA256 of the file called ``name`` in a folder that holds some of ``others``, the set's pictures.

        In other folders a file of that name is another picture, not a changed one.
        """
        there = [names for names in self.folders if not others.isdisjoint(names.values())]
        found = [names[name] for names in there if name in names and names[name] not in others]
        return None if digest in self.by_hash or not found else found[0]


def pictures_of(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(SHA256 of the file, its name) of the pictures in the lines of a set."""
    for key, _ in keys_of(lines):
        if len(key) == 4 and key[0] == "references":
            yield str(key[2]), str(key[3])


def check_pictures(name: str, lines: Iterable[str], originals: Originals) -> list[Finding]:
    """How the originals of the set ``name`` stand to what was compared."""
    pictures = list(pictures_of(lines))
    known = {digest for digest, _ in pictures}
    changed, missing = [], 0
    for digest, label in pictures:
        other = originals.instead(digest, label, known)
        if other is not None:
            said = f"it is another file than the one compared: SHA256 {other} now, {digest} then"
            changed.append(Finding(f"picture {label} of {name}", Agreement.differs, said))
        elif digest not in originals.by_hash:
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
