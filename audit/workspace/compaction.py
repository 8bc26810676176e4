"""Merging loose files into few, tidying up what merges have replaced, and removing rows from the disk for good."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from audit.errors import WorkspaceError
from audit.files import ABANDONED
from audit.schemas import TABLES
from audit.workspace.manifest import Manifest, MergedFile, Taken
from audit.workspace.names import DATA, LooseName, merged_name, merged_number, read_name
from audit.workspace.table import MISSING, ROWS_A_GROUP, Condition, Table, check_file, is_damage, log
from audit.workspace.view import KEY_COLUMN, OWN, PARQUET, STAMP_COLUMN, View, merged_schema

MOST_LOOSE, MOST_MERGED = 64, 16
BYTES_A_GROUP = 64 << 20
BIG = 256 << 20  # bytes from which a merged file is left alone, and the next one begun
KEEP_REPLACED = 300.0  # s that replaced files stay for those who read them
REMEMBER = 600.0  # s that a manifest names loose files that have gone: a listing on NFS can be behind
MOST_MANIFESTS = 32
TRIES = 20


class _Unread(Exception):
    """A source of a merge, ``key``, that could not be read."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def compact(table: Table, force: bool = False, drop_damaged: bool = False) -> int:
    """Make one file of the loose ones, and of small merged ones when they are many; how many loose ones went into it.

    A merge counts from the moment its manifest is there; where another one was first, it is dropped, and 0 the answer.
    Damaged loose files stay where they are. With a damaged merged file nothing is merged: a later copy of it may still
    be put back. ``drop_damaged`` gives up both.
    """
    for _ in range(TRIES):
        view = table.view()
        try:
            if drop_damaged:
                _find_damage(table, view)
                view = table.view()
            return _merge(table, view, force, drop_damaged)
        except _Unread as unread:
            problem = check_file(table.files, unread.key, deep=True)  # or it was away in passing
            if problem == MISSING and table.chain.newest() != view.latest:
                return 0
            if problem is not None:
                table.pass_over(unread.key, problem)
    raise WorkspaceError(f"{table.files}/{table.folder} cannot be merged, as its files cannot be read: try again later")


def _merge(table: Table, view: View, force: bool, drop_damaged: bool) -> int:
    lost = [file.name for file in view.manifest.merged if file.name in view.damaged]
    if lost and not drop_damaged:
        log.warning(
            "%s/%s: %s is damaged, so nothing is merged: put it back from a backup, or give its rows up with "
            "'lora-audit compact --drop-damaged'", table.files, table.folder, lost[0],
        )  # fmt: skip
        return 0
    kept, rewritten = _sources(table, view)
    given_up = sorted(name for name in view.damaged if drop_damaged and merged_number(name) is None)
    signs = any(one.kind != DATA for one in view.fresh)
    worth = len(view.fresh) > 1 or len(rewritten) > 1 or signs or (force and (view.fresh or rewritten))
    if not (worth or lost or given_up):
        return 0
    if not view.latest:  # a first one to go back to, should the next be damaged
        table.chain.add(1, Manifest(number=1, at=time.time()).to_bytes())
    number = max(view.latest + 1, 2)
    try:
        written = write_merged(table, _rows(table, view, rewritten), number)
    except FileNotFoundError:  # a merge that was first has replaced our sources, and a vacuum has removed them
        return 0
    names = [one.name for one in view.fresh]
    manifest = Manifest(
        number=number,
        at=time.time(),
        merged=(*kept, *written),
        taken=_remembered(table, view.manifest, Taken(time.time(), (*names, *given_up), view.for_merged)),
        top=view.top,
        imported=view.manifest.imported,
    )
    if not table.chain.add(number, manifest.to_bytes()):
        for file in written:
            table.files.remove(table.merged_key(file.name))
        return 0
    return sum(one.kind == DATA for one in view.loose)


def _sources(table: Table, view: View) -> tuple[list[MergedFile], list[MergedFile]]:
    """The merged files that stay as they are, and those that go into the new one."""
    there = [file for file in view.manifest.merged if file.name not in view.damaged]
    small = [file for file in there if file.bytes < BIG]
    again = set(small) if len(small) >= MOST_MERGED else set()
    again |= {file for file in there if file not in again and _is_touched(table, view, file)}
    return [file for file in there if file not in again], [file for file in there if file in again]


def _is_touched(table: Table, view: View, file: MergedFile) -> bool:
    """Whether ``file`` has rows that do not count any more."""
    kept = view.kept_of_merged
    if kept is None:
        return False
    key = table.merged_key(file.name)
    try:
        data = ds.FileSystemDataset.from_paths(
            [table.files.path(key)], schema=merged_schema(table.name), format=PARQUET,
            filesystem=table.files.system,
        )  # fmt: skip
        return bool(data.head(1, columns=[KEY_COLUMN], filter=~kept).num_rows)
    except (OSError, pa.ArrowException) as error:
        if is_damage(error):
            raise _Unread(key) from error
        raise


