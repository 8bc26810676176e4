"""What sets are made of beside folders: tars and Parquet, whole, hostile and broken."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import add_references
from audit.config import CrawlSettings
from audit.demo import set_folder
from audit.errors import ConfigError, ReferenceSetError
from audit.references import ReferenceSets
from audit.references.inputs import parquet, tars
from audit.references.inputs.metadata import plain
from audit.workspace import Workspace

TRAIN = set_folder("fluent-animals", "train")
FILES = sorted(TRAIN.glob("*.png"))
QUICK = CrawlSettings(rate=0, retries=0)


def rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    found = workspace.rows('SELECT * FROM "references" ORDER BY name')
    return {row["name"]: row | {"metadata": plain(row["metadata"])} for row in found}


def add(workspace: Workspace, source: Any, **more: Any) -> dict[str, str]:
    """Add it as the set "a", by PDQ; what was passed over."""
    added = add_references("a", source, descriptor="pdq", workspace=workspace, crawl=QUICK, **more)
    return {one.name: one.reason for one in added.skipped}


def tar_of(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], **how: Any) -> Path:
    with tarfile.open(path, "w", **how) as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


# Tars


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_of_img2dataset_is_read_with_what_stands_beside(
    workspace: Workspace, tmp_path: Path, kind: int
) -> None:
    long = "d/" * 60 + "x" * 80 if kind != tarfile.USTAR_FORMAT else "d" * 60
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for number, path in enumerate(FILES[:3]):
        key = f"{number:09d}" if number else long
        about = {"caption": f"<b>{number}</b>", "url": "https://x.org/a", "exif": "e" * 5000, "width": 5}
        members += [(f"{key}.png", path.read_bytes()), (f"{key}.json", json.dumps(about).encode()),
                    (f"{key}.txt", b"a caption")]  # fmt: skip
    shard = tar_of(tmp_path / "00000.tar", members, format=kind)
    assert add(workspace, shard) == {}
    found = rows(workspace)
    assert sorted(found) == sorted([f"00000.tar/{long}.png", "00000.tar/000000001.png", "00000.tar/000000002.png"])
    one = found["00000.tar/000000001.png"]
    assert one["metadata"] == {"caption": "<b>1</b>", "text": "a caption", "url": "https://x.org/a", "width": 5}
    assert one["reference_id"] == hashlib.sha256(FILES[1].read_bytes()).hexdigest()


def test_tars_within_a_folder_are_read_behind_its_pictures(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "in/shards").mkdir(parents=True)
    shutil.copy(FILES[0], tmp_path / "in/one.png")
    tar_of(tmp_path / "in/shards/0.tar", [("k.png", FILES[1].read_bytes())])
    (tmp_path / "in/notes.md").write_text("x")
    assert list(add(workspace, tmp_path / "in")) == ["notes.md"]
    assert list(rows(workspace)) == ["one.png", "shards/0.tar/k.png"]
    (tmp_path / "in/one.png").unlink()
    add(workspace, tmp_path / "in")
    assert list(rows(workspace)) == ["shards/0.tar/k.png"]


def test_what_a_tar_should_not_hold_is_passed_over(workspace: Workspace, tmp_path: Path) -> None:
    png = FILES[0].read_bytes()
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        ("../../etc/evil.png", png),
        ("/abs.png", FILES[1].read_bytes()),
    ]
    for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE),
                       ("folder", tarfile.DIRTYPE), ("pipe", tarfile.FIFOTYPE)):  # fmt: skip
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        members.append((info, b""))
    members += [("bad.png", b"no"), ("run.sh", b"x"), ("j.png", FILES[2].read_bytes()), ("j.json", b"[" * 5000),
                ("big.json", b"x" * (tars.MOST_BESIDE + 1))]  # fmt: skip
    skipped = add(workspace, tar_of(tmp_path / "s.tar", members))
    assert sorted(rows(workspace)) == ["s.tar/../../etc/evil.png", "s.tar//abs.png"]
    assert not (tmp_path.parent / "etc").exists()
    assert {name.removeprefix("s.tar/"): reason[:9] for name, reason in skipped.items()} == {
        "link.png": "a link in", "hard.png": "a hard li", "dev.png": "a device ", "pipe": "a pipe in",
        "bad.png": "not a rea", "run.sh": "the endin", "j.png": "j.json be",
    }  # fmt: skip


def test_a_tar_that_is_not_whole_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "w.tar", [("a.png", FILES[0].read_bytes()), ("b.png", FILES[1].read_bytes())])
    content = whole.read_bytes()
    header = bytearray(content[:512])
    huge = header[:]
    huge[124:136] = b"\x80" + b"\xff" * 11
    size = -(-len(FILES[0].read_bytes()) // 512) * 512 + 512
    for number, (broken, why) in enumerate([
        (content[:size], "without the end mark"), (content[: size - 512], "ends within the member at byte 0"),
        (content[: size + 300], "without the end mark"),
        (bytes(header[:20]) + b"X" + content[21:], "damaged at byte 0"),
        (bytes(huge) + content[512:], "damaged at byte 0"), (b"", "ends at byte 0"), (b"\x1f\x8b" + content, "no tar"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.tar"
        path.write_bytes(broken)
        with pytest.raises(ReferenceSetError, match=why):
            add(workspace, path)
        assert ReferenceSets(workspace).list() == []


def test_an_extended_header_is_bounded(workspace: Workspace, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"comment": "x" * tars.MOST_NAMES}
    path = tar_of(tmp_path / "p.tar", [(info, FILES[0].read_bytes())], format=tarfile.PAX_FORMAT)
    with pytest.raises(ReferenceSetError, match="an extended header of"):
        add(workspace, path)


# Parquet


def parquet_of(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def test_pictures_within_parquet_are_read(workspace: Workspace, tmp_path: Path) -> None:
    image = [{"bytes": path.read_bytes(), "path": path.name} for path in FILES]
    image[2]["bytes"] = None
    image[3]["bytes"] = b"no picture"
    path = parquet_of(tmp_path / "d.parquet", image=image, label=list(range(len(FILES))), text=["t"] * len(FILES))
    skipped = add(workspace, path)
    assert {name.split(" ")[0] for name in skipped} == {"d.parquet/2", "d.parquet/3"}
    found = rows(workspace)
    assert len(found) == len(FILES) - 2
    one = found[f"d.parquet/5 {FILES[5].name}"]
    assert one["metadata"] == {"label": 5, "text": "t"}
    assert one["reference_id"] == hashlib.sha256(FILES[5].read_bytes()).hexdigest()
    plain_bytes = parquet_of(tmp_path / "e.parquet", jpg=[path.read_bytes() for path in FILES[:2]], key=["a", "b"])
    assert add(workspace, plain_bytes) == {}
    assert list(rows(workspace)) == ["e.parquet/0 a", "e.parquet/1 b"]


@pytest.fixture
def vectors(tmp_path: Path) -> Callable[..., Path]:
    def made(**more: Any) -> Path:
        rng = np.random.default_rng(0)
        found = rng.normal(size=(9, 256)).astype(np.float16).tolist()
        found[1][0] = float("nan")
        found[2] = [0.0] * 256
        found[3] = found[3][:-1]
        found[4] = None
        found[5][7] = float("inf")
        columns = {"embedding": found, "url": [f"https://x.org/{n % 8}" for n in range(9)],
                   "caption": ["c"] * 8 + ["\x1b[31mred"], **more}  # fmt: skip
        return parquet_of(tmp_path / "v.parquet", **columns)

    return made


def test_vectors_are_taken_over_at_length_one(workspace: Workspace, vectors: Callable[..., Path]) -> None:
    skipped = add(workspace, vectors(), described_by="pdq")
    assert {name.removeprefix("v.parquet, row "): reason for name, reason in skipped.items()} == {
        "1": "its vector is not finite", "2": "its vector is zero, and near to nothing",
        "3": "a vector of 255 numbers: pdq has 256", "4": "no vector: pdq has 256", "5": "its vector is not finite",
    }  # fmt: skip
    found = workspace.rows('SELECT * FROM "references" ORDER BY name')
    assert [row["name"] for row in found] == ["https://x.org/0"] * 2 + ["https://x.org/6", "https://x.org/7"]
    assert np.allclose([np.linalg.norm(row["descriptor"]) for row in found], 1, atol=1e-6)
    assert {row["descriptor_name"] for row in found} == {"pdq"}
    assert any("\\x1b" in row["metadata"] for row in found)


def test_ids_of_vectors_are_taken_over_and_held_to_be_one_each(
    workspace: Workspace, vectors: Callable[..., Path]
) -> None:
    ids = [f"{number % 7:064x}" for number in range(9)]
    skipped = add(workspace, vectors(sha256=ids, pdq=[bytes([n]) * 32 for n in range(9)]), described_by="pdq")
    assert [name for name, reason in skipped.items() if "a row before" in reason] == ["v.parquet, row 7"]
    found = workspace.rows('SELECT reference_id, pdq FROM "references" ORDER BY reference_id')
    assert [row["reference_id"] for row in found] == [ids[0], ids[8], ids[6]]
    assert found[1]["pdq"] == bytes([8]) * 32


def test_vectors_of_another_descriptor_are_refused(workspace: Workspace, vectors: Callable[..., Path]) -> None:
    for more, why in (
        ({"described_by": "sscd_disc_mixup@0123"}, "said to be by 'sscd_disc_mixup@0123'"),
        ({"described_by": None}, "no column of pictures"),
    ):
        with pytest.raises(ReferenceSetError, match=why):
            add(workspace, vectors(), **more)
    with pytest.raises(ConfigError, match="they can be no decoys"):
        add(workspace, vectors(), described_by="pdq", kind="background")
    assert ReferenceSets(workspace).list() == []


def test_parquet_that_is_none_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    whole = parquet_of(tmp_path / "a.parquet", embedding=[[0.5] * 256] * 9).read_bytes()
    for number, (content, why) in enumerate([
        (b"", "not a readable Parquet file"), (b"PAR1" + b"x" * 50 + b"PAR1", "not a readable Parquet file"),
        (whole[:8] + bytes(len(whole) // 2) + whole[8 + len(whole) // 2 :], "not a readable Parquet"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(content)
        with pytest.raises(ReferenceSetError, match=why):
            add(workspace, path, described_by="pdq")
    for columns, why in (({"x": [1]}, "no column of vectors"), ({"a": [[0.5]], "b": [[0.5]]}, "vectors: a, b"),
                         ({"embedding": [[0.0] * 256]}, "no vector of 1 files can be used")):  # fmt: skip
        with pytest.raises(ReferenceSetError, match=why):
            add(workspace, parquet_of(tmp_path / "b.parquet", **columns), described_by="pdq")
    assert ReferenceSets(workspace).list() == []


def test_columns_are_told_by_their_kinds(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "k.parquet", v=[[1.0]], s=["x"], n=[1], b=[b"x"], o=[[1]], image=[{"bytes": b"x"}])
    known = parquet.columns_of(path)
    assert known.kinds == {"v": "vector", "s": "text", "n": "number", "b": "binary", "o": "other", "image": "picture"}
    assert (known.vectors, known.pictures, known.beside) == ("v", "image", ["s", "n"])


@pytest.mark.parametrize(
    "wrong",
    [{"rows": 0}, {"rows": True}, {"rows": None}, {"rows": 10**9}, {"sizes": [1]}, {"sizes": None}, {"sizes": [1, -1]},
     {"sizes": [1, "1"]}, {"paths": ["a"]}, {"beside": None}, {"beside": {"a": [1]}}, {"beside": {"a": 2}}],
)  # fmt: skip
def test_rows_of_a_child_that_was_taken_over_are_none(wrong: dict[str, Any]) -> None:
    good = {"rows": 2, "sizes": [1, None], "paths": ["a", None], "beside": {"a": [1, None]}}
    assert parquet._count(good, Path("x.parquet"), "sizes", "paths") == 2
    with pytest.raises(ReferenceSetError, match="answers"):
        parquet._count({**good, **wrong}, Path("x.parquet"), "sizes", "paths")


def test_a_length_of_many_digits_is_no_extended_header(tmp_path: Path) -> None:
    digits = b"0" * 5000
    body = b"060000" + digits + b" path=b.png\n"
    assert tars._longer(b"x", body.ljust(60_000, b"x")) == {}
