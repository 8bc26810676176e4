"""Where a workspace keeps what fine-tunes are made of: checkpoints and the states of those under way.

On object storage both are sent there, and copied into the cache of the machine that needs them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from audit.files import Files, make_folder, whole_file

FOLDER = "studies/fine-tunes"
STATES = "studies/states"
SEND_EVERY = 300.0  # seconds between two states that are sent to object storage: they are as large as what is trained


def keep_checkpoint(files: Files, key: str, write: Callable[[Path], object], name: str | None) -> str:
    """Keep what ``write(folder)`` writes as the checkpoint of the fine-tune ``key``, whole; its key in the workspace.

    ``name`` is the file in the folder that an audit opens, None for the folder itself. Its row in fine_tunes, written
    after it, is what makes it known: what is sent in part is none.
    """
    folder = files.scratch / FOLDER / key
    partial = folder.with_suffix(f".{os.getpid()}.part")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    make_folder(partial.parent)
    write(partial)
    partial.rename(folder)
    if files.local is None:
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            files.adopt(path, f"{FOLDER}/{key}/{path.relative_to(folder).as_posix()}")
        shutil.rmtree(folder)
    return f"{FOLDER}/{key}/{name}" if name else f"{FOLDER}/{key}"


def fetch_checkpoint(files: Files, kept: str) -> Path:
    """A local path of what ``keep_checkpoint`` has kept. Raises FileNotFoundError where it is gone."""
    if files.local is not None:
        path = files.local / kept
        if not path.exists():
            raise FileNotFoundError(kept)
        return path
    if Path(kept).suffix:
        return files.fetch(kept)
    entries = files.list(kept, recursive=True)
    if not entries:
        raise FileNotFoundError(kept)
    for entry in entries:
        files.fetch(entry.key)
    return files.scratch / kept


class KeptState:
    """The state of a fine-tune that is under way: a file of this machine, and a copy of it on object storage."""

    def __init__(self, files: Files, key: str) -> None:
        self.files, self.key = files, f"{STATES}/{key}.safetensors"
        self.path = files.scratch / self.key
        self._sent = time.monotonic()

    def find(self) -> Path:
        """The file, brought here where another machine has begun; there need be none."""
        if self.files.local is None and not self.path.is_file():
            content = self.files.read(self.key)
            if content is not None:
                with whole_file(self.path) as file:
                    file.write(content)
        return self.path

    def saved(self) -> None:
        """The file was written: send it, unless one was sent of late."""
        if self.files.local is None and time.monotonic() - self._sent > SEND_EVERY:
            self.files.write(self.key, self.path.read_bytes())
            self._sent = time.monotonic()

    def remove(self) -> None:
        """The fine-tune is finished."""
        self.path.unlink(missing_ok=True)
        self.files.remove(self.key)
