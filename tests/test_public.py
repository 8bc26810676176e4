"""What scripts rely on changes on purpose alone: `python -m tests.public` writes the snapshot anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import public

PROMISED = json.loads(public.SNAPSHOT.read_text())


@pytest.mark.parametrize("part", ["names", "exit codes", "options", "settings", "tables"])
def test_what_is_promised_is_there(part: str) -> None:
    different = public.difference(PROMISED[part], public.quick()[part])
    assert not different, different


def test_every_command_with_json_is_in_the_snapshot() -> None:
    told = {name for name, options in public.options().items() if "--json" in options}
    run_elsewhere = {"catalog add", "catalog fetch", "catalog refresh", "crawl civitai", "crawl huggingface", "demo"}
    assert told - run_elsewhere == {name.removesuffix(" AUDIT").removesuffix(" --dry-run") for name in PROMISED["json"]}


def test_the_keys_of_a_document_are_its_paths() -> None:
    document = {"a": {"b": [{"c": 1}, {"d": None}]}, "ranks": {"4": 2}, "config": {"x": 1}}
    assert public.keys(document, ("ranks",)) == {
        "a", "a.b", "a.b[]", "a.b[].c", "a.b[].d", "ranks", "ranks.*", "config",
    }  # fmt: skip


def test_a_difference_is_shown_with_the_way_to_change_the_promise() -> None:
    assert public.difference({"a": 1}, {"a": 1}) == ""
    said = public.difference({"--old": 1}, {"--new": 1})
    assert '-  "--old": 1' in said
    assert '+  "--new": 1' in said
    assert "python -m tests.public" in said


def test_commands_print_the_keys_that_are_promised(tmp_path: Path) -> None:
    different = public.difference(PROMISED["json"], public.outputs(tmp_path))
    assert not different, different
