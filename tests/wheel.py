"""Build the wheel and use it as a user does: installed alone in a clean environment, away from the checkout.

    python -m tests.wheel [--no-demo]        # make wheel-check

The libraries of the Python that runs this are lent to the clean environment by a path file. Path files that lie in a
lent folder are not followed, so an editable install of this project stays outside.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
MOST_BYTES = 32 << 20
MATCHES_FOUND = 10
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "audit", "crawlers")
NEEDED = (
    "audit/py.typed", "crawlers/py.typed", "audit/report/page.html", "audit/demo/assets/base/model_index.json",
    "audit/demo/assets/descriptor/nano_descriptor.torchscript.pt",
)  # fmt: skip
PROBE = """
import audit, crawlers, importlib.util, pathlib, sys
assert pathlib.Path(audit.__file__).is_relative_to(sys.prefix), audit.__file__
assert pathlib.Path(crawlers.__file__).is_relative_to(sys.prefix), crawlers.__file__
for outside in ("testbed", "benchmarks", "tests"):
    found = importlib.util.find_spec(outside)
    assert found is None or found.origin is None or not pathlib.Path(found.origin).is_relative_to(sys.prefix), found

from audit.demo import BASE, FINE_TUNES
from audit.descriptors import load_descriptor
from audit.models.base import locate_base
from audit.models.checkpoint import open_checkpoint
assert BASE.is_relative_to(sys.prefix)
locate_base("nano")
load_descriptor("nano")
for tuned in FINE_TUNES.values():
    open_checkpoint(tuned.path)
    assert list((tuned.pictures / "train").glob("*.png")) and list((tuned.pictures / "control").glob("*.png"))
print(audit.__version__)
"""


def build(folder: Path) -> Path:
    """The wheel, built in ``folder`` by the installed setuptools: no network is needed.

    From a copy: setuptools takes up whatever an earlier build has left in a checkout.
    """
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, source / name)
    arguments = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    _run([sys.executable, *arguments], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def look_into(wheel: Path) -> None:
    """Check size and contents. Raises AssertionError."""
    size = wheel.stat().st_size
    assert size <= MOST_BYTES, f"{wheel.name} has {size / 2**20:.1f} MiB; {MOST_BYTES >> 20} are allowed"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    missing = set(NEEDED) - names
    assert not missing, f"not in {wheel.name}: {missing}"
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"audit", "crawlers"}, f"{wheel.name} has {tops}"
    print(f"{wheel.name}: {size / 2**20:.1f} MiB, {len(names)} files", flush=True)


def install(wheel: Path, folder: Path) -> Path:
    """A clean environment in ``folder`` with the wheel in it and libraries lent to it; its folder of commands."""
    venv.create(folder, with_pip=True)
    commands = folder / "bin"
    (place,) = folder.glob("lib/python*/site-packages")
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lent |= {name for name in sys.path if name.endswith(("site-packages", "dist-packages"))}
    (place / "lent.pth").write_text("".join(f"{name}\n" for name in sorted(lent)))
    # the lent libraries must not count as the project itself, which may be installed among them
    _run([commands / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", wheel], folder)
    return commands


def _run(command: list[str | Path], folder: Path, expected: int = 0) -> str:
    """What ``command`` prints. Raises AssertionError where it ends with another exit code."""
    words = [str(word) for word in command]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "COLUMNS": "120"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def main(
    demo: Annotated[bool, typer.Option(help="Also run `lora-audit demo`, a minute or two.")] = True,
) -> None:
    """Build the wheel, look into it, install it and run its command."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with tempfile.TemporaryDirectory(prefix="lora-audit-wheel-") as name:
        folder = Path(name)
        wheel = build(folder)
        look_into(wheel)
        commands = install(wheel, folder / "clean")
        assert _run([commands / "python", "-c", PROBE], folder).strip() == version
        assert _run([commands / "lora-audit", "--version"], folder).strip() == f"lora-audit {version}"
        assert re.search(r"\bdemo\b", _run([commands / "lora-audit", "--help"], folder))
        print(f"lora-audit {version} is installed from its wheel and runs", flush=True)
        if demo:
            began = time.monotonic()
            _run([commands / "lora-audit", "--quiet", "demo"], folder, MATCHES_FOUND)
            assert list((folder / "lora-audit-workspace" / "reports").glob("*.html")), "the demo wrote no report"
            print(f"lora-audit demo: matches found, in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
