"""Which captions to sample with, and how many training images to expect: from the user, the catalog, the metadata.

Metadata is written by uploaders (kohya's ``ss_*`` fields are JSON inside strings, in a header anybody can edit):
everything is bounded, and where a value came from is kept with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from audit.errors import AuditError
from audit.untrusted.documents import parse_json

DEFAULT_TRAINING_IMAGES = 10
MAX_TRAINING_IMAGES = 100
MAX_CAPTIONS = 8
MAX_CLAIMED_CAPTIONS = 32
MAX_CAPTION_CHARACTERS = 1000


@dataclass(frozen=True)
class Caption:
    """A caption, where it came from ("user", "file", or the field that claims it), and how likely it was trained with.

    ``confidence`` is 0 to 1, by the kind of field: an estimate to rank by, not a measured probability.
    """

    text: str
    source: str
    confidence: float = 1.0


@dataclass(frozen=True)
class N0:
    """N0, the number of training images, and where it came from."""

    count: int
    source: str


def clean_text(text: str, limit: int = MAX_CAPTION_CHARACTERS) -> str:
    """Text from outside on one line: printable characters only, single spaces, at most ``limit`` characters."""
    printable = "".join(character if character.isprintable() else " " for character in text[: 8 * limit])
    return re.sub(r"\s+", " ", printable).strip()[:limit].strip()


def clean_prompt(prompt: str) -> str:
    """A prompt of a web interface as the words alone: without <lora:...> tags, BREAK and weights such as (cat:1.2)."""
    text = re.sub(r"<[^<>]{0,200}>", " ", prompt[: 8 * MAX_CAPTION_CHARACTERS])
    text = re.sub(r"\bBREAK\b", " ", text)
    for _ in range(3):  # weights nest
        text = re.sub(r"\(([^()]*)\)|\[([^\[\]]*)\]", _without_weight, text)
    return ", ".join(filter(None, (part.strip() for part in clean_text(text).split(","))))


def _without_weight(bracketed: re.Match[str]) -> str:
    """What stands in brackets; of round ones without the weight behind the last colon."""
    if bracketed[1] is None:
        return bracketed[2]
    words, colon, weight = bracketed[1].rpartition(":")
    return words if colon and re.fullmatch(r"\s*-?(?:\d+(?:\.\d+)?|\.\d+)", weight) else bracketed[1]


def rank_captions(claims: Iterable[Caption]) -> list[Caption]:
    """The claims cleaned, each text once, the likeliest first, at most MAX_CLAIMED_CAPTIONS.

    The same text from several sources has the confidence that not all of them are wrong, 1 - (1-a)(1-b)..., under the
    likeliest source's name. A text whose words are nearly those of a likelier one (Jaccard over 0.8) is left out.
    """
    merged: dict[str, dict[str, Caption]] = {}
    for claim in claims:
        text = clean_prompt(claim.text)
        if text:
            by_source = merged.setdefault(text.casefold(), {})
            known = by_source.get(claim.source)
            if known is None or known.confidence < claim.confidence:
                by_source[claim.source] = Caption(text, claim.source, claim.confidence)
    found = []
    for by_source in merged.values():
        best = max(by_source.values(), key=lambda claim: claim.confidence)
        doubt = 1.0
        for claim in by_source.values():
            doubt *= 1 - claim.confidence
        found.append(Caption(best.text, best.source, round(1 - doubt, 4)))
    chosen: list[Caption] = []
    words: list[set[str]] = []
    for claim in sorted(found, key=lambda claim: -claim.confidence):
        mine = set(re.findall(r"\w+", claim.text.casefold()))
        if len(chosen) < MAX_CLAIMED_CAPTIONS and all(len(mine & w) <= 0.8 * len(mine | w) for w in words if mine or w):
            chosen.append(claim)
            words.append(mine)
    return chosen


def _json(text: str | None) -> object:
    try:
        return parse_json(text) if text else None
    except ValueError:
        return None


def read_caption_file(path: Path) -> list[Caption]:
    """One caption a line; empty lines and lines that start with # are passed over.

    Raises AuditError where the file cannot be read or holds none.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(1_000_000).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{path} cannot be read as a UTF-8 text file of captions: {error}") from error
    captions = [Caption(clean_text(line), "file") for line in lines if line.strip() and not line.startswith("#")]
    if not captions:
        raise AuditError(f"{path} holds no captions: write one a line")
    return captions


