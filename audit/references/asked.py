"""What a command names as references and decoys: sets of the workspace, or folders, which are made sets of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from audit.config import Evidence
from audit.errors import ConfigError
from audit.progress import Tell
from audit.references.folder import SkippedImage, survey
from audit.references.sets import ReferenceSets
from audit.states import SetKind

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.job import Job
    from audit.workspace import Workspace


def folder_set_name(folder: Path) -> str:
    """The name of the reference set made of a folder: its own name and a hash of where it is."""
    resolved = folder.resolve()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", resolved.name).strip("-._")[:48] or "folder"
    return f"{stem}-{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"


def require_decoys(references: Sequence[str | Path], background: Sequence[str | Path], drawn: bool) -> None:
    """Raise ConfigError for what is named as references and as decoys, and for decoys that cannot be declared here.

    ``drawn``: they are declared a random split of one collection with the references, which is said of folders.
    """
    both = {str(one) for one in references} & {str(one) for one in background}
    if both:
        raise ConfigError(f"{min(both)} is named as references and as decoys: it can be one of them")
    if drawn and not background:
        raise ConfigError("--drawn is said of decoys: name them with --background FOLDER")
    for one in background if drawn else ():
        if not Path(one).is_dir():
            raise ConfigError(
                f"--drawn: {one} is no folder; of a set of the workspace it is said when it is added: 'lora-audit "
                "references add NAME FOLDER --kind background --of SET --drawn'"
            )


def described_sets(
    workspace: Workspace, asked: Iterable[str | Path], bench: Bench, job: Job, thumbnails: bool, tell: Tell,
    kind: SetKind = SetKind.reference, drawn_with: Sequence[str] = (),
) -> tuple[list[str], list[SkippedImage]]:  # fmt: skip
    """The names of the sets, those of folders described now as of ``kind``, and the pictures that were passed over.

    A folder whose set is described in parts stays so. Folders of decoys are declared a random split of one collection
    with each of the sets ``drawn_with``. Raises ReferenceSetError for what is neither a folder nor a set that the
    job's descriptor has described.
    """
    sets = ReferenceSets(workspace)
    names: list[str] = []
    skipped: list[SkippedImage] = []
    for one in asked:
        if Path(one).is_dir():
            names.append(folder_set_name(Path(one)))
            added = sets.add(
                names[-1], Path(one), bench.descriptor(job), thumbnails,
                lambda done, total: tell("describing", done, total), kind, drawn_with=drawn_with,
                layout=sets.layout_of(names[-1], job.descriptor.name),
            )  # fmt: skip
            skipped += added.skipped
        else:
            names.append(str(one))
            sets.require(str(one), job.descriptor)
    return names, skipped


def keep_latents_of(workspace: Workspace, asked: Sequence[str | Path], bench: Bench, job: Job, tell: Tell) -> None:
    """Keep the latents of the pictures in folders, where the audit measures membership."""
    from audit.references.latents import codec_id, keep_latents

    if job.settings.evidence is Evidence.extraction:
        return
    key = codec_id(job.base.revision, job.settings.resolution)
    for folder in (Path(one) for one in asked if Path(one).is_dir()):
        pictures, _ = survey(folder, or_other=True)  # what tars and videos in it hold has none
        keep_latents(workspace, folder_set_name(folder), pictures, lambda: bench.codec(job), key, tell)
