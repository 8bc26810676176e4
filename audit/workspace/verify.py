"""What is damaged among the workspace's own files: every table file is read, every document parsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from audit.progress import Tell, quiet
from audit.workspace.manifest import Manifest
from audit.workspace.names import DATA, WHERE, merged_number, read_name
from audit.workspace.table import Table, check_file
from audit.workspace.workspace import Workspace


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: the key of a file, or an audit."""

    where: str
    problem: str


def table_problems(workspace: Workspace, table: Table, tell: Tell = quiet) -> list[Problem]:
    """The damaged, missing and foreign files of ``table``. Raises WorkspaceError where no manifest can be read."""
    found = [*_manifest_problems(table), *_foreign(table)]
    view = table.view()
    keys = [table.merged_key(file.name) for file in view.manifest.merged]
    names = set(table.files.names(f"{table.folder}/loose")) - view.manifest.absorbed
    loose = [one for one in map(read_name, sorted(names)) if one is not None]
    keys += [table.loose_key(one.name) for one in loose if one.kind == DATA]
    for number, key in enumerate(keys):
        tell(table.name, number, len(keys))
        problem = check_file(table.files, key, deep=True)
        if problem is None or _is_replaced(table, key):
            continue
        mend = "its rows are left out until it is put back from a backup, or given up with 'compact --drop-damaged'"
        found.append(Problem(key, f"{problem}: {mend}"))
    tell(table.name, len(keys), len(keys))
    unread = [one for one in loose if one.kind == WHERE and one.name in table.damaged]
    found += [
        Problem(table.loose_key(one.name), f"a removal that cannot be read: {table.damaged[one.name]}")
        for one in unread
    ]
    return found


def _is_replaced(table: Table, key: str) -> bool:
    """Whether a merge has replaced the file since it was listed."""
    name, manifest = key.rpartition("/")[2], table.view().manifest
    if merged_number(name) is not None:
        return name not in manifest.merged_names
    return name in manifest.absorbed


def _manifest_problems(table: Table) -> Iterator[Problem]:
    for number in table.chain.numbers():
        content = table.load(number)
        if not isinstance(content, Manifest) and content != "gone":
            yield Problem(
                f"{table.chain.folder}/{number:012d}.json", "the manifest is damaged; the one before it holds"
            )


def _foreign(table: Table) -> Iterator[Problem]:
    """Files that are in no place of a table."""
    manifest = table.view().manifest
    for name in sorted(table.files.names(table.folder)):
        if name.endswith((".parquet", ".json")) and name not in manifest.imported:
            yield Problem(
                f"{table.folder}/{name}", "a file of workspace version 2 that was not taken over: it does not count"
            )
    for name in sorted(table.files.names(f"{table.folder}/loose")):
        if read_name(name) is None:
            yield Problem(f"{table.folder}/loose/{name}", "no file of ours: it does not count")
