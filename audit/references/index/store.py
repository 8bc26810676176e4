"""Where the arrays of large sets are kept: files that are mapped into memory, made once of the table of references.

A set of fewer than LARGE references is read from the table each time. Of larger ones a folder holds the arrays, named
by the set, its descriptor and a stamp of what the table holds of it: when that changes, another folder is made, and the
old one goes. Processes of a machine share it. It is made under another name, and counts from the moment it is renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.descriptors.pdq import MIN_QUALITY
from audit.errors import ReferenceSetError, WorkspaceError
from audit.files import ABANDONED, make_folder, private_file
from audit.progress import Tell, quiet
from audit.references.index.bank import UNKNOWN, Bank, unit_vectors
from audit.references.index.hashes import BRUTE, PARTS, Parts, build_part, packed
from audit.references.index.quantized import Passing, Quantized, quantized

if TYPE_CHECKING:
    from audit.workspace import Workspace

log = logging.getLogger(__name__)
FORMAT = 1  # of the files
LARGE = 20_000  # references
ROWS = 4096  # that are read at once
KEPT_OPEN = 8  # banks that a process has mapped
FOLDER = "index"
META = "index.json"
Shapes = dict[str, tuple[type[np.generic], tuple[int, ...]]]  # of the files: what their numbers are, and the shape
_opened: OrderedDict[Path, Bank] = OrderedDict()
_one_opens = threading.Lock()

# Who adds, replaces or removes a reference changes how many there are, or the sum of when they were added.
_STAMP = """SELECT count(*) AS n, max(added_at) AS newest, sum(epoch_us(added_at)) AS added
FROM "references" WHERE reference_set = ? AND descriptor_name = ?"""
_ROWS = """SELECT reference_id, descriptor, pdq, pdq_quality, least(width, height) AS side
FROM "references" WHERE reference_set = ? AND descriptor_name = ?"""

_WIDTH = 'SELECT len(descriptor) FROM "references" WHERE reference_set = ? AND descriptor_name = ? LIMIT 1'


def open_bank(
    connection: duckdb.DuckDBPyConnection, workspace: Workspace, name: str, descriptor_name: str, tell: Tell = quiet,
    large: int | None = None,
) -> Bank:  # fmt: skip
    """The references of the set ``name`` as ``descriptor_name`` describes them, as arrays.

    ``connection`` sees the table of references; arrays of sets of ``large`` ones (LARGE) and more are kept with the
    ``workspace``. One that was replaced or removed while its index was made leaves none behind. Raises
    ReferenceSetError where vectors are of several widths, or one is no direction.
    """
    about = [name, descriptor_name]
    stamp = _stamp(connection, about)
    if stamp["n"] < (LARGE if large is None else large):
        return _in_memory(connection, about)
    place = workspace.files.scratch / FOLDER
    folder = place / f"{set_key(name)}-{key_of(descriptor_name)}-{key_of(str([FORMAT, *stamp.values()]))}"
    with _one_opens:
        if folder not in _opened:
            found = _mapped(folder)
            if found is None:
                found = _made(connection, folder, about, stamp["n"], tell)
                # who replaces or removes a set does it first, and then removes the indexes that are there
                if workspace.asked(lambda now: _stamp(now, about), '"references"') != stamp:
                    shutil.rmtree(folder, ignore_errors=True)
                    return found
            _opened[folder] = found
        _opened.move_to_end(folder)
        while len(_opened) > KEPT_OPEN:
            _opened.popitem(last=False)
        return _opened[folder]


def _stamp(connection: duckdb.DuckDBPyConnection, about: list[str]) -> dict[str, Any]:
    """What the table holds of a set and descriptor; it changes with every row of theirs."""
    [stamp] = connection.sql(_STAMP, params=about).to_arrow_table().to_pylist()
    return dict(stamp)


def forget(scratch: Path, name: str) -> None:
    """Remove what is kept of the set ``name``, and what was begun of it."""
    for pattern in (f"{set_key(name)}-*", f".{set_key(name)}-*"):
        for folder in (scratch / FOLDER).glob(pattern):
            with _one_opens:
                _opened.pop(folder, None)
            shutil.rmtree(folder, ignore_errors=True)
            if folder.is_file():  # what audit/references/index/known.py keeps
                folder.unlink(missing_ok=True)


def key_of(text: str) -> str:
    """What a text is called in names of files, 16 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def set_key(name: str) -> str:
    """With which the names of all that is kept of the set ``name`` begin."""
    return key_of(f"set {name}")


def _batches(connection: duckdb.DuckDBPyConnection, about: list[str]) -> Iterator[pa.RecordBatch]:
    yield from connection.sql(_ROWS, params=about).to_arrow_reader(ROWS)


