"""One table: commits, views, and what reads them. Merging and tidying are in compaction.py.

``loose/`` has a file a commit, which nobody lists to write it; ``merged/`` the files that merges have made of them;
``manifest/`` numbered documents that say which merged files count and which loose files they have taken in.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import Files
from audit.schemas import TABLES
from audit.workspace.chain import Chain
from audit.workspace.manifest import Manifest, Removal
from audit.workspace.names import DATA, GONE, WHERE, Clock, LooseName, loose_name, merged_number
from audit.workspace.view import KEY_COLUMN, View, fresh_names

T = TypeVar("T")
Condition = tuple[str, str | int]  # a column and the value that it has
TRIES = 30
REMEMBERED = 40  # manifests
ROWS_A_GROUP = 4096  # of which a merge holds a few in memory
log = logging.getLogger("audit.workspace")


class Table:
    """A table of a workspace. It may be used by many processes at once."""

    def __init__(self, files: Files, name: str) -> None:
        self.files, self.name, self.folder = files, name, f"tables/{name}"
        self.schema = TABLES[name]
        self.chain = Chain(files, f"{self.folder}/manifest")
        self.clock = Clock(files, f"{self.folder}/clock")
        self.damaged: dict[str, str] = {}  # what is wrong with files that cannot be read, by name
        self._manifests: dict[int, Manifest | None] = {}
        self._removals: dict[str, Removal | None] = {}

    def loose_key(self, name: str) -> str:
        """The key of a loose file."""
        return f"{self.folder}/loose/{name}"

    def merged_key(self, name: str) -> str:
        """The key of a merged file."""
        return f"{self.folder}/merged/{name}"

    # Commits

    def commit(
        self, key: str, kind: str, write: Callable[[IO[bytes]], object], before: Callable[[], object] = lambda: None
    ) -> None:
        """Add a loose file of ``key`` with what ``write`` writes; ``before`` is done when all of it is written."""

        def name() -> str:
            before()
            return self._new_name(key, kind)

        with self.files.writing(self.loose_key("new"), name) as file:
            write(file)

    def _new_name(self, key: str, kind: str) -> str:
        if not self.clock.floor and not self.clock.marks():  # a table without a clock: its files tell
            self.clock.floor = self.view().top
        return self.loose_key(loose_name(key, self.clock.next(), kind))

    def put(self, key: str, rows: pa.Table) -> None:
        """Make ``rows`` those of ``key``."""
        self.commit(key, DATA, lambda file: write_rows(rows, file))

    def put_parts(self, key: str, parts: Iterable[pa.Table], instead_of: Sequence[Condition] = ()) -> None:
        """Make the rows of ``parts``, of which one at a time is in memory, those of ``key``, all at once.

        Rows that meet all conditions ``instead_of``, under whatever key, are removed just before: who reads sees the
        old rows, none, or the new ones, and never a part of either.
        """

        def write(file: IO[bytes]) -> None:
            with pq.ParquetWriter(file, self.schema, compression="zstd", write_page_checksum=True) as target:
                for part in parts:
                    target.write_table(part.cast(self.schema), ROWS_A_GROUP)

        self.commit(key, DATA, write, lambda: self.take_away_where(*instead_of) if instead_of else None)

    def take_away(self, key: str) -> None:
        """Let ``key`` have no rows."""
        self.commit(key, GONE, lambda file: None)

    def take_away_where(self, *conditions: Condition) -> None:
        """Remove all rows that were written so far and meet all ``conditions``, (column, value)."""
        self.clock.floor = max(self.clock.floor, self.view().top)
        [(column, value), *more] = conditions
        said = {"conditions": conditions} if more else {"column": column, "value": value}
        document = json.dumps(said).encode()
        self.commit(WHERE, WHERE, lambda file: file.write(document))

    # Views

    def view(self) -> View:
        """The table now: the manifest, the loose files, and whether there is a newer manifest meanwhile.

        Raises WorkspaceError where no manifest can be read.
        """
        for _ in range(TRIES):
            numbers = self.chain.numbers()
            names = self.files.names(f"{self.folder}/loose")
            if self.chain.has_more(max(numbers, default=0)):
                continue
            manifest = self._manifest(numbers)
            if manifest is None:
                continue
            fresh = fresh_names(names, manifest, self.damaged)
            removals = {one.name: self._removal(one) for one in fresh if one.kind == WHERE}
            known = {name: removal for name, removal in removals.items() if removal is not None}
            return View(self.name, manifest, max(numbers, default=0), fresh, known, frozenset(self.damaged))
        raise WorkspaceError(f"{self.files}/{self.folder} changes too fast to be read: try again")

    def _manifest(self, numbers: list[int]) -> Manifest | None:
        """The newest manifest that can be read; None where it has just been removed.

        The one before it says the same in other files, which are kept as long as it is one of the newest two.
        """
        if not numbers:
            return Manifest()
        for number in reversed(numbers):
            content = self.load(number)
            if content == "gone":
                return None
            if isinstance(content, Manifest):
                return content
        raise WorkspaceError(
            f"no manifest in {self.files}/{self.folder}/manifest can be read: restore one of them from a backup"
        )

    def load(self, number: int) -> Manifest | str:
        """The manifest ``number``, or "damaged" or "gone"."""
        if number in self._manifests:
            return self._manifests[number] or "damaged"
        content = self.chain.read(number)
        if content is None:
            return "gone"
        found: Manifest | None = None
        try:
            found = Manifest.from_bytes(content)
        except ValueError as error:
            log.warning("%s/%s/%012d.json is damaged: %s", self.files, self.chain.folder, number, error)
        self._manifests[number] = found
        for old in sorted(self._manifests)[:-REMEMBERED]:
            del self._manifests[old]
        return found or "damaged"

    def _removal(self, one: LooseName) -> Removal | None:
        if one.name not in self._removals:
            content = self.files.read(self.loose_key(one.name))
            try:
                document = json.loads(content or b"")
                said = document.get("conditions") or [[document["column"], document["value"]]]
                (column, value), *more = conditions = [(column, value) for column, value in said]
                for column_of, value_of in conditions:
                    if column_of not in TABLES[self.name].names or not isinstance(value_of, str | int):
                        raise ValueError(f"column {column_of!r}")
                self._removals[one.name] = Removal(column, value, one.stamp, tuple(more))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if content is None:
                    return None  # a merge has taken it in since
                self._removals[one.name] = None
                self.pass_over(self.loose_key(one.name), str(error))
        return self._removals[one.name]

    # Reading

    def datasets(self, view: View) -> list[ds.Dataset]:
        """The rows of ``view``."""
        parts = view.parts(self.files.path(self.folder), self.files.system)
        return [part.dataset() for part in parts]

    def has(self, key: str) -> bool:
        """Whether there are rows of ``key``."""

        def look(view: View) -> bool:
            for one in view.holding:
                if one.key == key:
                    alone = replace(view, manifest=replace(view.manifest, merged=()), fresh=(one,))
                    return one.kind == DATA and any(data.count_rows() for data in self.datasets(alone))
            merged = replace(view, fresh=tuple(name for name in view.fresh if name.kind == WHERE))
            wanted = ds.field(KEY_COLUMN) == key
            return any(data.head(1, columns=[KEY_COLUMN], filter=wanted).num_rows for data in self.datasets(merged))

        return self.read(look)

    def has_beginning(self, beginning: str) -> bool:
        """Whether there are rows of a key with this beginning; some that were removed since may count, too."""

        def look(view: View) -> bool:
            if any(one.key.startswith(beginning) for one in view.loose):
                return True
            merged = replace(view, fresh=tuple(one for one in view.fresh if one.kind == WHERE))
            wanted = pc.starts_with(ds.field(KEY_COLUMN), beginning)
            return any(
                data.head(1, columns=[KEY_COLUMN], filter=wanted).num_rows
                for data in self.datasets(merged)
                if KEY_COLUMN in data.schema.names
            )

        return self.read(look)

    def keys(self) -> list[str]:
        """The keys of the loose files and the names of the merged files that count."""
        view = self.view()
        return sorted([*(one.key for one in view.loose), *(name.removesuffix(".parquet") for name in view.merged)])

    def read(self, look: Callable[[View], T]) -> T:
        """What ``look`` finds in a view; in a new one where files have gone or turn out to be damaged meanwhile."""
        for attempt in range(TRIES):
            view = self.view()
            try:
                return look(view)
            except (OSError, pa.ArrowException) as error:
                if attempt + 1 == TRIES or not self.changed(view):
                    raise WorkspaceError(f"{self.files}/{self.folder} cannot be read: {str(error)[:300]}") from error
        raise AssertionError("unreachable")

    def changed(self, view: View, deep: bool = True) -> bool:
        """Whether reading again can help after reading ``view`` has failed: its files have gone, or damaged ones are
        known now and will be passed over. ``deep`` reads them whole to find out, where their ends are right.
        """
        names = [(self.loose_key(one.name), one.name) for one in view.loose]
        names += [(self.merged_key(name), name) for name in view.merged]
        found = self._damage(names, view, deep=False) or (deep and self._damage(names, view, deep=True))
        return found or self.chain.newest() != view.latest

    def _damage(self, names: list[tuple[str, str]], view: View, deep: bool) -> bool:
        found = False
        for key, name in names:
            problem = check_file(self.files, key, deep)
            if problem == MISSING and (merged_number(name) is None or self.chain.newest() != view.latest):
                found = True  # removed since: the next view does not have it
            elif problem is not None:
                self.pass_over(key, problem)
                found = True
        return found

    def pass_over(self, key: str, problem: str) -> None:
        """Leave a damaged file out of all further views, and say so."""
        self.damaged[key.rpartition("/")[2]] = problem
        log.warning("%s/%s is damaged (%s) and left out: see 'lora-audit verify'", self.files, key, problem)


MISSING = "it is missing"


def write_rows(rows: pa.Table, file: IO[bytes]) -> None:
    """Write ``rows`` as Parquet, with a checksum a page."""
    pq.write_table(rows, file, row_group_size=ROWS_A_GROUP, compression="zstd", write_page_checksum=True)


def check_file(files: Files, key: str, deep: bool) -> str | None:
    """What is wrong with a Parquet file, None for nothing; ``deep`` reads all of it, else its end alone.

    Raises WorkspaceError where the storage, not the file, is at fault.
    """
    source: pa.NativeFile
    if files.local is None:
        content = files.read(key)
        if content is None:
            return MISSING
        source = pa.BufferReader(content)
    try:
        if files.local is not None:
            source = pa.OSFile(files.path(key))
        with source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            for _ in file.iter_batches(batch_size=1024) if deep else ():
                pass
    except FileNotFoundError:
        return MISSING
    except (OSError, pa.ArrowException) as error:
        if is_damage(error):
            return (str(error).strip().splitlines() or ["it cannot be read"])[0][:200].rstrip(".")
        raise WorkspaceError(f"{files}/{key} cannot be read: {str(error)[:300]}") from error
    return None


def is_damage(error: Exception) -> bool:
    """Whether ``error`` may say that a file's content is wrong, or that there is none, rather than a wrong machine."""
    if isinstance(error, MemoryError):
        return False
    return not isinstance(error, OSError) or error.errno in (None, errno.EIO, errno.ENOENT)
