"""Which base model a file says that it was trained on, and what a base at hand is: by hashes, then by names.

Claims are their author's. What is known of base models is data (``known_bases.toml``): names, parents and hashes of
the published ones. Nothing here opens a model.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from audit.models.families.identify import agree
from audit.models.families.unaudited import by_claim

TABLE = Path(__file__).parent / "known_bases.toml"
MAX_NAME = 200  # characters of a claimed name that are looked at
HASHES = ("ss_new_sd_model_hash", "ss_sd_model_hash")
NAMES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
# Whom to believe: who trained it, then who describes it; Civitai's list of base models names the family's first as well
ORDER = ("sidecar", *HASHES, "ss_sd_model_name", "base_model", "baseModel", "ss_base_model_version")
_ENDINGS = re.compile(r"\.(?:safetensors|ckpt|sft)$")
_AIR = re.compile(r"urn:air:[^@\s]{1,150}@(\d{1,18})$")
_HEX = re.compile(r"(?:0x)?([0-9a-f]{8,64})")
_NOTHING = ("", "none", "null", "model.safetensors", "unknown")


@dataclass(frozen=True)
class KnownBase:
    """A published base model, as ``known_bases.toml`` describes it. ``parent`` and ``versions`` are keys."""

    key: str
    title: str
    family: str
    parent: str | None = None
    prediction: str | None = None
    repos: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    autov2: tuple[str, ...] = ()
    legacy: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    listed: bool = False


@dataclass(frozen=True)
class BaseClaim:
    """One claim of what a file was trained on: as it is written, the field that says it, and what it stands for."""

    text: str
    source: str
    known: KnownBase | None = None

    @property
    def by_hash(self) -> bool:
        """Whether it names a file by its content."""
        return self.source in HASHES


@dataclass(frozen=True)
class Wanted:
    """The base that a file wants. ``by``: hash, name, shapes or nothing; ``sure``: high, medium, low or none.

    ``base`` is its key in ``known_bases.toml``, None where only its family is known; ``why`` says so in words.
    """

    base: str | None
    title: str | None
    family: str | None
    by: str
    sure: str
    why: str


@cache
def known_bases() -> Mapping[str, KnownBase]:
    """The table, by key."""
    with TABLE.open("rb") as file:
        rows = tomllib.load(file)["base"]
    found: list[KnownBase] = []
    for row in rows:
        values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in row.items()}
        found.append(KnownBase(**values))
    return {one.key: one for one in found}


def of_hash(text: str) -> KnownBase | None:
    """The base of a SHA256, of its first 10 digits or more, or of 8 digits of the old kind."""
    found = _HEX.fullmatch(text.strip().lower())
    if found is None:
        return None
    digits = found[1]
    for one in known_bases().values():
        if len(digits) == 8 and digits in one.legacy:
            return one
        if len(digits) >= 10 and any(
            whole.startswith(digits) or digits.startswith(whole) for whole in (*one.sha256, *one.autov2)
        ):
            return one
    return None


def of_name(text: str) -> KnownBase | None:
    """The base that a name stands for: a repository of the hub, a file's name, or what people call it."""
    whole = text.strip()[:MAX_NAME]
    repo = whole.partition("@")[0].lower()
    air = _AIR.search(whole.lower())
    stem = air[1] if air else re.split(r"[\\/]", whole.lower())[-1]
    stem = _ENDINGS.sub("", stem.replace("_", "-"))
    for one in known_bases().values():
        if whole.lower() == one.key or repo in (name.lower() for name in one.repos):
            return one
    return next(
        (one for one in known_bases().values() if any(re.fullmatch(pattern, stem) for pattern in one.names)), None
    )


def claims_of(metadata: Mapping[str, str], others: Iterable[tuple[str, str]] = ()) -> list[BaseClaim]:
    """What a header and ``others`` (text, field) say, whom to believe most first; each once."""
    said = [(metadata.get(name, ""), name) for name in (*HASHES, *NAMES)]
    found: dict[tuple[str, str], BaseClaim] = {}
    for text, source in (*said, *others):
        text = text.strip()[:MAX_NAME]
        if text.lower() in _NOTHING:
            continue
        known = of_hash(text) if source in HASHES else of_name(text)
        found[text, source] = BaseClaim(text, source, known)
    return sorted(found.values(), key=lambda one: ORDER.index(one.source) if one.source in ORDER else len(ORDER))


