"""Zips of training images from strangers: nothing leaves the folder, nothing explodes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from audit.errors import FetchError
from audit.files import Files
from crawlers import training_data
from crawlers.training_data import unpack


def png(color: str = "red", size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    buffer.seek(0)
    return buffer


def test_pictures_and_their_captions_come_out_under_numbers(tmp_path: Path) -> None:
    files = {"set/b.png": png("blue"), "set/b.txt": b"a blue\nsquare", "set/a.jpg": png(), "notes.md": b"hi"}
    found = unpack(packed(files), Files(tmp_path), "out")
    assert found == [{"file": "0001.png", "caption": ""}, {"file": "0002.png", "caption": "a blue square"}]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.png", "0002.png"]
    assert Image.open(tmp_path / "out/0002.png").getpixel((0, 0)) == (0, 0, 255)


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    names = ["../evil.png", "/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png", "x" * 5000 + ".png"]
    found = unpack(packed({name: png() for name in names}), Files(tmp_path), "out")
    assert len(found) == len(names)
    everything = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert everything == {"out"}


def test_pictures_that_are_none_are_passed_over(tmp_path: Path) -> None:
    found = unpack(packed({"a.png": b"no picture", "b.png": png(), "c.gif": b"GIF89a"}), Files(tmp_path), "out")
    assert [one["file"] for one in found] == ["0001.png"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("MAX_MEMBERS", 2, "files, at most"), ("MAX_PICTURES", 2, "more than 2 pictures"),
     ("MAX_PICTURE_BYTES", 50, "far more"), ("MAX_UNPACKED_BYTES", 100, "unpacks to more")],
)  # fmt: skip
def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int, words: str) -> None:
    monkeypatch.setattr(training_data, name, value)
    with pytest.raises(FetchError, match=words):
        unpack(packed({f"{number}.png": png() for number in range(3)}), Files(tmp_path), "out")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    bomb = packed({"a.png": b"\0" * (20 * 1024**2)})
    assert len(bomb.getvalue()) < 50_000
    with pytest.raises(FetchError, match="far more"):
        unpack(bomb, Files(tmp_path), "out")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + b"\0" * 100])
def test_what_is_no_zip_is_said(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FetchError, match="no readable zip"):
        unpack(io.BytesIO(content), Files(tmp_path), "out")


def test_a_zip_without_pictures_is_said(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no picture"):
        unpack(packed({"readme.txt": b"sorry"}), Files(tmp_path), "out")