def _arrays(batch: pa.RecordBatch, width: int, about: list[str]) -> dict[str, np.ndarray]:
    """The arrays of some rows, by name."""
    ids = batch["reference_id"].to_pylist()
    for given in pc.unique(pc.list_value_length(batch["descriptor"])).to_pylist():
        if given != width:
            raise ReferenceSetError(
                f"the reference set {about[0]!r} holds vectors of {width} and of {given} numbers by {about[1]}: add it "
                "again"
            )
    flat = batch["descriptor"].flatten().to_numpy(zero_copy_only=False)
    vectors = unit_vectors(flat.reshape(-1, width), [f"{one} in the set {about[0]!r}" for one in ids])
    hashes = b"".join(one if one is not None else bytes(32) for one in batch["pdq"].to_pylist())
    quality = batch["pdq_quality"].fill_null(UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int16)
    quality[batch["pdq"].is_null().to_numpy(zero_copy_only=False)] = UNKNOWN
    return {
        "vectors": vectors, "hashes": packed(np.frombuffer(hashes, np.uint8).reshape(-1, 32)), "quality": quality,
        "side": batch["side"].fill_null(UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32),
    }  # fmt: skip


def _in_memory(connection: duckdb.DuckDBPyConnection, about: list[str]) -> Bank:
    parts, ids, width = [], [], 0
    for batch in _batches(connection, about):
        width = width or len(batch["descriptor"][0])
        ids += batch["reference_id"].to_pylist()
        parts.append(_arrays(batch, width, about))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else _none(width)
    return Bank(pa.array(ids, pa.string()), whole["vectors"], whole["hashes"], whole["quality"], whole["side"])


def _none(width: int) -> dict[str, np.ndarray]:
    return {
        "vectors": np.empty((0, width), np.float32), "hashes": np.empty((0, 4), np.uint64),
        "quality": np.empty(0, np.int16), "side": np.empty(0, np.int32),
    }  # fmt: skip


def _shapes(number: int, width: int, hashed: int) -> Shapes:
    """The files of an index: what their numbers are, and their shape."""
    found: Shapes = {
        "vectors": (np.float32, (number, width)), "numbers": (np.int8, (number, width)),
        "scales": (np.float32, (number,)), "errors": (np.float32, (number,)),
        "hashes": (np.uint64, (number, 4)), "quality": (np.int16, (number,)), "side": (np.int32, (number,)),
    }  # fmt: skip
    if hashed >= BRUTE:
        found["starts"] = (np.int64, (PARTS, (1 << 16) + 1))
        found["others"] = (np.uint64, (PARTS, hashed, 2))
        found["order"] = (np.int32, (PARTS, hashed))
    return found


