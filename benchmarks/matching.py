"""Matching at the scale of published data sets: vectors and PDQ hashes, side by side with what else there is.

    python -m benchmarks.matching [--quick] [--json FILE]
    python -m benchmarks.matching --vectors 10000000 [--extractions 1000] [--json FILE]

A bank of made-up references is written into the table of a workspace, as `references add` writes it, indexed, and
searched as matching does. Vectors are unit vectors of 512 numbers, half of them spread out and half in tight groups;
extractions are references with noise, and others. Hashes are random ones, a tenth of them of blank and nearly blank
pictures. What is compared with: faiss's flat index (pip install faiss-cpu; without it its column says so), the cross
join in SQL, looking at every hash. Reports about the bank are written and verified, in seconds of computing. Ratios are
of one run; every answer is checked against the exact one.

Memory: a reference takes 2.6 KB on disk beside the table, a hash 0.4 KB. The full form wants 12 GB of disk and 8 GB of
memory. With ``--vectors`` one index of so many references is made, without a table, and searched: ten millions want 29
GB of disk, and 6 GB of memory in which the system keeps what a search reads. Exit code 1 where an answer is wrong, or
the index is no faster than the join.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
import typer
from rich.console import Console

from audit.config import Settings
from audit.custody.check import verify_report
from audit.references.audits import match_audit
from audit.references.index import Bank, open_bank, store
from audit.references.index.hashes import Parts, build_part, packed
from audit.references.match import TOP, match_extractions
from audit.report import collect, write_page
from audit.schemas import REFERENCES
from audit.workspace import Workspace
from benchmarks.tables import table
from benchmarks.vectors import (
    ONE_AUDIT,
    WIDTH,
    extractions_of,
    hashes_of,
    index_alone,
    made_up,
    quality_of,
    seconds,
    unit,
    vectors_of,
)

PART = 20_000  # references that are written at once
SQL = """SELECT count(*) FROM (SELECT e.rank, list_cosine_similarity(e.descriptor, r.descriptor) AS similarity
FROM extracted AS e CROSS JOIN "references" AS r
QUALIFY row_number() OVER (PARTITION BY rank ORDER BY similarity DESC) <= 3)
"""
out = Console(stderr=True)


def write_bank(workspace: Workspace, rng: np.random.Generator, number: int, centres: np.ndarray) -> np.ndarray:
    """Write a set "bank" of ``number`` references; some of its vectors, to make extractions of."""
    now, some = datetime.now(UTC), []
    for start in range(0, number, PART):
        count = min(PART, number - start)
        vectors = made_up(rng, count, centres)
        some.append(vectors[:: max(number // 5000, 1)].copy())  # a view would keep them all
        columns = {
            "reference_set": pa.array(["bank"] * count), "descriptor_name": pa.array(["made-up"] * count),
            "reference_id": pa.array([f"{start + one:064x}" for one in range(count)]),
            "descriptor": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * WIDTH, vectors.reshape(-1)),
            "pdq": pa.array([one.tobytes() for one in hashes_of(rng, count)], pa.binary(32)),
            "pdq_quality": pa.array(quality_of(count)), "added_at": pa.array([now] * count),
            "width": pa.array(np.full(count, 500, np.int32)), "height": pa.array(np.full(count, 500, np.int32)),
        }  # fmt: skip
        rows = pa.table([columns.get(one.name, pa.nulls(count, one.type)) for one in REFERENCES], schema=REFERENCES)
        workspace.write("references", f"bank.made-up.{start}", rows)
    return np.concatenate(some)


def by_faiss(bank: Bank, queries: np.ndarray, few: np.ndarray) -> dict[str, Any]:
    """faiss's flat index, and whether its nearest are ours; nothing where it is not installed."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(np.asarray(bank.vectors))
    index.search(queries[:16], TOP)
    all_s, (similarity, _) = seconds(lambda: index.search(queries, TOP))
    few_s, _ = seconds(lambda: index.search(few, TOP))
    mine_s, mine = seconds(lambda: bank.nearest(queries, TOP))
    right = np.abs(mine.similarity.reshape(-1, TOP) - similarity) < 1e-5
    return {
        "faiss_s": all_s, "faiss_one_audit_s": few_s, "search_s": mine_s, "faiss_agrees": float(right.mean()),
    }  # fmt: skip


