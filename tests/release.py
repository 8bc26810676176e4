"""The note of a release, out of CHANGELOG.md.

python -m tests.release [VERSION]        # make release-notes: that of pyproject.toml's version
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import typer

ROOT = Path(__file__).parent.parent


def releases() -> dict[str, str]:
    """The text of each release by its version, in the changelog's order; "Unreleased" is the coming one."""
    text = (ROOT / "CHANGELOG.md").read_text()
    parts = re.split(r"^## \[([^\]]+)\].*\n", text, flags=re.M)[1:]
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def note(version: str) -> str:
    """The release note of ``version``. Raises SystemExit where the changelog has no such release."""
    found = releases()
    if version not in found:
        raise SystemExit(f"CHANGELOG.md has no release {version}: it has {', '.join(found)}")
    return f"# lora-audit {version}\n\n{found[version]}\n"


def main(version: str | None = typer.Argument(None, help="[default: the version of pyproject.toml]")) -> None:
    """Print the release note."""
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    typer.echo(note(version or built), nl=False)


if __name__ == "__main__":
    typer.run(main)