def captions_from_metadata(metadata: dict[str, str]) -> list[Caption]:
    """Captions that a checkpoint's metadata claims, the likeliest first, each once.

    The trigger phrase, the class tokens and folder names of kohya's data sets ("10_sks dog" is "sks dog"), then the
    tags that most images carry, joined as they are in a caption file, or whole captions where each image has its own.
    Folders of regularisation images are passed over: what they show was not to be learnt.
    """
    found = [Caption(metadata.get("modelspec.trigger_phrase", ""), "modelspec.trigger_phrase", 0.9)]
    for subset in _subsets(metadata):
        tokens = subset.get("class_tokens")
        if isinstance(tokens, str) and not subset.get("is_reg"):
            found.append(Caption(tokens, "ss_datasets", 0.85))
    regularisation = _folders(metadata, "ss_reg_dataset_dirs")
    folders = _folders(metadata, "ss_dataset_dirs")
    frequency = _folders(metadata, "ss_tag_frequency")
    for name in [*folders, *frequency][:100]:
        if name not in regularisation and re.match(r"^\d+_", name):
            found.append(Caption(re.sub(r"^\d+_", "", name), "ss_dataset_dirs", 0.8))
    for name, tags in list(frequency.items())[:100]:
        if name not in regularisation:
            entry = folders.get(name)
            found += _of_tags(tags, _count(entry.get("img_count")) if isinstance(entry, dict) else 0)
    return rank_captions(found)


def _folders(metadata: dict[str, str], name: str) -> dict[str, object]:
    found = _json(metadata.get(name))
    return found if isinstance(found, dict) else {}


def _of_tags(tags: object, images: int) -> list[Caption]:
    """The captions of a folder of so many ``images`` (0: not known) whose tags are counted.

    Tags that most images share are one caption. Where there are no more tags in all than images, each image has but
    one: they are whole captions.
    """
    counts = {tag: _count(n) for tag, n in tags.items() if _count(n)} if isinstance(tags, dict) else {}
    most = max(counts.values(), default=0)
    if sum(counts.values()) <= images or most == 1:
        likeliest = sorted(counts, key=lambda tag: -counts[tag])[:MAX_CLAIMED_CAPTIONS]
        return [Caption(tag, "ss_tag_frequency", 0.6) for tag in likeliest]
    shared = [tag.strip() for tag, count in counts.items() if count >= 0.8 * most][:20]
    return [Caption(", ".join(shared), "ss_tag_frequency", 0.6)]


def _subsets(metadata: dict[str, str]) -> list[dict[str, object]]:
    """The subsets of kohya's ``ss_datasets``, at most 100."""
    datasets = _json(metadata.get("ss_datasets"))
    found = []
    for dataset in datasets[:100] if isinstance(datasets, list) else ():
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        found += [one for one in subsets[:100] if isinstance(one, dict)] if isinstance(subsets, list) else []
    return found[:100]


def _count(value: object) -> int:
    return value if type(value) is int and 0 < value <= 10**9 else 0


def n0_claims(metadata: dict[str, str]) -> list[N0]:
    """Every N0 that kohya's metadata claims: the sums of ``img_count`` of ss_dataset_dirs and of ss_datasets."""
    folders = _json(metadata.get("ss_dataset_dirs"))
    entries = list(folders.values())[:1000] if isinstance(folders, dict) else []
    in_folders = sum(_count(entry.get("img_count")) for entry in entries if isinstance(entry, dict))
    in_subsets = sum(_count(subset.get("img_count")) for subset in _subsets(metadata) if not subset.get("is_reg"))
    claims = [N0(in_folders, "ss_dataset_dirs"), N0(in_subsets, "ss_datasets")]
    return [claim for claim in claims if claim.count > 0]


def n0_from_metadata(metadata: dict[str, str]) -> N0 | None:
    """The likeliest N0 that the metadata claims; None where nothing usable is claimed."""
    return next(iter(n0_claims(metadata)), None)


def choose_n0(user: int | None, metadata: dict[str, str], known: N0 | None = None) -> tuple[N0, list[str]]:
    """N0 and warnings: the user's, else the claim ``known`` to the catalog, else the metadata's, else the default.

    Claims count up to MAX_TRAINING_IMAGES.
    """
    if user is not None:
        return N0(user, "user"), []
    claimed = known or n0_from_metadata(metadata)
    if claimed is None:
        warning = (
            f"the number of training images is not known: {DEFAULT_TRAINING_IMAGES} are assumed (set it with --n0)"
        )
        return N0(DEFAULT_TRAINING_IMAGES, "default"), [warning]
    if claimed.count > MAX_TRAINING_IMAGES:
        warning = (
            f"the metadata claims {claimed.count} training images: the audit looks for {MAX_TRAINING_IMAGES} "
            "(raise it with --n0 if the time is worth it)"
        )
        return N0(MAX_TRAINING_IMAGES, claimed.source), [warning]
    return claimed, []


def choose_captions(
    user: list[str], file: Path | None, metadata: dict[str, str], known: list[Caption] | None = None
) -> tuple[list[Caption], list[str]]:
    """The captions to share the budget, and warnings: the user's and the file's, else the catalog's or metadata's.

    With none at all the empty caption is sampled, which a warning says.
    """
    given = [Caption(clean_text(text), "user") for text in user]
    if file is not None:
        given += read_caption_file(file)
    claimed = known or captions_from_metadata(metadata)
    captions = [caption for caption in given if caption.text] or claimed[:MAX_CAPTIONS]
    if captions:
        return captions, []
    warning = "no caption is known: the empty caption is sampled, which finds less (give one with --caption)"
    return [Caption("", "default")], [warning]