def _made(connection: duckdb.DuckDBPyConnection, folder: Path, about: list[str], number: int, tell: Tell) -> Bank:
    """The arrays made of the table, and kept in ``folder``."""
    started = time.monotonic()
    _tidy(folder.parent)
    making = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    make_folder(making)
    [[width]] = connection.sql(_WIDTH, params=about).fetchall()
    try:
        _write(_batches(connection, about), making, about, number, width, tell)
        with suppress(OSError):  # another process has made it meanwhile
            making.rename(folder)
    except OSError as error:
        if not making.exists():
            raise WorkspaceError(
                f"the set {about[0]!r} was replaced or removed while it was indexed: run the same command again"
            ) from error
        raise WorkspaceError(
            f"the index of the set {about[0]!r} cannot be written to {folder.parent} ({error.strerror or error}): it "
            f"takes some {number * (width * 5 + 600) / 2**20:.0f} MiB; free them, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    bank = _mapped(folder)
    if bank is None:
        raise ReferenceSetError(f"the index of the set {about[0]!r} cannot be kept in {folder.parent}")
    set_of, descriptor_of, _ = folder.name.split("-")
    for old in folder.parent.glob(f"{set_of}-{descriptor_of}-*"):  # processes that have it open keep what they mapped
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    log.info("indexed %d references of %s in %.1f s", number, about[0], time.monotonic() - started)
    return bank


def _write(
    batches: Iterator[pa.RecordBatch], folder: Path, about: list[str], number: int, width: int, tell: Tell
) -> None:
    """Write all files of an index of ``batches``, rows as _ROWS has them, ``number`` in all, into an empty folder."""
    hashed = _write_rows(batches, folder, about, number, width, tell)
    _write_parts(folder, _shapes(number, width, hashed), tell)
    sizes = {path.name: (path.stat().st_size, _checksum(path)) for path in sorted(folder.iterdir())}
    meta = {"format": FORMAT, "references": number, "width": width, "hashed": hashed, "files": sizes}
    with private_file(folder / META) as file:
        file.write(json.dumps(meta).encode())


def _write_rows(
    batches: Iterator[pa.RecordBatch], folder: Path, about: list[str], number: int, width: int, tell: Tell
) -> int:
    """Write what follows from one row at a time; how many hashes say something."""
    maps = _maps(folder, _shapes(number, width, 0), "r+")
    passing = [Passing(one) for one in maps.values()]
    done = hashed = 0
    with private_file(folder / "ids.arrow") as file, pa.ipc.new_file(
        file, pa.schema([("reference_id", pa.string())])
    ) as writer:  # fmt: skip
        for batch in batches:
            writer.write_batch(batch.select(["reference_id"]))
            end = done + batch.num_rows
            arrays = _arrays(batch, width, about)
            small = quantized(arrays["vectors"])
            for name, values in {**arrays, "numbers": small.numbers, "scales": small.scales,
                                 "errors": small.errors}.items():  # fmt: skip
                maps[name][done:end] = values
            hashed += int((arrays["quality"] >= MIN_QUALITY).sum())
            done = end
            for one in passing:
                one.reached(done)
            tell("indexing", done, number)
    for one in maps.values():
        one.flush()
    return hashed


def _write_parts(folder: Path, shapes: Shapes, tell: Tell) -> None:
    """Write the parts of the hashes, one after the other: each needs memory of its own."""
    if "starts" not in shapes:
        return
    known = _maps(folder, {name: shapes[name] for name in ("hashes", "quality")}, "r")
    hashes = known["hashes"][known["quality"] >= MIN_QUALITY]
    maps = _maps(folder, {name: shapes[name] for name in ("starts", "others", "order")}, "r+")
    passing = [Passing(one) for one in maps.values()]
    for part in range(PARTS):
        maps["starts"][part], maps["others"][part], maps["order"][part] = build_part(hashes, part)
        for one in passing:
            one.reached(part + 1)
        tell("indexing hashes", part + 1, PARTS)
    for one in maps.values():
        one.flush()


def _maps(folder: Path, shapes: Shapes, mode: Literal["r", "c", "r+"]) -> dict[str, Any]:
    found = {}
    for name, (kind, shape) in shapes.items():
        path = folder / f"{name}.bin"
        if mode == "r+":  # a full disk is an error here, and the end of the process where a page of it is written to
            with private_file(path) as file:
                size = max(int(np.prod(shape)) * np.dtype(kind).itemsize, 1)
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
        found[name] = np.memmap(path, dtype=kind, mode=mode, shape=shape)
    return found


def _mapped(folder: Path) -> Bank | None:
    """The arrays kept in ``folder``; None where there are none, or they are damaged."""
    try:
        meta = json.loads((folder / META).read_text())
        for name, (size, checksum) in meta["files"].items():
            if (folder / name).stat().st_size != size or _checksum(folder / name) != checksum:
                raise ValueError(f"{name} is damaged")
        shapes = _shapes(meta["references"], meta["width"], meta["hashed"])
        for name, (kind, shape) in shapes.items():
            if (folder / f"{name}.bin").stat().st_size != int(np.prod(shape)) * np.dtype(kind).itemsize:
                raise ValueError(f"{name} is of another size than {META} says")
        maps = _maps(folder, shapes, "c")  # torch takes no arrays that cannot be written to
        with pa.memory_map(str(folder / "ids.arrow")) as file:
            ids = pa.ipc.open_file(file).read_all()["reference_id"].combine_chunks()
        if len(ids) != meta["references"]:
            raise ValueError(f"it has {len(ids)} ids, and {META} says {meta['references']}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, pa.ArrowException) as error:
        if folder.exists():
            log.warning("the index %s is made again: %s", folder.name, error)
            shutil.rmtree(folder, ignore_errors=True)
        return None
    small = Quantized(maps["numbers"], maps["scales"], maps["errors"])
    parts = Parts(maps["starts"], maps["others"], maps["order"]) if "starts" in maps else None
    return Bank(ids, maps["vectors"], maps["hashes"], maps["quality"], maps["side"], small, parts)


def _checksum(path: Path) -> int:
    """CRC32 of a file, which is read at several GB/s."""
    found = 0
    if path.stat().st_size:
        whole = np.memmap(path, np.uint8, "r")
        passing = Passing(whole)
        for start in range(0, len(whole), 1 << 24):
            passing.reached(start)
            found = zlib.crc32(whole[start : start + (1 << 24)].data, found)
    return found


def _tidy(folder: Path) -> None:
    """Remove what killed processes have left unfinished."""
    for path in folder.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
