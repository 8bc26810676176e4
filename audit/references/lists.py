"""Lists of PDQ hashes, as hash-sharing programmes hand them out: references of which there are no pictures.

A line is a hash, or a row of CSV or an object of JSON with one; what else it may say is its quality and a name, and the
rest is kept as metadata. ThreatExchange's forms are read without its package, which wants a search library: the lines
"pdq HASH" of its local files (LocalFileSignalExchangeAPI), and the objects of its API, with an indicator and a type,
alone on a line or in a document's "data". A hash is the picture's vector too, by the descriptor pdq: its cosine says
how many bits differ.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from audit.descriptors.pdq import MIN_QUALITY
from audit.errors import ReferenceSetError
from audit.locations import shown_url
from audit.references.folder import SkippedImage
from audit.references.inputs.metadata import metadata_text
from audit.storable import path_as_text
from audit.untrusted.documents import parse_json

SUFFIXES = (".txt", ".csv", ".jsonl", ".json")
MOST_DOCUMENT = 256 << 20  # bytes of a document of JSON
MOST_LINES = 2_000_000
MOST_CHARACTERS = 4096  # of a line
MOST_NAME = 200
HASH = re.compile(r"[0-9a-f]{64}")
HASHES = ("hash", "pdq", "pdq_hash", "value", "indicator", "signal", "hash_value", "content_hash")
QUALITIES, NAMES = ("quality", "pdq_quality"), ("name", "id", "uuid")
TYPES = ("type", "signal_type", "hash_type")
OF_PDQ = ("pdq", "hash_pdq")


@dataclass(frozen=True)
class Listed:
    """The hashes of a list, each once: ``names`` [N], ``hashes`` uint8 [N, 32] and ``qualities`` int32 [N]; and the
    lines that were passed over, with the reason. ``metadata`` is what else is said of each, as JSON text.
    """

    names: list[str]
    hashes: np.ndarray
    qualities: np.ndarray
    metadata: list[str | None]
    skipped: list[SkippedImage]

    def rows(self) -> dict[str, Any]:
        """Columns of the table of references, by name."""
        signs = np.unpackbits(self.hashes, axis=1).astype(np.float32) / 8 - 1 / 16
        return {
            "reference_id": [hashlib.sha256(b"pdq " + one.tobytes()).hexdigest() for one in self.hashes],
            "name": self.names, "descriptor": signs, "pdq": [one.tobytes() for one in self.hashes],
            "pdq_quality": self.qualities, "metadata": self.metadata,
        }  # fmt: skip


def is_list(path: Path) -> bool:
    """Whether ``path`` is a list by its ending."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read_list(path: Path) -> Listed:
    """The hashes of a list. Raises ReferenceSetError where it cannot be read, is too long, or has none.

    A line that is no hash of 64 hex digits, or whose quality is no number from 0 to 100, costs itself. Quality below 50
    says nothing, and is passed over as well; a line without has 100.
    """
    names: list[str] = []
    hashes: list[bytes] = []
    qualities: list[int] = []
    metadata: list[str | None] = []
    skipped: list[SkippedImage] = []
    first: dict[bytes, int] = {}
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for number, said in _entries(path, file):
                try:
                    value, quality, name, about = _entry(said)
                    if value in first:
                        raise ValueError(f"the same hash as line {first[value]}")
                except ValueError as error:
                    skipped.append(SkippedImage(f"line {number}", str(error)))
                    continue
                first[value] = number
                names.append(name or f"line {number}")
                hashes.append(value)
                qualities.append(quality)
                metadata.append(about)
    except OSError as error:
        raise ReferenceSetError(f"{path} cannot be read: {error.strerror}") from error
    if not hashes:
        why = "; ".join(f"{one.name}: {one.reason}" for one in skipped[:3]) or "it is empty"
        raise ReferenceSetError(f"{path} holds no PDQ hashes ({why})")
    whole = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    return Listed(names, whole, np.array(qualities, np.int32), metadata, skipped)


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    """The lines, those that are too long cut off. Raises ReferenceSetError for too many."""
    for _ in range(MOST_LINES + 1):
        line = file.readline(MOST_CHARACTERS)
        if not line:
            return
        end = line
        while end and not end.endswith("\n") and len(end) == MOST_CHARACTERS:
            end = file.readline(MOST_CHARACTERS)
        yield line if end is line else ""
    raise ReferenceSetError(f"{path} has more than {MOST_LINES} lines: add it as several sets")


