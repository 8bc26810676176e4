"""Headers, documents and tokenizers through the boundary: the same as before, or refused by the caller's own error."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models import tokenizers
from audit.models.base import locate_base
from audit.models.limits import check_configs
from audit.models.safetensors_header import parse_header, read_header
from audit.untrusted import pool as pools
from audit.untrusted.documents import parse_json
from audit.untrusted.headers import _header
from audit.untrusted.limits import ChildLimits
from audit.untrusted.pool import Pool, RefusedError
from tests.conftest import BASE, KOHYA


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The process's own pool, of children that may do little."""
    found = Pool(1, ChildLimits(memory=96 << 20, cpu=1, wall=20))
    monkeypatch.setattr(pools, "pool", lambda: found)
    for module in ("audit.untrusted.headers", "audit.untrusted.documents", "audit.models.tokenizers"):
        monkeypatch.setattr(f"{module}.pool", lambda: found)
    return found


def test_a_header_out_of_a_child_is_the_one_that_is_parsed_here() -> None:
    raw = KOHYA.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert read_header(KOHYA) == parse_header(KOHYA, raw[8 : 8 + length], 8 + length, len(raw))


def test_metadata_with_half_a_surrogate_is_what_the_file_says(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a", {"name": "XX"})
    content = (tmp_path / "a").read_bytes().replace(b'"XX"', b'"\\ud800"')
    length = int.from_bytes(content[:8], "little") + 4
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + content[8:])
    assert read_header(tmp_path / "a").metadata == {"name": "\ud800"}


def test_a_header_that_takes_too_much_memory_is_refused_by_the_files_name(tmp_path: Path, small: Pool) -> None:
    raw = b'{"a":[' + b"[]," * 2_000_000 + b"0]}"
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is refused: it needs more than 96 MiB of memory"):
        read_header(tmp_path / "a.safetensors")
    assert read_header(KOHYA).tensors
    small.close()


GOOD = {
    "names": ["a"], "types": ["F32"], "shapes": [[2]], "starts": [0], "ends": [8], "metadata": {}, "data_start": 50,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"names": [1]}, {"names": ["a", "a"]}, {"types": [None]}, {"shapes": [2]}, {"shapes": [[-1]]}, {"starts": [-1]},
     {"ends": [10**9]}, {"ends": []}, {"metadata": {"a": 1}}, {"metadata": []}, {"data_start": "1"}],
)  # fmt: skip
def test_a_header_of_a_child_that_was_taken_over_is_none(wrong: dict[str, object]) -> None:
    assert _header(GOOD, 58).tensors["a"].shape == (2,)
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        _header({**GOOD, **wrong}, 58)


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, 2.5, -0.0, 1e999, NaN, null, true, "\\ud800 \\u0000"]}', '"x"', "1" * 4000, '{"a": 1, "a": 2}', " [] "],
)
def test_a_document_is_what_json_makes_of_it(text: str) -> None:
    assert repr(parse_json(text)) == repr(json.loads(text)) == repr(parse_json(text.encode()))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, "\ufeff{}", "1\0"])
def test_what_is_no_document_is_a_value_error(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        json.loads(text)
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_numbers_that_are_none_stay_so() -> None:
    assert math.isnan(parse_json("NaN"))
    assert parse_json("Infinity") == math.inf


def base_with(tmp_path: Path, name: str, content: bytes) -> Path:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "tokenizer" / name).write_bytes(content)
    return base


NANO = json.loads((BASE / "tokenizer" / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{}", "is damaged: "),
        ("tokenizer.json", b"\xff" * 100, "is damaged: "),
        ("vocab.json", b'{"a": "b"}', "is damaged: it is no table of words and numbers"),
        ("vocab.json", b"[" * 100_000, "is damaged: "),
        ("merges.txt", b"#version: 0.2\na b\na b c\n", "is damaged: a line is no pair of words"),
        ("tokenizer_config.json", b"1", "is damaged: it is no object"),
    ],
)
def test_a_base_whose_tokenizer_does_not_load_is_refused_by_the_files_name(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer/{name} {words}"):
        locate_base(str(base_with(tmp_path, name, content)))


def test_a_tokenizer_that_explodes_when_it_is_used_is_refused(tmp_path: Path, small: Pool) -> None:
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    content = json.dumps({**NANO, "normalizer": {"type": "Sequence", "normalizers": [longer] * 9}}).encode()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is refused: (what parses it has|it takes)"):
        locate_base(str(base_with(tmp_path, "tokenizer.json", content)))
    assert locate_base(str(BASE)).revision
    small.close()


def test_a_vocabulary_that_fills_memory_is_refused(tmp_path: Path, small: Pool) -> None:
    words = b"{" + b",".join(b'"%x":%d' % (number, number) for number in range(700_000)) + b"}"
    with pytest.raises(CheckpointError, match=r"vocab\.json is refused: it needs more than 96 MiB of memory"):
        locate_base(str(base_with(tmp_path, "vocab.json", words)))
    small.close()


def test_the_largest_tokenizer_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps({"a": 1}).encode()
    base = base_with(tmp_path, "vocab.json", content)
    largest = (base / "tokenizer/tokenizer.json").stat().st_size
    monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", largest)
    locate_base(str(base))
    monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", largest - 1)
    (base / "tokenizer/tokenizer.json").touch()
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json is refused: it has {largest} bytes, at most"):
        locate_base(str(base))


def test_a_tokenizer_is_loaded_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_with(tmp_path, "vocab.json", b'{"a": 1}')
    tokenizers.check_tokenizers(base)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "pool", None)  # nothing is asked
        tokenizers.check_tokenizers(base)
    (base / "tokenizer/vocab.json").write_bytes(b'{"a": "changed"}')
    with pytest.raises(CheckpointError, match="no table of words"):
        tokenizers.check_tokenizers(base)


def test_a_configuration_with_too_long_a_list_is_refused_by_its_name(tmp_path: Path, small: Pool) -> None:
    base = base_with(tmp_path, "vocab.json", b"{}")
    (base / "unet/config.json").write_bytes(b"[" + b"[]," * 300_000 + b"0]")
    with pytest.raises(CheckpointError, match=r"unet/config\.json is refused: .* 300001 entries"):
        check_configs(base)
    small.close()


def test_a_refusal_has_the_words_of_the_parser() -> None:
    with pytest.raises(RefusedError) as caught:
        pools.pool().ask("document", {}, b"{")
    assert caught.value.by_child
