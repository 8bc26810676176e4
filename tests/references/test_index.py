"""The index against brute force: vectors and hashes of every kind, and files that are damaged, old or half made."""

from __future__ import annotations

import errno
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.demo import set_folder
from audit.descriptors import Descriptor
from audit.errors import ReferenceSetError, WorkspaceError
from audit.references import ReferenceSets
from audit.references.index import Bank, forget, open_bank, products, store
from audit.references.index import quantized as quantized_rows
from audit.references.index.hashes import BRUTE, build_parts, packed
from audit.references.index.quantized import quantized
from audit.schemas import REFERENCES
from audit.workspace import Workspace


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def bank_of(vectors: np.ndarray, hashes: np.ndarray | None = None, quality: int = 100, fast: bool = True) -> Bank:
    number = len(vectors)
    bits = packed(np.zeros((number, 32), np.uint8) if hashes is None else hashes)
    parts = build_parts(bits) if fast and hashes is not None else None
    return Bank(
        pa.array([f"{one:07d}" for one in range(number)]), vectors, bits, np.full(number, quality, np.int16),
        np.full(number, 500, np.int32), quantized(vectors) if fast else None, parts,
    )  # fmt: skip


def of_kind(kind: str, rng: np.random.Generator, number: int, width: int) -> np.ndarray:
    """Vectors that are spread out, in tight clusters, all but equal, or of one large number each."""
    if kind == "spread":
        return unit(rng.standard_normal((number, width)))
    if kind == "clusters":
        return unit(rng.standard_normal((5, width))[rng.integers(0, 5, number)] + rng.normal(0, 0.02, (number, width)))
    if kind == "equal":
        return unit(np.ones((number, width)) + rng.normal(0, 1e-4, (number, width)))
    return unit(np.eye(width)[rng.integers(0, width, number)] + rng.normal(0, 1e-3, (number, width)))


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(["spread", "clusters", "equal", "spikes"]), seed=st.integers(0, 2**32 - 1),
    number=st.integers(1, 4000), width=st.sampled_from([8, 64, 256, 2048]), top=st.integers(1, 12),
    asked=st.integers(1, 40),
)  # fmt: skip
def test_the_nearest_are_those_of_brute_force(
    kind: str, seed: int, number: int, width: int, top: int, asked: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = of_kind(kind, rng, number, width)
    queries = np.concatenate([of_kind(kind, rng, asked, width), vectors[:3]])
    truth = queries.astype(np.float64) @ vectors.astype(np.float64).T
    for fast in (True, False):
        found = bank_of(vectors, fast=fast).nearest(queries, top)
        for number_of, cosines in enumerate(truth):
            mine = found.query == number_of
            best = np.sort(cosines)[::-1][:top]
            assert mine.sum() == len(best)
            assert np.allclose(found.similarity[mine], best, atol=1e-6)
            assert np.allclose(cosines[found.row[mine]], best, atol=1e-6)


@pytest.mark.parametrize("wrong", ["saturated", "missing"])
def test_processors_whose_products_are_not_exact_are_asked_for_float32(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    inner = torch._int_mm

    def saturated(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return inner(first, second).clamp(-(2**15), 2**15 - 1)

    def missing(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("there is none")

    vectors = of_kind("clusters", np.random.default_rng(3), 2000, 64)
    right = bank_of(vectors, fast=False).nearest(vectors[:9], 5)
    products.are_exact.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", {"saturated": saturated, "missing": missing}[wrong])
        assert not products.are_exact()
        assert bank_of(vectors).nearest(vectors[:9], 5).row.tolist() == right.row.tolist()
    products.are_exact.cache_clear()


def test_of_equal_references_the_first_ids_are_taken() -> None:
    vectors = np.repeat(unit(np.random.default_rng(0).standard_normal((1, 64))), 3000, axis=0)
    for fast in (True, False):
        assert bank_of(vectors, fast=fast).nearest(vectors[:1], 4).row.tolist() == [0, 1, 2, 3]


def skewed(rng: np.random.Generator, number: int) -> np.ndarray:
    """Hashes of which a third are of blank and nearly blank pictures, and a third copies of each other."""
    hashes = rng.integers(0, 256, (number, 32), dtype=np.uint8)
    hashes[: number // 3] = 0
    hashes[: number // 6, 0] = rng.integers(0, 4, number // 6)
    hashes[-(number // 3) :] = hashes[0] ^ 0x55
    return hashes


def flipped(rng: np.random.Generator, hashes: np.ndarray, most: int) -> np.ndarray:
    """Each with some bits the other way."""
    bits = np.unpackbits(hashes, axis=1)
    for row in bits:
        row[rng.choice(256, rng.integers(0, most), replace=False)] ^= 1
    return np.packbits(bits, axis=1)


@pytest.mark.parametrize("make", [skewed, lambda rng, number: rng.integers(0, 256, (number, 32), dtype=np.uint8)])
def test_the_hashes_within_a_distance_are_those_of_brute_force(make: Any) -> None:
    rng = np.random.default_rng(1)
    hashes = make(rng, BRUTE)
    asked = flipped(rng, hashes[rng.integers(0, len(hashes), 60)], 45)
    vectors = np.ones((len(hashes), 1), np.float32)
    fast, slow = (bank_of(vectors, hashes, fast=one).within(asked, 31) for one in (True, False))
    assert len(slow[0]) > 10
    for mine, theirs in zip(fast, slow, strict=True):
        assert mine.tolist() == theirs.tolist()
    assert fast[2].max() == 31


def test_every_distance_up_to_31_is_found() -> None:
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 256, (BRUTE, 32), dtype=np.uint8)
    bits = np.unpackbits(np.repeat(hashes[7:8], 34, axis=0), axis=1)
    for distance, row in enumerate(bits):  # spread over the parts as evenly as can be, which is hardest to find
        row[[(one % 16) * 16 + one // 16 for one in range(distance)]] ^= 1
    found = bank_of(np.ones((BRUTE, 1), np.float32), hashes).within(np.packbits(bits, axis=1), 31)
    assert [(query, bits) for query, row, bits in zip(*found, strict=True) if row == 7] == [(n, n) for n in range(32)]


def test_hashes_that_say_nothing_are_near_to_nothing() -> None:
    hashes = np.zeros((BRUTE, 32), np.uint8)
    bank = bank_of(np.ones((BRUTE, 1), np.float32), hashes, quality=49, fast=False)
    assert not len(bank.within(hashes[:5], 31)[0])


def test_what_is_no_direction_or_of_another_width_is_refused() -> None:
    bank = bank_of(of_kind("spread", np.random.default_rng(0), 50, 16))
    for wrong, why in ((np.zeros((1, 16)), "zero"), (np.full((1, 16), np.nan), "not finite"), (np.ones((1, 8)), "8")):
        with pytest.raises(ReferenceSetError, match=why):
            bank.nearest(wrong.astype(np.float32), 3)


# What is kept of a set


def put(workspace: Workspace, vectors: np.ndarray, name: str = "big", at: int = 0) -> None:
    rng = np.random.default_rng(9)
    rows = [
        {"reference_set": name, "reference_id": f"{number:064d}", "name": f"{number}", "width": 64, "height": 64,
         "descriptor_name": "d", "descriptor": vector, "pdq": rng.bytes(32), "pdq_quality": 90,
         "added_at": datetime(2026, 1, 1, 0, 0, at, tzinfo=UTC)}
        for number, vector in enumerate(vectors)
    ]  # fmt: skip
    workspace.write("references", f"{name}.d", pa.Table.from_pylist(rows, schema=REFERENCES))


def opened(workspace: Workspace, name: str = "big") -> Bank:
    store._opened.clear()  # as another process would

    def ask(connection: duckdb.DuckDBPyConnection) -> Bank:
        return open_bank(connection, workspace, name, "d", large=1)

    return workspace.asked(ask, '"references"')


def folders(workspace: Workspace) -> list[Path]:
    return sorted((workspace.files.scratch / store.FOLDER).iterdir())


@pytest.fixture
def vectors() -> np.ndarray:
    return of_kind("clusters", np.random.default_rng(4), 300, 32)


def test_a_kept_index_is_used_until_its_set_changes(workspace: Workspace, vectors: np.ndarray) -> None:
    put(workspace, vectors)
    first = opened(workspace)
    assert isinstance(first.vectors, np.memmap)
    assert np.allclose(first.vectors, vectors, atol=1e-6)
    [kept] = folders(workspace)
    made = kept.stat().st_mtime_ns
    opened(workspace)
    assert [one.stat().st_mtime_ns for one in folders(workspace)] == [made]
    put(workspace, vectors[::-1], at=1)  # the same number, other pictures
    assert np.allclose(opened(workspace).vectors, vectors[::-1], atol=1e-6)
    [changed] = folders(workspace)
    assert changed != kept
    assert np.allclose(first.vectors, vectors, atol=1e-6)  # who has the old one open still reads it
    put(workspace, vectors, "other")
    opened(workspace, "other")
    forget(workspace.files.scratch, "big")
    assert len(folders(workspace)) == 1


@pytest.mark.parametrize("name", ["vectors.bin", "numbers.bin", "hashes.bin", "ids.arrow", store.META])
@pytest.mark.parametrize("how", ["bit", "short", "gone"])
def test_a_damaged_index_is_made_again(workspace: Workspace, vectors: np.ndarray, name: str, how: str) -> None:
    put(workspace, vectors)
    before = opened(workspace).nearest(vectors[:5], 3)
    [kept] = folders(workspace)
    content = bytearray((kept / name).read_bytes())
    content[len(content) // 2] ^= 0x40
    if how == "gone":
        (kept / name).unlink()
    else:
        (kept / name).write_bytes(content if how == "bit" else content[:-7])
    after = opened(workspace).nearest(vectors[:5], 3)
    assert after.row.tolist() == before.row.tolist()
    assert after.similarity.tolist() == before.similarity.tolist()


@pytest.mark.parametrize(
    "said",
    [{"references": 100}, {"references": 10**30}, {"width": 16}, {"files": []}, {"files": {"vectors.bin": 1}}, []],
)
def test_an_index_that_says_something_else_of_itself_is_made_again(
    workspace: Workspace, vectors: np.ndarray, said: Any
) -> None:
    put(workspace, vectors)
    opened(workspace)
    [kept] = folders(workspace)
    meta = json.loads((kept / store.META).read_text())
    (kept / store.META).write_text(json.dumps({**meta, **said} if isinstance(said, dict) else said))
    assert opened(workspace).nearest(vectors[-1:], 1).similarity[0] == pytest.approx(1, abs=1e-6)


def test_a_set_that_becomes_small_or_is_removed_leaves_nothing(
    workspace: Workspace, vectors: np.ndarray, nano: Descriptor
) -> None:
    sets = ReferenceSets(workspace)
    for again in (lambda: sets.add("big", set_folder("fluent-animals", "train"), nano), lambda: sets.remove("big")):
        put(workspace, vectors)
        opened(workspace)
        [kept] = folders(workspace)
        kept.with_name(f".{kept.name}-killed").mkdir()
        again()
        assert not folders(workspace)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is mapped in")
def test_what_was_read_of_a_mapped_file_is_let_go_of(
    workspace: Workspace, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_rows, "LET_GO", 1)
    wide = of_kind("spread", np.random.default_rng(6), 4096 * 3, 64)
    put(workspace, wide)
    bank = opened(workspace)

    def resident(array: np.ndarray) -> int:
        """KiB of the file that this process has mapped in."""
        name = f"/{Path(array.filename).name}\n"  # type: ignore[attr-defined]
        lines = Path("/proc/self/smaps").read_text().splitlines(keepends=True)
        at = next(number for number, line in enumerate(lines) if line.endswith(name) and "index" in line)
        return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1])

    assert bank.quantized is not None
    for array, search in (
        (bank.quantized.numbers, lambda: bank.nearest(wide[:4], 3)), (bank.vectors, lambda: bank.best(wide[:400])),
    ):  # fmt: skip
        assert np.asarray(array).sum() is not None  # all of it is mapped in
        before = resident(array)
        assert search() is not None
        assert resident(array) < before / 2
    truth = np.sort(wide[:4] @ wide.T, axis=1)[:, ::-1][:, :3]
    assert np.allclose(bank.nearest(wide[:4], 3).similarity.reshape(4, 3), truth, atol=1e-6)


def test_a_full_disk_is_an_error_in_words_and_leaves_nothing(
    workspace: Workspace, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put(workspace, vectors)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WorkspaceError, match=r"No space left on device.*free them"):
        opened(workspace)
    assert not folders(workspace)


def test_what_is_kept_is_its_owners_alone(workspace: Workspace, vectors: np.ndarray) -> None:
    put(workspace, vectors)
    opened(workspace)
    [kept] = folders(workspace)
    for path in (kept.parent, kept, *kept.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_of_two_that_make_an_index_at_once_one_counts(
    workspace: Workspace, vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(workspace, vectors)
    before = opened(workspace).nearest(vectors[:5], 3)
    [kept] = folders(workspace)
    kept.rename(tmp_path / "other")
    inner = store._write_parts

    def meanwhile(*arguments: Any) -> None:
        inner(*arguments)
        shutil.copytree(tmp_path / "other", kept)  # another process is done first

    monkeypatch.setattr(store, "_write_parts", meanwhile)
    assert opened(workspace).nearest(vectors[:5], 3).row.tolist() == before.row.tolist()
    assert folders(workspace) == [kept]


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_an_index_of_a_set_that_went_while_it_was_made_is_not_kept(
    workspace: Workspace, vectors: np.ndarray, how: str
) -> None:
    put(workspace, vectors)

    def ask(connection: duckdb.DuckDBPyConnection) -> Bank:  # over tables as they were before
        if how == "replaced":
            put(workspace, vectors[:200], at=1)
        else:
            workspace.remove("references", "big.d")
        forget(workspace.files.scratch, "big")
        return open_bank(connection, workspace, "big", "d", large=1)

    assert len(workspace.asked(ask, '"references"')) == 300  # whoever asked over them has an answer
    assert not folders(workspace)


def test_a_set_that_is_removed_while_it_is_indexed_is_said_to_be(
    workspace: Workspace, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = store._write_parts

    def meanwhile(*arguments: Any) -> None:
        inner(*arguments)
        for begun in folders(workspace):  # as another process forgets the set
            shutil.rmtree(begun)

    put(workspace, vectors)
    monkeypatch.setattr(store, "_write_parts", meanwhile)
    with pytest.raises((WorkspaceError, ReferenceSetError), match="replaced or removed while it was indexed"):
        opened(workspace)
    assert not folders(workspace)


def test_a_half_made_index_does_not_count(workspace: Workspace, vectors: np.ndarray) -> None:
    put(workspace, vectors)
    opened(workspace)
    [kept] = folders(workspace)
    (kept / store.META).unlink()  # it is written last
    kept.rename(kept.with_name(f".{kept.name}-killed"))
    assert len(opened(workspace)) == len(vectors)


def test_vectors_of_several_widths_and_those_that_are_no_direction_are_refused(
    workspace: Workspace, vectors: np.ndarray
) -> None:
    put(workspace, vectors)
    put(workspace, np.concatenate([vectors[:3], np.zeros((1, 32), np.float32)]), "zero")
    with pytest.raises(ReferenceSetError, match="in the set 'zero' is zero"):
        opened(workspace, "zero")
    assert not [one for one in folders(workspace) if one.name.startswith(".")]
    workspace.write("references", "big.more", pa.Table.from_pylist(
        [{"reference_set": "big", "reference_id": "x", "descriptor_name": "d", "descriptor": [1.0, 0.0]}],
        schema=REFERENCES,
    ))  # fmt: skip
    with pytest.raises(ReferenceSetError, match=r"vectors of (2 and of 32|32 and of 2) numbers"):
        opened(workspace)