def _entries(path: Path, file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, what it says) of each that is not empty."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from _document(path)
        return
    lines = _lines(path, file)
    if suffix == ".csv":
        fields = [one.strip().lower() for one in _cells(next(lines, ""))]
        if not set(fields) & set(HASHES):
            raise ReferenceSetError(f"{path} has no column of hashes: call it {HASHES[0]}, in the first line")
        for number, line in enumerate(lines, start=2):
            if line.strip():
                yield number, dict(zip(fields, _cells(line), strict=False))
        return
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if suffix == ".jsonl" and text:
            yield number, _object(text)
        elif text and not text.startswith("#"):
            kind, space, rest = text.partition(" ")
            typed = bool(space) and not kind.endswith(",")
            value, _, quality = (rest if typed else text).partition(",")
            yield number, {"hash": value, "quality": quality.strip() or None} | ({"type": kind} if typed else {})


def _document(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a document, numbered as they come."""
    if path.stat().st_size > MOST_DOCUMENT:
        raise ReferenceSetError(f"{path} is larger than {MOST_DOCUMENT >> 20} MiB: write it as lines of JSON (.jsonl)")
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ReferenceSetError(f"{path} is no JSON that is read ({str(error)[:200]})") from error
    rows = found.get("data") if isinstance(found, dict) else found
    if not isinstance(rows, list) or len(rows) > MOST_LINES:
        raise ReferenceSetError(f'{path} holds no list of hashes, nor one called "data", of {MOST_LINES} at most')
    for number, one in enumerate(rows, start=1):
        yield number, {str(name).lower(): value for name, value in one.items()} if isinstance(one, dict) else {}


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {str(name).lower(): value for name, value in found.items()} if isinstance(found, dict) else {}


def _entry(said: dict[str, Any]) -> tuple[bytes, int, str, str | None]:
    """(hash, quality, name, metadata). Raises ValueError with the reason why there is none."""
    kind = next((said[one] for one in TYPES if isinstance(said.get(one), str) and said[one]), OF_PDQ[0])
    if kind.lower() not in OF_PDQ:
        raise ValueError(f"it is a {path_as_text(kind[:30])}, and no PDQ hash")
    text = next((said[name] for name in HASHES if said.get(name) is not None), None)
    if not isinstance(text, str) or not HASH.fullmatch(text.strip().lower()):
        raise ValueError("it has no hash of 64 hex digits")
    given = next((said[name] for name in QUALITIES if said.get(name) not in (None, "")), 100)
    quality = str(given).strip()
    if not quality.isascii() or not quality.isdigit() or len(quality) > 3 or int(quality) > 100:
        raise ValueError(f"{path_as_text(quality[:20])!r} is no quality from 0 to 100")
    if int(quality) < MIN_QUALITY:
        raise ValueError(f"quality {quality} says too little: {MIN_QUALITY} is the least")
    name = next((said[one] for one in NAMES if isinstance(said.get(one), str | int)), "")
    told = {*HASHES, *QUALITIES, *NAMES, *TYPES}
    about = {one: value for one, value in said.items() if one not in told and value not in (None, "")} if said else {}
    return (
        bytes.fromhex(text.strip()),
        int(quality),
        path_as_text(shown_url(str(name)))[:MOST_NAME],
        metadata_text(about),
    )
