"""The spool survives damage and two workers at once."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pytest

from audit.errors import WorkspaceError
from audit.stages.cluster import first_of_each
from audit.workspace import Workspace


def batch(*numbers: int) -> pa.Table:
    return pa.table({"index": pa.array(numbers, pa.int32()), "caption": [str(number) for number in numbers]})


def numbers(batches: Iterable[pa.Table]) -> list[int]:
    return sorted(number for one in batches for number in one["index"].to_pylist())


def test_a_damaged_batch_is_sampled_again(workspace: Workspace) -> None:
    spool = workspace.spool("a")
    spool.add(0, batch(0, 1))
    spool.add(2, batch(2, 3))
    path = workspace.root / "spool/a/raw-00000002.parquet"
    path.write_bytes(path.read_bytes()[:30])
    assert numbers(spool.read()) == [0, 1]
    assert not path.exists()
    spool.add(2, batch(2, 3))
    assert numbers(spool.read()) == [0, 1, 2, 3]


def test_a_damaged_batch_of_a_finished_audit_is_refused_and_sampled_again(workspace: Workspace) -> None:
    spool = workspace.spool("a")
    spool.add(0, batch(0, 1))
    spool.finish({})
    (workspace.root / "spool/a/raw-00000000.parquet").write_bytes(b"")
    with pytest.raises(WorkspaceError, match="run the audit again"):
        list(spool.read())
    assert spool.finished() is None
    assert list(spool.read()) == []


def test_damage_beside_the_images_of_a_finished_audit_takes_nothing_from_them(workspace: Workspace) -> None:
    spool, beside = workspace.spool("a"), workspace.spool("a", "control-")
    spool.add(0, batch(0, 1))
    spool.finish({"images": 2})
    beside.add(0, batch(0, 1))
    beside.add(2, batch(2))
    (workspace.root / "spool/a/control-00000002.parquet").write_bytes(b"")
    assert numbers(beside.read()) == [0, 1]
    assert spool.finished() == {"images": 2}
    beside.clear()
    assert list(beside.read()) == []
    assert numbers(spool.read()) == [0, 1]


def test_an_image_that_two_workers_sampled_counts_once(workspace: Workspace) -> None:
    spool = workspace.spool("a")
    spool.add(0, batch(0, 1, 2))
    spool.add(2, batch(2, 3))
    assert spool.indices() == {0, 1, 2, 3}
    rows = first_of_each(spool.read())
    assert rows is not None
    assert rows["index"].to_pylist() == [0, 1, 2, 3]
    assert first_of_each([]) is None
