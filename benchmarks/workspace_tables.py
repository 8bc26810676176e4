"""What a commit and a view cost beside many loose files, now and in workspace version 2, where a commit listed them.

    python -m benchmarks.workspace_tables [--files 20000] [--json FILE]

The middle of several, in milliseconds, on the disk of the temporary folder: a commit is a row, synced; a view says
which files count; a query counts the rows of another table; a merge takes all of the loose files in.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from audit.files import Files
from audit.schemas import TABLES
from audit.workspace import Workspace, compaction
from audit.workspace.names import DATA, loose_name


def milliseconds(call: Callable[[], object], times: int = 9) -> float:
    """The middle of ``times`` calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(taken), 2)


def fill(folder: Path, names: list[str]) -> None:
    """One small Parquet file of a row, under every name."""
    folder.mkdir(parents=True, exist_ok=True)
    row = {"audit_id": "a", "kind": "k", "images": 1}
    first = folder / names[0]
    pq.write_table(pa.Table.from_pylist([row], schema=TABLES["evaluations"]), first)
    content = first.read_bytes()
    for name in names:
        (folder / name).write_bytes(content)


def version_2(place: Path, count: int) -> float:
    """A commit as version 2 made it: the file, then a listing of all to see whether they are to be merged."""
    fill(place / "tables/evaluations", [f"rows-{number:032d}.parquet" for number in range(count)])
    files = Files(place)
    row = pa.Table.from_pylist([{"audit_id": "b"}], schema=TABLES["evaluations"])

    def commit() -> None:
        with files.writing(f"tables/evaluations/rows-{time.time_ns()}.parquet") as file:
            pq.write_table(row, file, compression="zstd")
        names = [entry.key.rpartition("/")[2] for entry in files.list("tables/evaluations")]
        sorted(name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))

    return milliseconds(commit)


def main(
    files: Annotated[int, typer.Option(help="Loose files beside which a commit is made.")] = 20_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Print the figures."""
    figures: dict[str, Any] = {"files": files}
    with tempfile.TemporaryDirectory() as folder:
        figures["commit_version_2_ms"] = version_2(Path(folder) / "old", files)
        workspace = Workspace(Path(folder) / "new")
        table = workspace.table("evaluations")
        stamp = time.time_ns() - 10**15
        names = [loose_name(f"{number:032x}", stamp + number, DATA) for number in range(files)]
        fill(workspace.root / "tables/evaluations/loose", names)
        count = iter(range(10**6))
        figures["commit_ms"] = milliseconds(
            lambda: workspace.write("evaluations", f"k{next(count)}", [{"audit_id": "b"}]), 50
        )
        figures["view_ms"] = milliseconds(table.view)
        figures["has_ms"] = milliseconds(lambda: workspace.has("evaluations", "k0"))
        figures["other_table_query_ms"] = milliseconds(lambda: workspace.rows("SELECT count(*) FROM audits"))
        started = time.perf_counter()
        merged = compaction.compact(table)
        figures["merge_s"], figures["merged"] = round(time.perf_counter() - started, 3), merged
        figures["view_after_merge_ms"] = milliseconds(table.view)
        figures["query_after_merge_ms"] = milliseconds(lambda: workspace.rows("SELECT count(*) FROM evaluations"))
    print(json.dumps(figures, indent=2))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