def one_size(number: int, extractions: int, joined: int, rng: np.random.Generator) -> dict[str, Any]:
    """A bank of ``number`` references and so many ``extractions``; the join is timed over ``joined`` references."""
    centres = unit(rng.standard_normal((1000, WIDTH), dtype=np.float32))
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "w")
        write_s, known = seconds(lambda: write_bank(workspace, rng, number, centres))
        asked = extractions_of(rng, extractions, known, centres)
        few = asked.slice(0, ONE_AUDIT)

        def opened(connection: duckdb.DuckDBPyConnection) -> Bank:
            return open_bank(connection, workspace, "bank", "made-up", large=1)

        index_s, bank = seconds(lambda: workspace.asked(opened, '"references"'))
        kept = sum(one.stat().st_size for one in (workspace.files.scratch / store.FOLDER).rglob("*") if one.is_file())
        store._opened.clear()
        open_s, bank = seconds(lambda: workspace.asked(opened, '"references"'))
        connection = duckdb.connect()
        match_extractions(connection, few, {"bank": bank}, 0.75)  # what is compiled is compiled
        few_s, _ = seconds(lambda: match_extractions(connection, few, {"bank": bank}, 0.75))
        warm_s, _ = seconds(lambda: workspace.asked(opened, '"references"'))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        all_s, rows = seconds(lambda: match_extractions(connection, asked, {"bank": bank}, 0.75))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {
            "references": number, "extractions": extractions, "write_s": write_s, "index_s": index_s,
            "index_mib": kept / 2**20, "open_s": open_s, "stamp_s": warm_s, "one_audit_s": few_s, "all_s": all_s,
            "us_an_extraction": 1e6 * all_s / extractions, "memory_mib": after / 1024,
            "memory_grown_mib": (after - before) / 1024, "rows": rows.num_rows,
            **by_faiss(bank, vectors_of(asked), vectors_of(few)),
        }  # fmt: skip
        row |= pages(workspace, few)
        row["join_s"] = by_join(workspace, few, joined) * number / joined
        right_of = [bank.nearest(vectors_of(asked)[one : one + 1], TOP).similarity for one in range(0, extractions, 97)]
        truth = np.stack([exact(bank, vectors_of(asked)[one]) for one in range(0, extractions, 97)])
        row["right"] = float((np.abs(np.stack(right_of) - truth) < 1e-5).mean())
        return row


def pages(workspace: Workspace, few: pa.Table) -> dict[str, float]:
    """Seconds of computing that the report of an audit about the set "bank" takes: the first one, a later one, and
    ``verify``.
    """
    now, audit_id = datetime.now(UTC), few["audit_id"][0].as_py()
    checkpoint = {
        "item_id": "file:made-up", "checkpoint_sha256": "c" * 64, "tensors_sha256": "d" * 64, "name": "made up",
        "identity": "c" * 64, "format": "lora-kohya", "bytes": 1, "claimed_metadata": "{}", "seen_at": now,
    }  # fmt: skip
    audit = {
        "audit_id": audit_id, "checkpoint_sha256": "c" * 64, "tensors_sha256": "d" * 64, "checkpoint_name": "made up",
        "base_name": "made up", "base_revision": "e" * 64, "settings": json.dumps(Settings().as_dict()),
        "training_images": 10, "training_images_source": "user", "images": 500, "evaluations": 50000,
        "weight_change": 0.1, "prediction_change": 0.2, "descriptor": "made-up", "threshold": 0.75, "warnings": [],
        "seconds_sampling": 1.0, "seconds_total": 2.0, "device": "cpu", "versions": "{}", "finished_at": now,
        "captions": [],
    }  # fmt: skip
    of_rows = {"confidence": 0.5, "size": 3, "tightness": 0.9, "index": 0, "members": [0]}
    workspace.write("checkpoints", "made-up", [checkpoint])
    workspace.write("audits", audit_id, [audit])
    workspace.write("extractions", audit_id, [row | of_rows for row in few.to_pylist()])
    match_audit(workspace, audit_id, ["bank"])

    def reported() -> str:
        return write_page(collect(workspace, audit_id, ["bank"]), workspace)

    def verified() -> object:
        return verify_report(workspace, audit_id)

    work: dict[str, Callable[[], Any]] = {
        "page_cpu_s": reported, "later_page_cpu_s": reported, "verify_cpu_s": verified
    }  # fmt: skip
    found = {}
    for name, one in work.items():
        started = time.process_time()
        one()
        found[name] = time.process_time() - started
    return found


def exact(bank: Bank, query: np.ndarray) -> np.ndarray:
    """The highest cosines of all, by one product in float32."""
    return np.sort(np.asarray(bank.vectors) @ query)[::-1][:TOP]


def by_join(workspace: Workspace, few: pa.Table, joined: int) -> float:
    """Seconds that SQL takes for the extractions of one audit, and ``joined`` references."""
    sample = workspace.select(f'SELECT * EXCLUDE (thumbnail) FROM "references" LIMIT {joined}')
    connection = duckdb.connect()
    connection.register("references", sample)
    connection.register("extracted", few)
    return seconds(lambda: connection.sql(SQL).fetchall())[0]


