"""What a source says about one checkpoint file, and what is concluded from it together with the file's own header."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from audit.claims.captions import (
    N0,
    Caption,
    captions_from_metadata,
    clean_text,
    n0_claims,
    rank_captions,
)
from audit.models.bases import HASHES, Wanted, claims_of, wanted
from audit.models.families.identify import Family, agree, family_of_name, family_of_shapes
from audit.models.safetensors_header import Header
from audit.models.trained import Training, training_of
from audit.untrusted.documents import parse_json

MAX_ID = 300
MAX_COUNT = 10**12  # images and their repeats; more is no count
PICKLE = "a pickle: only safetensors is read, pickles can run code"
WITHOUT_GGUF = "a GGUF file, which is read where its package is installed: pip install lora-audit[gguf]"


def gguf_refusal(name: str) -> str | None:
    """Why a file of this name is not downloaded: one in GGUF, where nothing here can read it; None for others."""
    return WITHOUT_GGUF if name.lower().endswith(".gguf") and find_spec("gguf") is None else None


@dataclass(frozen=True)
class Claim:
    """A value and the field that claims it."""

    value: str
    source: str


@dataclass(frozen=True)
class Item:
    """One file at one place, as its source describes it. ``item_id`` stays the same as long as the place does.

    ``available_at`` is when its early access ends. ``refusal`` says why it is not to be downloaded (a pickle, an
    opt-out), ``left`` why it is only listed; ``missing`` that the source has taken it away. ``ground_truth_url`` is the
    uploader's own training set, where the source has it.
    """

    item_id: str
    source: str
    model_id: str
    version_id: str
    name: str
    download_url: str
    title: str = ""
    page_url: str = ""
    uploader: str = ""
    tags: tuple[str, ...] = ()
    license: str = ""
    nsfw: bool = False
    real_person: bool = False
    minor: bool = False
    published_at: datetime | None = None
    available_at: datetime | None = None
    base_models: tuple[Claim, ...] = ()
    n0: tuple[N0, ...] = ()
    captions: tuple[Caption, ...] = ()
    claimed_bytes: int | None = None
    claimed_sha256: str | None = None
    claimed_autov3: str | None = None
    ground_truth_url: str | None = None
    refusal: str | None = None
    left: str | None = None
    missing: str | None = None
    known_fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change when the source says something else; those of its row for an item read back."""
        if self.known_fingerprint:
            return self.known_fingerprint
        said = asdict(self)
        if self.available_at is None:  # most have none: their fingerprints are those of before there was one
            del said["available_at"]
        if self.left is None:
            del said["left"]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass
class Conclusions:
    """The likeliest claims about a file, and those that cannot all be true."""

    captions: list[Caption]
    base_model: Claim | None = None
    family: Claim | None = None
    n0: N0 | None = None
    contradictions: list[str] = field(default_factory=list)
    claims: dict[str, list[list[Any]]] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    wanted: Wanted = Wanted(None, None, None, "nothing", "none", "neither claims nor shapes say")


# Whom to believe about N0, the surest first: counted pictures, then what the training program wrote, then prose.
_COUNT_ORDER = ("training-data", "sidecar", "ss_dataset_dirs", "ss_datasets", "description")
_BASE_ORDER = ("sidecar", "base_model", "baseModel", "ss_sd_model_name", "ss_base_model_version",
               "modelspec.architecture")  # fmt: skip


def conclude(item: Item, header: Header | None) -> Conclusions:
    """Weigh the claims of ``item`` and of its file's ``header`` (None where the file was not looked at)."""
    metadata = header.metadata if header else {}
    bases = [*item.base_models, *_bases_of(metadata)]
    counts = _in_order([*item.n0, *n0_claims(metadata)], _COUNT_ORDER)
    bases = _in_order(bases, _BASE_ORDER)
    families = [Claim(family_of_name(claim.value), claim.source) for claim in bases]
    named = [claim for claim in families if claim.value != Family.other]
    shapes = family_of_shapes(header.tensors) if header else None
    if shapes:
        closer = next((claim.value for claim in named if agree(shapes, claim.value)), shapes)
        named = [Claim(closer, "shapes"), *named]
    found = Conclusions(
        captions=rank_captions([*item.captions, *captions_from_metadata(metadata)]),
        base_model=bases[0] if bases else None,
        family=named[0] if named else (families[0] if families else None),
        n0=counts[0] if counts else None,
        training=training_of(metadata, header.tensors) if header else Training(),
        wanted=wanted(
            claims_of(metadata, [(claim.value, claim.source) for claim in bases]),
            shapes,
            next((claim.value for claim in named if claim.source != "shapes"), None),
        ),
        claims={
            "base_model": [[claim.value, claim.source] for claim in bases],
            "base_hash": [[clean_text(metadata[name], 100), name] for name in HASHES if metadata.get(name)],
            "family": [[claim.value, claim.source] for claim in named],
            "training_images": [[claim.count, claim.source] for claim in counts],
        },
    )
    if len({claim.value for claim in named}) > 1:
        found.contradictions.append("family: " + ", ".join(f"{claim.value} ({claim.source})" for claim in named))
    if len({claim.count for claim in counts}) > 1:
        found.contradictions.append("N0: " + ", ".join(f"{claim.count} ({claim.source})" for claim in counts))
    repeats = _repeats(metadata)
    if repeats:
        found.contradictions.append(repeats)
    return found


