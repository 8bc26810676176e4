"""Few-shot sets: a folder with a folder a set, in the layouts in which people keep what they fine-tune on.

    SETS/ARTIST/picture.jpg              style, as WikiArt: all pictures are trained on
    SETS/SUBJECT/train/, control/        control pictures are of the same kind and never trained on
    SETS/SUBJECT/decoys/                 further ones, for verdicts
    SETS/prompts.csv                     subject,prompt[,class]: the caption of a set, and of its class
    SETS/prompts_and_classes.txt         DreamBooth's: lines of subject,class
    picture.txt beside a picture, or metadata.jsonl ({"file_name": ..., "text": ...}): a caption a picture

A set without captions has the paper's: "art style of" and its name. Pictures are opened as strangers' pictures are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from audit.claims.captions import clean_text
from audit.demo import ASSETS, DECOYS
from audit.descriptors.pictures import SUFFIXES, open_image, read_picture
from audit.errors import StudyError

DEMO = "demo"  # the sets that come along
MOST_SETS = 1000
MOST_PICTURES = 1000  # of a set's part
MOST_TEXT_BYTES = 1_000_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
SUBJECT, KIND = re.compile(r"[\w .-]+"), re.compile(r"[\w -]+")  # in prompts_and_classes.txt
TRIGGER = "sks"  # the word that DreamBooth's examples stand in front of the class


@dataclass(frozen=True)
class SetPicture:
    """One file: its path, the SHA256 of its bytes, and its caption."""

    path: str
    sha256: str
    caption: str

    def open(self) -> Image.Image:
        """The picture, RGB. Raises StudyError where it is not what the plan has read."""
        try:
            data = read_picture(Path(self.path))
            if hashlib.sha256(data).hexdigest() != self.sha256:
                raise StudyError(f"{self.path} has changed since the study was planned: begin a new one")
            return open_image(data)
        except ValueError as error:
            raise StudyError(f"{self.path} cannot be read: {error}") from error


@dataclass(frozen=True)
class FewShotSet:
    """A set: pictures to train on, ``control`` pictures that are held out, and ``decoys``.

    ``class_caption`` is what its class is called without the trigger; None where nobody says it.
    """

    name: str
    training: tuple[SetPicture, ...]
    control: tuple[SetPicture, ...] = ()
    decoys: tuple[SetPicture, ...] = ()
    class_caption: str | None = None

    @property
    def captions(self) -> list[str]:
        """The captions of the training pictures, each once, in order."""
        return list(dict.fromkeys(one.caption for one in self.training))

    def triggers(self) -> list[str]:
        """Of each caption the words that stand for the set alone, each once, in order.

        "sks" where a caption has it; else its words that the class's caption has not; else those that the set's name
        has. Raises StudyError for a caption that none of this tells the trigger of.
        """
        return list(dict.fromkeys(self._trigger(one) for one in self.captions))

    def _trigger(self, caption: str) -> str:
        words = caption.split()
        known = re.findall(r"[^ ._-]+", self.name.lower())
        of_the_class = [one.lower() for one in (self.class_caption or "").split()]
        found = [one for one in words if one == TRIGGER]
        found = found or [one for one in words if of_the_class and one.lower() not in of_the_class]
        found = found or [one for one in words if one.lower() in known]
        if not found:
            raise StudyError(
                f"captions = trigger: nobody says which words of {caption[:200]!r} stand for {self.name}; write "
                "a column class in prompts.csv, or leave that level out"
            )
        return " ".join(found)

    def partial(self, share: float, seed: int) -> list[str]:
        """Of each caption a ``share`` of its words in their order, drawn by ``seed``: see ``part_of``."""
        return list(dict.fromkeys(part_of(one, share, seed) for one in self.captions))

    def first(self, n0: int | None) -> FewShotSet:
        """The set with ``n0`` training pictures; where it has no control pictures, the others are held out."""
        if n0 is None or n0 >= len(self.training):
            return self
        control = self.control or self.training[n0:]
        return FewShotSet(self.name, self.training[:n0], control, self.decoys, self.class_caption)


def part_of(caption: str, share: float, seed: int) -> str:
    """A ``share`` of the words of a caption, in their order, drawn by ``seed`` and the caption.

    One word at least, and all of them for a share of 1 alone, or where there is one.
    """
    words = caption.split()
    count = min(max(1, round(share * len(words))), len(words) if share == 1 else max(1, len(words) - 1))
    digest = hashlib.sha256(repr(("partial", seed, caption)).encode()).digest()
    rows = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(words))[:count]
    return " ".join(words[row] for row in sorted(rows))


@dataclass(frozen=True)
class _Prompts:
    """What a prompts file says of each subject: its caption, and that of its class."""

    captions: dict[str, str]
    classes: dict[str, str]


def read_sets(source: str, beside: Path, only: Sequence[str] = ()) -> list[FewShotSet]:
    """The sets in ``source``, a folder (relative to the folder ``beside``) or "demo": those named ``only``, or all.

    Every picture is opened once. Raises StudyError, naming the file: for a set of one picture, a picture that cannot be
    read, a caption without its picture, pictures of which only some have captions.
    """
    root = ASSETS / "sets" if source == DEMO else (beside / source)
    if not root.is_dir():
        raise StudyError(f"{root} is not a folder: name the folder that holds a folder a few-shot set, or {DEMO!r}")
    folders = sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
    missing = sorted(set(only) - {one.name for one in folders})
    if missing:
        known = ", ".join(one.name for one in folders[:20]) or "none"
        raise StudyError(f"{root} has no set {', '.join(missing)}: there are {known}")
    chosen = [one for one in folders if not only or one.name in only]
    if not chosen or len(chosen) > MOST_SETS:
        raise StudyError(f"{root} holds {len(chosen)} sets: a study has from 1 to {MOST_SETS}, each a folder of it")
    prompts = _prompts(ASSETS if source == DEMO else root)
    return [_read_set(folder, prompts, DECOYS / folder.name if source == DEMO else None) for folder in chosen]


def _read_set(folder: Path, prompts: _Prompts, decoys: Path | None) -> FewShotSet:
    name = folder.name
    if not NAME.fullmatch(name):
        raise StudyError(f"{name!r} cannot name a set: use up to 64 letters, digits, blanks, '.', '_', '-'")
    train = folder / "train" if (folder / "train").is_dir() else folder
    said = prompts.captions.get(name) or f"art style of {' '.join(re.findall(r'[^ _-]+', name))}"
    training = _pictures(train, said)
    if len(training) < 2:
        raise StudyError(
            f"{train} holds {len(training)} picture: a few-shot set has 2 at the least; add some, or leave it out"
        )
    parts = [
        _pictures(part, said) if part.is_dir() else () for part in (folder / "control", decoys or folder / "decoys")
    ]
    _check_apart(name, training, parts[0] + parts[1])
    named = prompts.classes.get(name)
    words = said.split()
    if named is None and TRIGGER in words:
        named = " ".join(word for word in words if word != TRIGGER)
    return FewShotSet(name, training, parts[0], parts[1], named)


def _check_apart(name: str, training: Sequence[SetPicture], others: Sequence[SetPicture]) -> None:
    """Raise StudyError where a held-out picture is the file of a training picture: it would be no control."""
    seen = {one.sha256: one.path for one in training}
    for one in others:
        if one.sha256 in seen:
            raise StudyError(
                f"{one.path} is the same file as the training picture {seen[one.sha256]}: remove it from {name}"
            )


def _pictures(folder: Path, caption: str) -> tuple[SetPicture, ...]:
    files = sorted(one for one in folder.iterdir() if one.is_file() and one.suffix.lower() in SUFFIXES)
    if len(files) > MOST_PICTURES:
        raise StudyError(f"{folder} holds {len(files)} pictures: a set has {MOST_PICTURES} at the most")
    captions = _captions(folder, files)
    found: dict[str, SetPicture] = {}
    for path in files:
        try:
            data = read_picture(path)
            open_image(data)
        except ValueError as error:
            raise StudyError(f"{path} cannot be read: {error}; remove or replace it") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest in found:
            raise StudyError(f"{path} is the same file as {found[digest].path}: remove one of them")
        found[digest] = SetPicture(str(path.resolve()), digest, captions.get(path.name, caption))
    return tuple(found.values())


def _captions(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """The captions of pictures by their file names; none, or all. Raises StudyError."""
    names = {one.name for one in files}
    found = dict(_from_texts(folder, files))
    for name, text in _from_jsonl(folder / "metadata.jsonl"):
        if name not in names:
            raise StudyError(f"{folder / 'metadata.jsonl'} has a caption of {name[:200]!r}, which is no picture there")
        if found.get(name, text) != text:
            raise StudyError(f"{folder / name} has one caption in metadata.jsonl and another in its .txt: keep one")
        found[name] = text
    if found and len(found) < len(files):
        lacking = sorted(names - set(found))[0]
        raise StudyError(
            f"{folder}: {len(found)} of {len(files)} pictures have a caption, {lacking} has none: write it"
        )
    return found


def _from_texts(folder: Path, files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    by_stem: dict[str, list[str]] = {}
    for one in files:
        by_stem.setdefault(one.stem, []).append(one.name)
    for path in sorted(folder.glob("*.txt")):
        pictures = by_stem.get(path.stem, [])
        if len(pictures) != 1:
            what = "without its picture" if not pictures else f"of {len(pictures)} pictures ({', '.join(pictures)})"
            raise StudyError(f"{path} is a caption {what}: rename or remove it")
        yield pictures[0], _caption(_text(path), str(path))


def _from_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        return
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            name, text = said["file_name"], said["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StudyError(
                f'{path}, line {number}: write {{"file_name": "picture.png", "text": "caption"}}'
            ) from None
        if not isinstance(name, str) or not isinstance(text, str):
            raise StudyError(f"{path}, line {number}: file_name and text are texts")
        yield name, _caption(text, f"{path}, line {number}")


def _prompts(root: Path) -> _Prompts:
    captions: dict[str, str] = {}
    classes: dict[str, str] = {}
    if (root / "prompts_and_classes.txt").is_file():
        for line in _text(root / "prompts_and_classes.txt").splitlines():
            subject, comma, kind = (part.strip() for part in line.partition(","))
            if comma and SUBJECT.fullmatch(subject) and KIND.fullmatch(kind) and subject != "subject_name":
                captions[subject] = f"a photo of {TRIGGER} {kind}"
                classes[subject] = f"a photo of {kind}"
    path = root / "prompts.csv"
    if path.is_file():
        rows = csv.DictReader(_text(path).splitlines())
        if not {"subject", "prompt"} <= set(rows.fieldnames or ()):
            raise StudyError(f"{path}: its first line is subject,prompt or subject,prompt,class")
        for number, row in enumerate(rows, start=2):
            subject = (row["subject"] or "").strip()
            captions[subject] = _caption(row["prompt"] or "", f"{path}, line {number}")
            if (row.get("class") or "").strip():
                classes[subject] = _caption(row["class"], f"{path}, line {number}")
    return _Prompts(captions, classes)


def _caption(text: str, where: str) -> str:
    found = clean_text(text)
    if not found:
        raise StudyError(f"{where}: the caption is empty; write one, or remove it")
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_TEXT_BYTES + 1)
        if len(data) > MOST_TEXT_BYTES:
            raise StudyError(f"{path} is larger than {MOST_TEXT_BYTES // 1_000_000} MB: it is no file of captions")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read as UTF-8 text: {error}") from error
