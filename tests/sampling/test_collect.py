"""Filling the spool: the same rows with and without threads beside it, and nothing lost where something fails."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from audit.descriptors import Descriptor
from audit.errors import WorkspaceError
from audit.models.pair import ModelPair
from audit.sampling.collect import Collector
from audit.sampling.guidance import Direct
from audit.sampling.sampler import Sampler
from audit.sampling.spooled import SPOOLED, as_generations, vectors_of
from audit.workspace import Spool, Workspace
from tests.conftest import CAPTION


def sampler(pair: ModelPair) -> Sampler:
    return Sampler(pair, Direct(), [CAPTION], steps=2, batch_size=4)


def rows(spool: Spool) -> pa.Table:
    return pa.concat_tables(list(spool.read())).sort_by("index")


def test_threads_beside_the_sampling_change_nothing(
    workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor
) -> None:
    def extracted(name: str, overlap: bool) -> tuple[pa.Table, list[int]]:
        told: list[int] = []
        extract = Collector(sampler(kohya_pair), nano, workspace.spool(name), "a" * 32, 18, True, overlap)
        extract.run(lambda done, total: told.append(done))
        return rows(workspace.spool(name)), told

    (first, told), (second, told_too) = extracted("beside", True), extracted("after", False)
    assert told == told_too == [0, 4, 8, 12, 16, 18]
    assert first.schema.equals(SPOOLED)
    for column in ("index", "seed", "caption", "pdq", "image", "height"):
        assert first[column].equals(second[column])
    np.testing.assert_allclose(vectors_of(first), vectors_of(second), atol=1e-5)


def test_the_next_batch_is_sampled_while_one_is_written(
    workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing waits here until a later batch has been sampled: without overlap this would never end."""
    sampled = threading.Semaphore(0)
    inner = Sampler._decoded

    def decoded(self: Sampler, indices: list[int], latents: object) -> np.ndarray:
        sampled.release()
        return inner(self, indices, latents)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "_decoded", decoded)
    add = Spool.add
    waited: list[bool] = []

    def slow(self: Spool, first: int, table: pa.Table) -> None:
        if first == 0:
            waited.append(sampled.acquire(timeout=60) and sampled.acquire(timeout=60))
        add(self, first, table)

    monkeypatch.setattr(Spool, "add", slow)
    Collector(sampler(kohya_pair), nano, workspace.spool("x"), "a" * 32, 12, True, overlap=True).run()
    assert waited == [True]
    assert workspace.spool("x").indices() == set(range(12))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_batch_that_cannot_be_kept_ends_the_audit_and_loses_no_other(
    workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    add = Spool.add

    def failing(self: Spool, first: int, table: pa.Table) -> None:
        if first == 8:
            raise WorkspaceError("the disk is full")
        add(self, first, table)

    monkeypatch.setattr(Spool, "add", failing)
    spool = workspace.spool("x")
    extract = Collector(sampler(kohya_pair), nano, spool, "a" * 32, 40, True, overlap)
    with pytest.raises(WorkspaceError, match="the disk is full"):
        extract.run()
    kept = spool.indices()
    assert kept >= set(range(8))
    assert kept.isdisjoint({8, 9, 10, 11})
    monkeypatch.undo()
    extract.run()
    assert spool.indices() == set(range(40))
    assert rows(spool)["index"].to_pylist() == list(range(40))


def test_what_is_sampled_when_the_run_is_stopped_is_kept(
    workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    spool = workspace.spool("x")
    with pytest.raises(KeyboardInterrupt):
        Collector(sampler(kohya_pair), nano, spool, "a" * 32, 40, True, overlap=True).run(stop)
    assert spool.indices() >= {0, 1, 2, 3}


def test_only_what_is_kept_becomes_a_png(workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor) -> None:
    spool = workspace.spool("x")
    one = sampler(kohya_pair)
    Collector(one, nano, spool, "a" * 32, 4, True).run()
    [batch] = spool.read()
    made = as_generations(batch, {1, 3})
    assert [picture is not None for picture in made["image"].to_pylist()] == [False, True, False, True]
    [direct] = one.batches(range(4))
    for number in (1, 3):
        with Image.open(io.BytesIO(made["image"][number].as_py())) as picture:
            assert np.array_equal(np.asarray(picture), direct.images[number])


def test_without_pixels_the_spool_has_none(workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor) -> None:
    spool = workspace.spool("x")
    Collector(sampler(kohya_pair), nano, spool, "a" * 32, 4, pixels=False).run()
    [batch] = spool.read()
    assert batch["image"].null_count == 4
    assert as_generations(batch, {0, 1})["image"].null_count == 4


def test_what_an_older_version_left_in_the_spool_is_sampled_again(
    workspace: Workspace, kohya_pair: ModelPair, nano: Descriptor
) -> None:
    spool = workspace.spool("x")
    old = Path(workspace.root) / "spool" / "x" / "00000000.parquet"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"PAR1 of another schema")
    Collector(sampler(kohya_pair), nano, spool, "a" * 32, 4, True).run()
    assert spool.indices() == {0, 1, 2, 3}