def _in_order(claims: list[Any], order: tuple[str, ...]) -> list[Any]:
    unique = list(dict.fromkeys(claims))
    return sorted(unique, key=lambda claim: order.index(claim.source) if claim.source in order else len(order))


def _bases_of(metadata: Mapping[str, str]) -> list[Claim]:
    names = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    claims = [Claim(clean_text(metadata.get(name, ""), 200), name) for name in names]
    return [claim for claim in claims if claim.value and claim.value.lower() not in ("none", "model.safetensors")]


def _repeats(metadata: Mapping[str, str]) -> str | None:
    """What is wrong with ss_num_train_images, which counts every repeat, where it can be checked."""
    try:
        folders = parse_json(metadata["ss_dataset_dirs"])
        total = int(metadata["ss_num_train_images"])
        counted = sum(int(entry["img_count"]) * int(entry["n_repeats"]) for entry in folders.values())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    if max(abs(total), abs(counted)) > MAX_COUNT:
        return None
    return None if total == counted else f"ss_num_train_images: {total} stated, {counted} by ss_dataset_dirs"


def base_claims_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What a row's claims say it was trained on: hashes and names, each with the field that says it."""
    claims: dict[str, list[list[Any]]] = {}
    with suppress(ValueError, TypeError):
        claims = json.loads(row["claims"] or "{}")
    pairs = [*claims.get("base_hash", []), *claims.get("base_model", [])]
    return [(str(value), str(source)) for value, source in pairs]


_N_IMAGES = re.compile(
    r"(?:train\w{0,20}|dataset|data set)\b[^.!?\n]{0,60}?\b(\d{1,4})\s+(?:[a-z-]+\s+){0,2}?"
    r"(?:images?|pictures?|photos?|pics)\b"
    r"|\b(\d{1,4})\s+(?:[a-z-]+\s+){0,2}?(?:images?|pictures?|photos?|pics)\b[^.!?\n]{0,40}?\b(?:train|dataset)",
    re.IGNORECASE,
)


def count_in_prose(description: object) -> N0 | None:
    """N0 as a model's description puts it ("trained on 23 images"), or None. HTML is stripped, never rendered."""
    prose = description[:50_000] if isinstance(description, str) else ""
    text = html.unescape(re.sub(r"<[^<>]{0,1000}>", " ", prose))
    found = _N_IMAGES.search(re.sub(r"\s+", " ", text))
    number = int(found.group(1) or found.group(2)) if found else 0
    return N0(number, "description") if number > 0 else None


def clean_name(name: object) -> str:
    """A file name from outside for showing: no folders, printable, at most 200 characters. Never part of a path."""
    last = re.split(r"[/\\]", name)[-1] if isinstance(name, str) else ""
    return clean_text(last, 200) or "unnamed"


# Tolerant reading of JSON from outside: whatever is not of the expected kind counts as absent.


def text_of(value: object, limit: int = 1000) -> str:
    """A string, cleaned and bounded; numbers become strings; anything else is empty."""
    if isinstance(value, str):
        return clean_text(value, limit)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18 else ""


def list_of(value: object, limit: int = 1000) -> list[Any]:
    """A list of at most ``limit`` entries, or an empty one."""
    return value[:limit] if isinstance(value, list) else []


def dict_of(value: object) -> dict[str, Any]:
    """An object, or an empty one."""
    return value if isinstance(value, dict) else {}


def hex_of(value: object, digits: int) -> str | None:
    """Lower-case hexadecimal digits of the right number, or None."""
    text = value.strip().lower() if isinstance(value, str) and len(value) < 200 else ""
    return text if len(text) == digits and re.fullmatch(r"[0-9a-f]+", text) else None


def time_of(value: object) -> datetime | None:
    """An ISO 8601 time with a zone, or None."""
    if isinstance(value, datetime):
        return value
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) and len(value) < 50 else None
    except ValueError:
        return None
    return found if found and found.tzinfo and 1990 < found.year < 2200 else None