def _remembered(table: Table, manifest: Manifest, taken: Taken | None = None) -> tuple[Taken, ...]:
    """What ``manifest`` has taken in and may still be listed, with what is ``taken`` now."""
    there = set(table.files.names(f"{table.folder}/loose"))
    found = []
    for batch in manifest.taken:
        if _young(batch.at, REMEMBER):
            found.append(batch)
        elif left := tuple(name for name in batch.names if name in there):
            found.append(Taken(batch.at, left))
    return (*found, *([taken] if taken else []))


def _young(at: float, seconds: float) -> bool:
    """Whether ``at`` is less than ``seconds`` ago; a time to come is not believed."""
    return 0 <= time.time() - at < seconds


# Writing merged files


def write_merged(table: Table, tables: Iterator[pa.Table], number: int) -> list[MergedFile]:
    """Write ``tables``, with the columns of merged files, as files that manifest ``number`` is to list."""
    groups = _groups(tables)
    written: list[MergedFile] = []
    group = next(groups, None)
    while group is not None:
        name, rows, schema = merged_name(number), 0, group.schema
        with table.files.writing(table.merged_key(name)) as file:
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as target:
                while group is not None and group.schema == schema and file.tell() < BIG:
                    target.write_table(group)
                    rows += group.num_rows
                    group = next(groups, None)
            size = file.tell()
        written.append(MergedFile(name, rows, size))
    return written


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """``tables`` in larger ones, each in the order of its first column, so that readers of few values skip most."""
    pending: list[pa.Table] = []
    rows = size = 0
    for one in tables:
        if pending and (
            one.schema != pending[0].schema or rows + one.num_rows > ROWS_A_GROUP or size + one.nbytes > BYTES_A_GROUP
        ):
            yield _sorted(pending)
            pending, rows, size = [], 0, 0
        if one.num_rows:
            pending.append(one)
            rows, size = rows + one.num_rows, size + one.nbytes
    if pending:
        yield _sorted(pending)


def _sorted(tables: list[pa.Table]) -> pa.Table:
    whole = pa.concat_tables(tables).combine_chunks()
    return whole.sort_by(whole.column_names[0])


def _rows(table: Table, view: View, rewritten: list[MergedFile]) -> Iterator[pa.Table]:
    """The rows that count, a row group at a time, with the columns of merged files."""
    schema, kept = merged_schema(table.name), view.kept_of_merged
    for file in rewritten:
        for rows in _row_groups(table, table.merged_key(file.name)):
            whole = conform(rows, schema)
            yield whole if kept is None else whole.filter(kept)
    for one in view.loose:
        kept = view.kept_of_loose(one)
        for rows in _row_groups(table, table.loose_key(one.name)):
            whole = conform(rows, TABLES[table.name])
            yield stamped(whole if kept is None else whole.filter(kept), one)


def stamped(rows: pa.Table, one: LooseName) -> pa.Table:
    """``rows`` of a loose file with the columns of merged ones."""
    columns = (pa.repeat(one.key, rows.num_rows), pa.repeat(pa.scalar(one.stamp, pa.int64()), rows.num_rows))
    for field, column in zip(OWN, columns, strict=True):
        rows = rows.append_column(field, column)
    return rows


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """``rows`` with the columns of ``schema``, null where there was none, and those that a newer version has added.

    Their schema has no metadata.
    """
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    fields = [pa.field(field.name, field.type) for field in schema]
    for name in rows.column_names:
        if name not in schema.names:
            columns.append(rows[name])
            fields.append(pa.field(name, rows.schema.field(name).type))
    return pa.table(columns, schema=pa.schema(fields))


def _row_groups(table: Table, key: str) -> Iterator[pa.Table]:
    try:
        path = table.files.path(key)
        with pq.ParquetFile(path, filesystem=table.files.system, page_checksum_verification=True) as source:
            for group in range(source.num_row_groups):
                yield source.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        if is_damage(error):
            raise _Unread(key) from error
        raise


def _find_damage(table: Table, view: View) -> None:
    for one in view.loose:
        if problem := check_file(table.files, table.loose_key(one.name), deep=True):
            table.pass_over(table.loose_key(one.name), problem)
    for name in view.merged:
        if problem := check_file(table.files, table.merged_key(name), deep=True):
            table.pass_over(table.merged_key(name), problem)


# Tidying up


