"""Headers from strangers: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from audit.errors import CheckpointError
from audit.models.safetensors_header import MAX_HEADER_BYTES, read_header

GOOD = save({"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, {"ss_steps": "10"})


def file_with(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "f", {"k": "v"})
    header = read_header(tmp_path / "f")
    assert header.metadata == {"k": "v"}
    assert header.tensors["a"].shape == (2, 3)
    assert header.tensors["b"].dtype == "BF16"
    assert header.data_start + 24 + 8 == header.file_bytes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty or truncated"),
        (b"\x01\x02", "empty or truncated"),
        (b"PK\x03\x04" + b"x" * 100, "zip archive"),
        (b"\x80\x04\x95" + b"x" * 100, "Python pickle"),
        (b"<!DOCTYPE html><title>log in</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
    ],
)
def test_other_formats_are_named_and_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x028020, 0x0580])
def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path: Path, length: int) -> None:
    header = json.dumps({"a": entry()}).encode().ljust(length)
    assert list(read_header(file_with(tmp_path / "f", header, b"\0" * 8)).tensors) == ["a"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_a_header_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = file_with(tmp_path / "f", b"{}", length=MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match="made to exhaust memory"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry()}, b"\0" * 4, "truncated"),
        ({"a": entry()}, b"\0" * 12, "no tensor declares"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "overlaps"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "gap"),
        ({"a": entry(shape=(3,))}, b"\0" * 8, "does not fit its shape"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "impossible shape"),
        ({"a": entry(shape=(1,) * 9)}, b"\0" * 8, "impossible shape"),
        ({"a": entry(dtype="PICKLE")}, b"\0" * 8, "unknown type"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype"),
        ({"a": [1, 2]}, b"", "lacks dtype"),
        ({"__metadata__": {"k": 1}, "a": entry()}, b"\0" * 8, "not an object of strings"),
        ({}, b"", "no tensors"),
        ([], b"", "not an object"),
        (b"{" * 5000, b"", "damaged"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"\xff\xfe", b"", "damaged"),
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_header(file_with(tmp_path / "f", header, data))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=0, max_size=8), st.integers(0, len(GOOD)))
def test_any_mangled_file_reads_or_raises_our_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, patch: bytes, keep: int
) -> None:
    mangled = (GOOD[:position] + patch + GOOD[position + len(patch) :])[:keep]
    path = tmp_path_factory.getbasetemp() / "mangled.safetensors"
    path.write_bytes(mangled)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert header.data_start + sum(t.end - t.start for t in header.tensors.values()) == len(mangled)


@pytest.mark.parametrize("length", [500, 501, 1_000_000])
def test_a_name_of_more_than_500_characters_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a" * length: torch.zeros(2)}, path)
    if length <= 500:
        assert len(read_header(path).tensors) == 1
    else:
        with pytest.raises(CheckpointError, match=f"a name of {length} characters, at most 500 are read"):
            read_header(path)