def hash_lookups(number: int, asked: int, checked: int, rng: np.random.Generator) -> dict[str, Any]:
    """Look-ups among ``number`` hashes at distance 31, ``asked`` of them; ``checked`` against looking at every hash."""
    hashes = packed(hashes_of(rng, number))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        shapes = {name: one for name, one in store._shapes(number, 1, number).items() if name in Parts.__annotations__}
        maps = store._maps(Path(folder), shapes, "r+")
        for part in range(len(maps["starts"])):
            maps["starts"][part], maps["others"][part], maps["order"][part] = build_part(hashes, part)
        build_s = time.perf_counter() - started
        bank = Bank(
            pa.nulls(number, pa.string()), np.empty((number, 0), np.float32), hashes, np.full(number, 100, np.int16),
            np.zeros(number, np.int32), None, Parts(maps["starts"], maps["others"], maps["order"]),
        )  # fmt: skip
        rows = rng.integers(number // 10, number, asked)  # near-blank ones are asked about apart
        near = changed(rng, hashes[rows].view(np.uint8).reshape(-1, 32))
        blank = hashes_of(rng, 200)[:20]
        bank.within(near[:2], 31)
        bank.within(near, 31)
        near_s, found = seconds(lambda: bank.within(near, 31))
        blank_s, _ = seconds(lambda: bank.within(blank, 31))
        slow = Bank(bank.ids, bank.vectors, hashes, bank.quality, bank.side)
        both = np.concatenate([near[:checked], blank[: max(checked // 10, 1)]])
        slow_s, truth = seconds(lambda: slow.within(both, 31))
        mine = bank.within(both, 31)
        same = all(one.tolist() == other.tolist() for one, other in zip(mine, truth, strict=True))
    return {
        "hashes": number, "build_s": build_s, "mib": sum(one.nbytes for one in maps.values()) / 2**20,
        "lookups_s": asked / near_s, "blank_lookups_s": len(blank) / blank_s, "every_hash_s": len(both) / slow_s,
        "found": len(found[0]), "pairs": len(truth[0]), "right": float(same),
    }  # fmt: skip


def changed(rng: np.random.Generator, hashes: np.ndarray) -> np.ndarray:
    """Each with 0 to 40 bits the other way."""
    order = rng.random((len(hashes), 256)).argsort(axis=1)
    return np.packbits(np.unpackbits(hashes, axis=1) ^ (order < rng.integers(0, 41, (len(hashes), 1))), axis=1)


def markdown(found: dict[str, Any]) -> str:
    """The tables."""

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,.3f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"

    texts = []
    for rows in (rows for rows in (found.get(part) for part in ("vectors", "indexes", "hashes")) if rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        texts.append(table(names, [[cell(row[name]) if name in row else "absent" for name in names] for row in rows]))
    return "\n\n".join(texts)


def one_index(number: int, extractions: int, json_file: Path | None) -> None:
    """The index of ``number`` references alone. Its row is put into ``json_file`` beside what is there."""
    row = index_alone(number, extractions, np.random.default_rng(2))
    print(markdown({"indexes": [row]}))
    if json_file:
        found = json.loads(json_file.read_text()) if json_file.exists() else {}
        others = [one for one in found.get("indexes", []) if one["references"] != number]
        found["indexes"] = sorted([*others, row], key=lambda one: one["references"])
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if row["right"] < 1:
        out.print("an answer is wrong")
        raise typer.Exit(1)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, a minute.")] = False,
    vectors: Annotated[int | None, typer.Option("--vectors", min=1, help="One index alone, so large.")] = None,
    extractions: Annotated[int, typer.Option("--extractions", min=15, help="That are matched with it.")] = 1000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Print what matching costs by the size of the bank."""
    if vectors is not None:
        one_index(vectors, extractions, json_file)
        return
    rng = np.random.default_rng(1)
    sizes = [(20_000, 300), (100_000, 2_000)] if quick else [(10_000, 10_000), (100_000, 10_000), (1_000_000, 10_000)]
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "vectors": [], "hashes": []}
    for number, asked in sizes:
        out.print(f"{number:,} references, {asked:,} extractions")
        found["vectors"].append(one_size(number, asked, min(number, 20_000 if quick else 100_000), rng))
    for number in [200_000] if quick else [1_000_000, 10_000_000]:
        out.print(f"{number:,} hashes")
        found["hashes"].append(hash_lookups(number, 2_000 if quick else 20_000, 200 if quick else 1_000, rng))
    print(markdown(found))
    if json_file:
        kept = json.loads(json_file.read_text()).get("indexes") if json_file.exists() else None
        json_file.write_text(json.dumps(found | ({"indexes": kept} if kept else {}), indent=1) + "\n")
    wrong = [row for row in [*found["vectors"], *found["hashes"]] if row["right"] < 1]
    slow = found["vectors"][-1]["one_audit_s"] > found["vectors"][-1]["join_s"]
    if wrong or slow:
        out.print("an answer is wrong" if wrong else "the join is faster")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
