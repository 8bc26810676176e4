"""What reference sets are made of: tars, Parquet files, lists of hashes and of URLs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audit.references.inputs.given import Given
from audit.references.inputs.parquet import Embeddings, columns_of, parquet_pictures
from audit.references.inputs.tars import BLOCK, given_in
from audit.references.inputs.web import urls_in
from audit.references.lists import read_list
from tests.fuzz.files import picture_seeds
from tests.fuzz.kind import FindingError, Kind
from tests.fuzz.mutate import TEXTS, as_bytes, chance, changed_bytes, changed_json, changed_text, one_of, spliced

ABOUT = {"caption": "a dog", "url": "https://example.org/a.png?x=1", "width": 24, "sha256": "0" * 64, "exif": "{}"}
MOST_NAME = 2100  # characters: a URL may have 2000


def sound(given: Given) -> None:
    """Raise FindingError where a picture is given under a name or with metadata that are too long."""
    if len(given.name) > MOST_NAME or len(given.metadata or "") > 4096 or len(given.refused or "") > 1000:
        raise FindingError(f"{given.name[:50]!r}: {len(given.name)}, {len(given.metadata or '')} characters")


def with_checksums(data: bytes) -> bytes:
    """A tar with the checksums of its headers put right, as far as it is one."""
    found = bytearray(data)
    for at in range(0, len(found) - BLOCK + 1, BLOCK):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + BLOCK])
    return bytes(found)


class Tars(Kind):
    """Tars as webdataset writes them, with extended headers, links and long names."""

    name, share = "tars", 60_000

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.path = place / "a.tar"
        self.picture = picture_seeds()["PNG-RGB-0"]
        self.seeds = [self._seed(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]

    def _seed(self, form: int) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=form) as tar:
            stem = "a" * (120 if form != tarfile.USTAR_FORMAT else 8)
            about = json.dumps(ABOUT).encode()
            for name, data in ((f"{stem}.png", self.picture), (f"{stem}.json", about), (f"{stem}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                if form == tarfile.PAX_FORMAT:
                    member.pax_headers = {"size": str(len(data)), "comment": "x"}
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
            tar.addfile(link)
        return content.getvalue()

    def make(self, choose: Random) -> bytes:
        seed = one_of(self.seeds, choose)
        if chance(choose, 0.05):
            return spliced(seed, one_of(self.seeds, choose), choose)
        found = changed_bytes(seed, choose, 4)
        return with_checksums(found) if chance(choose, 0.85) else found

    def check(self, data: bytes) -> None:
        self.path.write_bytes(data)
        for given in given_in(self.path):
            sound(given)


class Lists(Kind):
    """Lists of PDQ hashes and of URLs: text, CSV, lines of JSON, a document of ThreatExchange."""

    name, share = "lists", 40_000

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        one, two = "f" * 60 + "0123", "0" * 31 + "1" * 33
        rows = [{"hash": one, "quality": 90, "name": "a"}, {"indicator": two, "type": "HASH_PDQ", "tags": ["x"]}]
        self.seeds = [
            (".txt", f"# of pictures\n{one},90\npdq {two}\n"), (".csv", f"hash,quality,name\n{one},90,a\n{two},,\n"),
            (".jsonl", "\n".join(map(json.dumps, rows))), (".json", json.dumps({"data": rows})),
            (".txt", "https://example.org/a.png?x=1\nhttp://user:word@example.org/b.png\n"),
            (".csv", "url,caption\nhttps://example.org/a.png,a dog\n"),
        ]  # fmt: skip

    def make(self, choose: Random) -> bytes:
        ending, text = one_of(self.seeds, choose)
        if ending == ".json" and chance(choose, 0.7):
            data = as_bytes(changed_json(json.loads(text), choose), choose)
        elif chance(choose, 0.5):
            data = changed_text(text, choose).encode("utf-8", "surrogatepass")
        else:
            data = changed_bytes(text.encode(), choose, 3)
        return ending.encode() + b"\0" + data

    def check(self, data: bytes) -> None:
        ending, _, content = data.partition(b"\0")
        path = self.place / f"a{ending.decode()}"
        path.write_bytes(content)
        if b"://" in content and ending in (b".txt", b".csv"):
            for line in urls_in(path):
                sound(Given(line.name))
            return
        found = read_list(path)
        if not len(found.names) == len(found.hashes) == len(found.qualities) > 0:
            raise FindingError("a list without hashes, or with more of one than of another")


class Tables(Kind):
    """Parquet files of pictures and of vectors."""

    name, share, memory = "tables", 4_000, 512

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.path = place / "a.parquet"
        picture = picture_seeds()["PNG-RGB-0"]
        vectors = np.eye(4, dtype=np.float32)
        texts = ["", *TEXTS[:2], "https://example.org/?x"]
        tables = [
            pa.table({"image": [{"bytes": picture, "path": "a.png"}] * 2, "text": ["a dog", None], "n": [1, 2]}),
            pa.table({"jpg": [picture, None], "key": ["1", "2"]}),
            pa.table({"embedding": list(vectors), "url": [as_bytes(one).decode("utf-8", "replace") for one in texts]}),
            pa.table({"vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 4), "pdq": ["0" * 64] * 4}),
        ]
        self.seeds = []
        for table in tables:
            for compression in ("none", "zstd", "snappy"):
                content = io.BytesIO()
                pq.write_table(table, content, compression=compression)
                self.seeds.append(content.getvalue())

    def make(self, choose: Random) -> bytes:
        seed = one_of(self.seeds, choose)
        if chance(choose, 0.5):  # the footer tells everything, and pages behind it are small
            length = int.from_bytes(seed[-8:-4], "little") + 8
            return seed[:-length] + changed_bytes(seed[-length:-8], choose, 2) + seed[-8:]
        return changed_bytes(seed, choose, 3)

    def check(self, data: bytes) -> None:
        self.path.write_bytes(data)
        known = columns_of(self.path)
        if known.pictures is not None:
            for given in parquet_pictures(self.path, known).given:
                sound(given)
            return
        parts = Embeddings("a", [self.path], "nano", 4)
        for table in parts.parts():
            if not np.isfinite(np.concatenate(table["descriptor"].to_pylist())).all():
                raise FindingError("a vector that is not finite")
