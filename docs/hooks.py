"""What mkdocs does besides: pages from the top of the repository, and links to files that are no pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
TOP_PAGES = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md",
             "CONTRIBUTING.md": "CONTRIBUTING.md"}  # fmt: skip
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top folder to the site, as if they were in docs/."""
    from mkdocs.structure.files import File

    for name, page in TOP_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links of the repository into links of the site; those to files that are no pages become plain text.

    A link to a file that does not exist stays, so that the strict build names it.
    """
    names = {page_name: top for top, page_name in TOP_PAGES.items()}
    folder = ROOT if page.file.src_uri in names else ROOT / "docs"
    return LINK.sub(lambda found: _link(found, folder), markdown)


def _link(found: re.Match[str], folder: Path) -> str:
    text, target = found.groups()
    name, mark, heading = target.partition("#")
    if not name or re.match(r"[a-z]+:", target):
        return found[0]
    path = (folder / name).resolve()
    if not path.exists():
        return found[0]
    within = path.relative_to(ROOT)
    if str(within) in TOP_PAGES:
        return f"{text}({TOP_PAGES[str(within)]}{mark}{heading})"
    if within.parts[0] == "docs" and path.is_file():
        return f"{text}({within.relative_to('docs')}{mark}{heading})"
    return f"`{within}`" if not text.startswith("!") else ""
