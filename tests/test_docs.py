"""The documents say what the code says, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from docs import generate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_no_generated_document_is_stale() -> None:
    assert not generate.stale(), "make docs"


def test_every_sentence_is_of_a_key_that_is_printed() -> None:
    promised = json.loads(generate.SNAPSHOT.read_text())["json"]
    for command, sentences in tomllib.loads(generate.SENTENCES.read_text()).items():
        assert set(sentences) <= set(promised[command]), command


def test_a_key_without_a_meaning_is_named() -> None:
    with pytest.raises(SystemExit, match=r"what 'new_key' of `lora-audit scan --json` means is not written"):
        generate.meaning("scan", "new_key", ["new_key"])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both the site and the repository's own view make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_documents_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if heading and path.suffix == ".md":
            assert heading in anchors(path), f"{page.name}: {target}"
