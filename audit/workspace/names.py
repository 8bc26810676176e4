"""Keys, and the names of loose files: ``KEY~STAMP-TOKEN.KIND``."""

from __future__ import annotations

import re
import secrets
import time
from typing import NamedTuple

from audit.errors import WorkspaceError
from audit.files import Files
from audit.schemas import TABLES

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
REPORTS = "reports"  # the folder of pages, their manifests and signatures
LOOSE_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})~(\d{20})-([0-9a-f]{8})\.(parquet|gone|where)")
MERGED_NAME = re.compile(r"(\d{12,18})-[0-9a-f]{8}\.parquet")
ROWS = "rows-"  # how the keys of appended files begin; no two files have the same
DATA, GONE, WHERE = "parquet", "gone", "where"
LAST_STAMP = 2**63 - 1  # what a 64-bit column can hold


class LooseName(NamedTuple):
    """A loose file by its name. ``order`` decides which of two files of a key is the newer."""

    key: str
    order: tuple[int, str]
    kind: str
    name: str

    @property
    def stamp(self) -> int:
        """The count at which it was written."""
        return self.order[0]


def read_name(name: str) -> LooseName | None:
    """The parts of a loose file's name, None for any other name."""
    match = LOOSE_NAME.fullmatch(name)
    if match is None:
        return None
    key, stamp, token, kind = match.groups()
    return LooseName(key, (int(stamp), token), kind, name)


def loose_name(key: str, stamp: int, kind: str) -> str:
    """A new name for a loose file."""
    return f"{key}~{stamp:020d}-{secrets.token_hex(4)}.{kind}"


def new_rows_key() -> str:
    """A key that no other file has."""
    return f"{ROWS}{time.time_ns():020d}-{secrets.token_hex(4)}"


def merged_name(number: int) -> str:
    """A new name for a merged file that manifest ``number`` is to list first."""
    return f"{number:012d}-{secrets.token_hex(4)}.parquet"


def merged_number(name: str) -> int | None:
    """The manifest that was to list the merged file ``name`` first, None for any other name."""
    match = MERGED_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def check_key(table: str, key: str) -> None:
    """Raise WorkspaceError where ``key`` cannot name a file of ``table``."""
    if table not in TABLES or not KEY.fullmatch(key):
        raise WorkspaceError(f"{key!r} cannot name a file of table {table!r}: use letters, digits, '.', '_' and '-'")


class Clock:
    """Counts the commits of a table, so that of two commits the later has the higher stamp, whatever clocks say.

    A stamp is the time in nanoseconds, or one more than the highest stamp before it where that is later. The highest
    stamps are the names of empty files in ``folder``, made before the commit appears.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.folder = files, folder
        self.floor = 0  # the highest stamp that this process has seen

    def marks(self) -> list[int]:
        """The stamps in the folder, ascending: the newest few."""
        found = (int(name) for name in self.files.names(self.folder) if name.isdigit() and len(name) == 20)
        return sorted(stamp for stamp in found if stamp <= LAST_STAMP)

    def next(self) -> int:
        """A stamp above those of all commits that were done before this call."""
        marks = self.marks()
        stamp = max(time.time_ns(), self.floor + 1, *(mark + 1 for mark in marks[-1:]))
        if stamp > LAST_STAMP:
            raise WorkspaceError(
                f"{self.files}/{self.folder} holds the stamp {marks[-1]}, after which none is left: remove that file"
            )
        self.files.mark(f"{self.folder}/{stamp:020d}")
        self.floor = stamp
        for mark in marks[:-1]:  # the highest one found stays beside the new one, for whoever is listing them now
            self.files.remove(f"{self.folder}/{mark:020d}")
        return stamp
