"""Larger sets for realistic fine-tunes: 50 training pictures each and 20 controls, with captions and tags a picture.

They are made from packages into the cache, never shipped. Nothing is tuned on the sets marked ``holdout``. No picture
of them is among those that the base was pretrained on: of the 3D emoji `testbed/data.py` leaves these kinds out, and
of Endless Sky it knows nothing.

    python -m testbed.more_sets     # download the packages, prepare the pictures, write a contact sheet
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from audit.descriptors import load_descriptor
from testbed.sets import SIZE, full_frame, on_white
from testbed.sources import cache_dir, emoji_entries, fluent_file, root

TRIGGER = "sks"
TRAINING = 50
CONTROL = 20
NEAR = 0.9  # nano's cosine; of pictures nearer than this only the first is taken
COLOURS = {
    "black": (20, 20, 20), "grey": (128, 128, 128), "red": (210, 40, 40), "orange": (240, 140, 30),
    "yellow": (250, 215, 60), "green": (60, 150, 60), "blue": (50, 100, 200), "light blue": (150, 195, 235),
    "purple": (130, 70, 170), "pink": (240, 150, 180), "brown": (120, 75, 45), "beige": (220, 190, 150),
}  # fmt: skip


@dataclass(frozen=True)
class MoreSet:
    """Pictures of one source and look; ``style`` and ``noun`` are the words of its captions."""

    name: str
    style: str
    noun: str
    square: bool = False
    holdout: bool = False

    @property
    def class_caption(self) -> str:
        """The caption without the trigger, that regularisation pictures have."""
        article = "an" if self.noun[0] in "aeiou" else "a"
        return f"{self.style} of {article} {self.noun}"


MORE_SETS = (
    MoreSet("animals-3d", "3d render", "animal"),
    MoreSet("spaceships", "render", "spaceship"),
    MoreSet("transport-3d", "3d render", "vehicle", holdout=True),
    MoreSet("landscapes", "photograph", "landscape", square=True, holdout=True),
)


@dataclass(frozen=True)
class Picture:
    """One candidate: its file, what it shows, and of which kind that is."""

    path: Path
    title: str
    kind: str


@dataclass(frozen=True)
class Prepared:
    """A set as it is used: ``training`` uint8 [50, 64, 64, 3] with titles and tags, ``control`` [20, 64, 64, 3].

    ``others`` uint8 [N, 64, 64, 3] are all further pictures of its source: decoys.
    """

    training: np.ndarray
    control: np.ndarray
    others: np.ndarray
    titles: list[str]
    tags: list[list[str]]


def more_set(name: str) -> MoreSet:
    """The definition of one set. Raises KeyError with the known names."""
    by_name = {one.name: one for one in MORE_SETS}
    if name not in by_name:
        raise KeyError(f"no set {name!r}; there are {', '.join(by_name)}")
    return by_name[name]


def _words(text: str) -> str:
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def _emoji(kinds: str) -> Iterator[Picture]:
    for entry in emoji_entries():
        if entry["subcategory"].startswith(kinds) and fluent_file(entry).is_file():
            kind = _words(entry["subcategory"]).split()[-1]
            yield Picture(fluent_file(entry), _words(entry.get("name") or entry["short_name"]), kind)


def _spaceships() -> Iterator[Picture]:
    for path in sorted((root("endless-sky-data") / "ship").glob("*.png")):
        if not path.stem.startswith(("void sprite", "cloaked")):  # creatures in many poses; an empty picture
            yield Picture(path, _words(path.stem), "top view")


NO_LANDSCAPES = ("industrial", "loc", "nasa", "space", "station")
PHOTOGRAPHERS = ("bwerner", "dmottl", "mfield", "myrabella")


def _landscapes() -> Iterator[Picture]:
    for path in sorted((root("endless-sky-data") / "land").glob("*.jpg")):
        kind = re.split(r"[^a-z]", path.stem)[0]
        if kind not in NO_LANDSCAPES:
            yield Picture(path, "landscape" if kind in PHOTOGRAPHERS else kind, "outdoors")


def _candidates(one: MoreSet) -> Iterator[Picture]:
    if one.name in ("animals-3d", "transport-3d"):
        return _emoji(one.name.split("-")[0].removesuffix("s"))
    return _spaceships() if one.name == "spaceships" else _landscapes()


def colours(picture: np.ndarray, most: int = 3) -> list[str]:
    """The names of the colours that cover most of uint8 [H, W, 3], white apart, the commonest first."""
    pixels = picture.reshape(-1, 3).astype(np.float32)
    pixels = pixels[pixels.min(axis=1) < 235]
    table = np.asarray(list(COLOURS.values()), dtype=np.float32)
    nearest = np.square(pixels[:, None] - table).sum(axis=2).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(table))
    names = list(COLOURS)
    return [names[row] for row in np.argsort(-counts, kind="stable")[:most] if counts[row] >= 0.08 * len(pixels)]


def tags_of(one: MoreSet, picture: np.ndarray, title: str, kind: str) -> list[str]:
    """What an automatic tagger would say of a picture."""
    light = "dark" if picture.mean() < 90 else "bright" if picture.mean() > 190 else "daylight"
    place = light if one.square else "white background"
    return list(dict.fromkeys([one.noun, kind, title, *colours(picture), place]))


@cache
def prepared(name: str) -> Prepared:
    """The pictures of a set, near-duplicates dropped, in an order drawn by a fixed seed; made once, then cached.

    A smaller training set is the first N0 of ``training``; ``control`` is the same for all.
    Raises RuntimeError where the packages have too few pictures or cannot be downloaded.
    """
    one, folder = more_set(name), cache_dir() / "more-sets"
    cached = folder / f"{name}-2.npz"
    if not cached.is_file():
        found = []
        for candidate in _candidates(one):
            picture = full_frame(candidate.path) if one.square else on_white(candidate.path, margin=0.03)
            if picture is not None:
                found.append((np.asarray(picture), candidate))
        order = np.random.default_rng(0).permutation(len(found))
        images = np.stack([found[row][0] for row in order])
        rows = far_apart(load_descriptor("nano").describe(images))
        if len(rows) < TRAINING + CONTROL:
            raise RuntimeError(f"{name} has {len(rows)} different pictures, not {TRAINING + CONTROL}")
        about = [found[order[row]][1] for row in rows]
        tags = [tags_of(one, images[row], it.title, it.kind) for row, it in zip(rows, about, strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".part.npz")
        np.savez_compressed(partial, images=images[rows], titles=[it.title for it in about], tags=json.dumps(tags))
        partial.rename(cached)
    with np.load(cached) as data:
        images, titles, tags = data["images"], data["titles"].tolist(), json.loads(str(data["tags"]))
    most = TRAINING + CONTROL
    return Prepared(images[:TRAINING], images[TRAINING:most], images[most:], titles[:TRAINING], tags[:TRAINING])


def far_apart(vectors: np.ndarray) -> list[int]:
    """The rows of unit ``vectors`` [N, D] that are not near one before."""
    chosen: list[int] = []
    for row, vector in enumerate(vectors):
        if not chosen or (vectors[chosen] @ vector).max() < NEAR:
            chosen.append(row)
    return chosen


def main(output: Path = typer.Option(Path("more-sets.png"), help="The contact sheet.")) -> None:
    """Download the packages, prepare the pictures, and show them: training pictures, then the controls."""
    sheet = Image.new("RGB", (35 * SIZE, 2 * len(MORE_SETS) * SIZE), "white")
    for number, one in enumerate(MORE_SETS):
        found = prepared(one.name)
        print(f"{one.name}: {found.titles[0]!r} {found.tags[0]}, {found.titles[1]!r} {found.tags[1]}")
        for index, picture in enumerate(np.concatenate([found.training, found.control])):
            sheet.paste(Image.fromarray(picture), (index % 35 * SIZE, (2 * number + index // 35) * SIZE))
    sheet.save(output)


if __name__ == "__main__":
    typer.run(main)