def wanted(claims: Iterable[BaseClaim], shapes: str | None, family: str | None) -> Wanted:
    """Which base a file wants, by its claims, the family that its shapes show and the one that is claimed.

    A name of another family than the shapes' is passed over, unless that has such shapes too.
    """
    passed, found = [], None
    for one in claims:
        if one.known is None:
            if not one.by_hash and (other := by_claim(one.text)):
                passed.append(f"{one.source} says {one.text[:80]!r}: {other.sentence}")
            continue
        if shapes and not agree(shapes, one.known.family):
            passed.append(f"{one.source} says {one.known.title}, of family {one.known.family}")
        elif found is None:
            found = one
        elif one.known.key != found.known.key and one.known.key not in found.known.versions:  # type: ignore[union-attr]
            passed.append(f"{one.source} says {one.known.title}")
    rest = f"; {'; '.join(passed)}" if passed else ""
    if found is not None and found.known is not None:
        exact = found.by_hash and len(found.text) > 8
        vague = bool(found.known.versions) or found.source in ("baseModel", "ss_base_model_version")
        sure = "high" if exact and not passed else "low" if vague and passed else "medium"
        how = "the hash" if found.by_hash else "the name"
        why = f"{how} {found.text!r} that {found.source} claims is that of {found.known.title}"
        by = "hash" if found.by_hash else "name"
        return Wanted(found.known.key, found.known.title, found.known.family, by, sure, why + rest)
    if shapes and family and family != shapes and agree(shapes, family):
        why = f"its metadata claims family {family}, and its shapes, those of {shapes}, are that family's too{rest}"
        return Wanted(None, None, family, "name", "low", why)
    if shapes:
        return Wanted(None, None, shapes, "shapes", "low", f"its shapes are those of family {shapes}{rest}")
    if family:
        return Wanted(None, None, family, "name", "low", f"its metadata claims family {family}{rest}")
    return Wanted(None, None, None, "nothing", "none", f"neither claims nor shapes say{rest}")


def identified(name: str, revision: str, source: str = "") -> KnownBase | None:
    """What a base at hand is: by its file's SHA256, its repository, or the name of its file or folder."""
    if re.fullmatch(r"[0-9a-f]{64}", revision) and (found := of_hash(revision)):
        return found
    return of_name(source) or of_name(name)


def named_in(claim: BaseClaim, names: Iterable[str]) -> str | None:
    """Which of ``names``, as a configuration calls its bases, is the base of ``claim``: None where none is.

    A name is the claim's own text, the key of a known base or of one of its versions, or a hash of a file.
    """
    names = list(names)
    if claim.text in names:
        return claim.text
    for name in names:
        digits = name.lower()
        if claim.by_hash and _HEX.fullmatch(digits) and len(digits) >= 8 and claim.text.lower().startswith(digits):
            return name
    if claim.known is None:
        return None
    if claim.known.key in names:
        return claim.known.key
    of_names = {name: one for name in names if (one := of_name(name) or of_hash(name)) is not None}
    exact = next((name for name, one in of_names.items() if one.key == claim.known.key), None)
    loose = [name for name, one in of_names.items() if same(one, claim.known)]
    if exact is None and len({of_names[name].prediction for name in loose}) == 1:
        return loose[0]
    return exact  # of versions that predict different things none is guessed


def lineage(one: KnownBase) -> Iterator[KnownBase]:
    """``one``, its parent, and so on."""
    seen: set[str] = set()
    while one.key not in seen:
        yield one
        seen.add(one.key)
        if one.parent is None:
            return
        one = known_bases()[one.parent]


def same(one: KnownBase, other: KnownBase) -> bool:
    """Whether they are one, or may be: a claim without a version is any of its versions."""
    return one.key == other.key or one.key in other.versions or other.key in one.versions


def relation(given: KnownBase, claimed: KnownBase) -> str | None:
    """What ``given`` is to ``claimed``, in words; None where they are the same."""
    if same(given, claimed):
        return None
    above, below = [one.key for one in lineage(claimed)], [one.key for one in lineage(given)]
    if {given.key, *given.versions} & set(above[1:]):
        return "a parent of it"
    if {claimed.key, *claimed.versions} & set(below[1:]):
        return "a child of it"
    shared = next((key for key in above if key in below), None)
    if shared:
        return f"a sibling of it (both descend from {known_bases()[shared].title})"
    return "another model of its family" if given.family == claimed.family else f"of family {given.family}"


def mismatches(claims: Iterable[BaseClaim], name: str, revision: str, source: str = "") -> list[str]:
    """Where the base at hand is not the one claimed: a warning in words, of the claim that is believed most."""
    given = identified(name, revision, source)
    for one in claims:
        if one.by_hash and one.text.lower() == revision:
            return []  # the very file
        if one.known is None:
            continue
        alike = given is None or given.family == one.known.family
        if one.source == "ss_base_model_version" and one.known.parent is None and alike:
            continue  # trainers write it of every model of the architecture
        what = f"it claims to be trained on {one.known.title} ({one.source})"
        if given is None:
            return [f"{what}: whether the base {name} is that model cannot be told by its name or hash"]
        vague = one.known.parent is None and not one.known.listed
        if one.source == "baseModel" and vague and one.known.family == given.family:
            continue  # Civitai's list has no closer name for most children
        said = relation(given, one.known)
        if said is None:
            return []
        return [
            f"{what}; the base {name} is {given.title}, {said}: an audit on another base than the true one finds less, "
            "and finding nothing then says little"
        ]
    return []


def prediction_refusal(claims: Iterable[BaseClaim], base: str, kind: str) -> str | None:
    """Why a file cannot be sampled on ``base``, which predicts ``kind``: the base it claims predicts something else."""
    for one in claims:
        if one.source == "ss_base_model_version":
            continue  # trainers write it of every model of the architecture, whatever it predicts
        if one.known is not None and one.known.prediction is not None:
            if one.known.prediction == kind or (one.source == "baseModel"):
                return None
            return (
                f"its {one.source} says that it was trained on {one.known.title}, which predicts "
                f"{one.known.prediction}; {base} predicts {kind}: give as --base the model that it was trained on"
            )
    return None