def vacuum(table: Table, grace: float | None = None) -> int:
    """Remove what merges replaced more than ``grace`` seconds ago, and what dead processes have left; how many files.

    What either of the two newest manifests needs stays, so that damage to the newest loses nothing. Any number of
    vacuums, merges, writers and readers may be at work: a reader whose files go takes a new view.
    """
    grace = KEEP_REPLACED if grace is None else grace
    manifests = _manifests(table)
    if len(manifests) < 2 or manifests[-1].number != table.chain.newest():
        return 0
    newest, before = manifests[-1], manifests[-2]
    recent = [one for one, after in pairwise(manifests) if _young(after.at, grace)]
    needed = {name for one in (before, newest, *recent) for name in one.merged_names}
    old = {name for batch in newest.taken if not _young(batch.at, grace) for name in batch.names} & before.absorbed
    loose = [name for name in table.files.names(f"{table.folder}/loose") if name in old]
    merged = [
        name
        for name in table.files.names(f"{table.folder}/merged")
        if name not in needed and (merged_number(name) or newest.number + 1) <= newest.number
    ]  # a merge that could still list a file of its own has a higher number
    for name in loose:
        table.files.remove(table.loose_key(name))
    for name in merged:
        table.files.remove(table.merged_key(name))
    imported = [name for name in table.files.names(table.folder) if name in newest.imported]
    for name in imported:
        table.files.remove(f"{table.folder}/{name}")
    for folder in ("loose", "merged", "manifest"):
        table.files.sweep(f"{table.folder}/{folder}", ABANDONED)
    kept = {one.number for one in recent}
    for number in table.chain.numbers():
        if number < before.number and number not in kept:
            table.chain.remove(number)
    return len(loose) + len(merged) + len(imported)


def settle(table: Table, grace: float | None = None) -> None:
    """Write the newest manifest once more where only the one before it keeps old files, so that they can go."""
    grace = KEEP_REPLACED if grace is None else grace
    manifests = _manifests(table)
    if not manifests or manifests[-1].number != table.chain.newest():
        return
    newest = manifests[-1]
    before = manifests[-2] if len(manifests) > 1 else Manifest()
    if _young(newest.at, grace) or (before.merged_names <= newest.merged_names and newest.absorbed <= before.absorbed):
        return
    twin = replace(newest, number=newest.number + 1, at=time.time(), taken=_remembered(table, newest))
    table.chain.add(twin.number, twin.to_bytes())


def _manifests(table: Table) -> list[Manifest]:
    """The manifests that can be read, oldest first; those of too long ago go."""
    numbers = table.chain.numbers()
    for number in numbers[:-MOST_MANIFESTS]:
        table.chain.remove(number)
    loaded = [table.load(number) for number in numbers[-MOST_MANIFESTS:]]
    return [one for one in loaded if isinstance(one, Manifest)]


# Removing for good


def erase(table: Table, *conditions: Condition) -> None:
    """``erase_each`` of the rows that meet all ``conditions``."""
    erase_each(table, [conditions])


def erase_each(table: Table, several: Sequence[Sequence[Condition]]) -> None:
    """Remove all rows that meet all conditions, (column, value), of one of ``several``, now, from every file on the
    storage.

    Raises WorkspaceError naming a damaged file, which may hold some, and where others write them again all the time.
    """
    if not _parquet_files(table):
        return
    for conditions in several:
        table.take_away_where(*conditions)
    stamp = table.clock.floor
    holding: list[str] = []
    for attempt in range(TRIES):
        time.sleep(0.02 * attempt)
        compact(table, force=True)
        settle(table, 0.0)
        vacuum(table, 0.0)
        table.files.sweep(f"{table.folder}/merged", 0.0)
        holding = [key for key in _parquet_files(table) if _holds(table, key, several, stamp)]
        signs = [one for one in table.view().fresh if one.kind != DATA and one.stamp <= stamp]
        if not holding and not signs:
            return
    raise WorkspaceError(
        f"{table.files}/{(holding or [table.folder])[0]} still holds rows to be erased, as others write to it all the "
        "time: try again when nothing else runs"
    )


def _parquet_files(table: Table) -> list[str]:
    folders = ("/loose", "/merged", "")
    return [
        f"{table.folder}{folder}/{name}"
        for folder in folders
        for name in table.files.names(f"{table.folder}{folder}")
        if name.endswith(".parquet")
    ]


def _holds(table: Table, key: str, several: Sequence[Sequence[Condition]], stamp: int) -> bool:
    """Whether the file ``key`` has rows that meet conditions of ``several`` and were written before ``stamp``."""
    name = key.rpartition("/")[2]
    loose = read_name(name)
    if loose is not None and loose.stamp >= stamp:
        return False
    schema = TABLES[table.name] if merged_number(name) is None else merged_schema(table.name)
    data = ds.FileSystemDataset.from_paths(
        [table.files.path(key)], schema=schema, format=PARQUET, filesystem=table.files.system
    )
    wanted = pc.scalar(False)
    for conditions in several:
        met = pc.scalar(True)
        for column, value in conditions:
            met &= ds.field(column) == pa.scalar(value, schema.field(column).type)
        wanted |= met
    if STAMP_COLUMN in schema.names:
        wanted &= ds.field(STAMP_COLUMN) < stamp
    try:
        return data.head(1, columns=[several[0][0][0]], filter=wanted).num_rows > 0
    except (OSError, pa.ArrowException) as error:
        problem = check_file(table.files, key, deep=True)
        if problem == MISSING:
            return False
        if problem is not None:
            raise WorkspaceError(
                f"{table.files}/{key} is damaged and may hold rows to be erased: remove it, or put it back from a "
                "backup, and try again"
            ) from error
        raise
