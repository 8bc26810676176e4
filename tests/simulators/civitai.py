"""A local Civitai that behaves as its documentation and its clients' issue trackers say, over HTTP on loopback.

There are two servers on two ports: the API, and the object store that the presigned links lead to.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import io
import json
import pickle
import random
import re
import secrets
import struct
import sys
import threading
import time
import traceback
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import numpy as np
from safetensors.numpy import save
from werkzeug import Request, Response
from werkzeug.serving import WSGIRequestHandler, make_server

SORTS = ("Newest", "Highest Rated", "Most Downloaded")
PERIODS = {"Day": 1, "Week": 7, "Month": 30, "Year": 365, "AllTime": None}
NSFW_LEVELS = {"None": 1, "Soft": 2, "Mature": 4, "X": 8}
DEFAULT_AGENTS = re.compile(r"$|python-urllib|python-requests", re.IGNORECASE)
KEPT_HEADERS = ("Authorization", "User-Agent", "Range", "If-Range", "Accept")
CHUNK = 1 << 18
TEN_GIGABYTES = 10_000_000_000
ZEROS_OF_TOO_BIG = 1 << 26


class Fault(StrEnum):
    """What is wrong with a file. All but ``none`` and ``rewritten_header`` change what a download gives."""

    none = "none"
    wrong_sha256 = "wrong_sha256"
    """The database has another SHA256 (and AutoV2)."""
    missing_sha256 = "missing_sha256"
    """The database has neither SHA256 nor AutoV2."""
    rewritten_header = "rewritten_header"
    """The database SHA256 is of the file with other __metadata__; AutoV3 is right."""
    drops_halfway = "drops_halfway"
    """The first download closes the connection after half of the bytes; Range gets the rest."""
    link_expires = "link_expires"
    """The first link that a download uses breaks after half and then answers 403; a fresh link goes on."""
    ignores_range = "ignores_range"
    """Range answers 200 with the whole file; the first download drops halfway."""
    pickle = "pickle"
    """A .ckpt file with metadata.format PickleTensor."""
    disguised_pickle = "disguised_pickle"
    """The format says SafeTensor, the content is a zip (even id) or a bare pickle (odd id)."""
    bad_header = "bad_header"
    """A tensor's offsets lie behind the end of the file."""
    huge_header = "huge_header"
    """The header's length is five gigabytes."""
    truncated = "truncated"
    """A complete download whose tensor data is shorter than its header says."""
    html = "html"
    """The object store answers 200 with a web page."""
    not_found = "not_found"
    """The download answers 404."""
    server_error = "server_error"
    """The download always answers 500."""
    too_big = "too_big"
    """Content-Length says 10 GB (64 MB of zeros come, then the connection closes); sizeKB says small."""
    gzipped = "gzipped"
    """The object store compresses whole answers with gzip, asked or not; the first download drops halfway."""
    gzipped_range = "gzipped_range"
    """As gzipped, and Range answers 206 with a range of the compressed bytes."""
    corrupt_once = "corrupt_once"
    """The first download has a flipped byte in the tensor data."""


GZIPPED = (Fault.gzipped, Fault.gzipped_range)
DROPS = (*GZIPPED, Fault.drops_halfway, Fault.link_expires, Fault.ignores_range)


@dataclass
class SimFile:
    """One file. ``content`` is the right safetensors file; what is served and listed follows from ``fault``."""

    id: int
    name: str
    content: bytes | Path
    type: str = "Model"
    fault: Fault = Fault.none
    primary: bool = True
    format: str = "SafeTensor"
    scan: str = "Success"


@dataclass
class SimVersion:
    """One version. ``images`` are dicts with id, url, width, height, nsfwLevel (None, Soft, Mature, X) and meta."""

    id: int
    name: str
    base_model: str = "SD 1.5"
    trained_words: list[str] = field(default_factory=list)
    files: list[SimFile] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    published_at: str = "2026-01-01T00:00:00.000Z"
    early_access_until: str | None = None
    """Until then it is listed, and its download answers 401 to a right token."""
    names_the_date: str = "earlyAccessEndsAt"
    """Where the date is said: this field of the version, or ``deadline`` of the refusal."""


@dataclass
class SimModel:
    """One model with its versions, newest first."""

    id: int
    name: str
    type: str = "LORA"
    creator: str | None = "someone"
    tags: list[str] = field(default_factory=list)
    nsfw: bool = False
    nsfw_level: int = 1
    poi: bool = False
    minor: bool = False
    mode: str | None = None
    allow_commercial_use: list[str] = field(default_factory=lambda: ["Image"])
    description: str | None = None
    versions: list[SimVersion] = field(default_factory=list)


class Seen(NamedTuple):
    """A request as it came: ``path`` with its query, and the headers that matter."""

    method: str
    path: str
    headers: dict[str, str]


class Dropped(Exception):
    """Raised in a response body to close the connection in the middle."""


class _Handler(WSGIRequestHandler):
    """Keeps connections alive (werkzeug's own handler closes them) and prints nothing about dropped ones."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log(self, type: str, message: str, *args: Any) -> None:
        pass

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass

    def run_wsgi(self) -> None:
        self.close_connection = True
        if self.server.stopped:  # type: ignore[attr-defined]
            return
        environ = self.make_environ()
        environ["wsgi.input"] = io.BytesIO(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], Any]:
            code, _, message = status.partition(" ")
            self.send_response(int(code), message)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            return self.wfile.write

        body = self.server.app(environ, start_response)
        try:
            for chunk in body:
                self.wfile.write(chunk)
        except (Dropped, OSError):
            return
        finally:
            body.close()  # type: ignore[attr-defined]
        self.close_connection = self.headers.get("Connection", "").lower() == "close"


class LocalServer:
    """Answers HTTP on a free port of the loopback address, in daemon threads, until it is closed."""

    def __init__(self, answer: Callable[[Request], Response]) -> None:
        def app(environ: dict[str, Any], start_response: Any) -> Any:
            try:
                response = answer(Request(environ))
            except Exception:
                traceback.print_exc(file=sys.stderr)
                response = Response("the simulator is broken", 599)
            return response(environ, start_response)

        self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Handler)
        self._server.stopped = False  # type: ignore[attr-defined]
        self._server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop; connections that are still open are closed at their next request."""
        self._server.stopped = True  # type: ignore[attr-defined]
        self._server.shutdown()
        self._server.server_close()


class Limits:
    """Says which requests answer 429 (``burst`` in a row after each ``every``) or 500 (each ``error_every``-th)."""

    def __init__(self, every: int, burst: int, error_every: int) -> None:
        self._every, self._burst, self._error_every = every, burst, error_every
        self._requests = self._total = 0
        self._lock = threading.Lock()

    def refuse(self) -> int | None:
        """The status that this request is refused with, if any."""
        with self._lock:
            self._total += 1
            if self._every:
                self._requests += 1
                if self._requests > self._every:
                    if self._requests >= self._every + self._burst:
                        self._requests = 0
                    return 429
            if self._error_every and self._total % self._error_every == 0:
                return 500
        return None


class Record:
    """Thread-safe counts of endpoints, and the last requests."""

    def __init__(self, kept: int) -> None:
        self.counts: Counter[str] = Counter()
        self.requests: deque[Seen] = deque(maxlen=kept)
        self._lock = threading.Lock()

    def count(self, kind: str) -> None:
        """Count one of ``kind``."""
        with self._lock:
            self.counts[kind] += 1

    def see(self, request: Request) -> None:
        """Keep what matters of ``request``."""
        headers = {name: request.headers[name] for name in KEPT_HEADERS if name in request.headers}
        self.requests.append(Seen(request.method, request.full_path.rstrip("?"), headers))


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as a JSON response."""
    return Response(json.dumps(value), status, headers, content_type="application/json")


def size_of(content: bytes | Path) -> int:
    """The length of a file's content."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def bytes_of(content: bytes | Path) -> bytes:
    """A file's content in memory."""
    return content if isinstance(content, bytes) else content.read_bytes()


def chunks_of(content: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``start`` to ``stop``, in pieces."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


def asked_range(value: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the byte after the last that a Range header asks for; None without a valid one."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", value or "")
    if not match or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop or start >= size else None


def file_response(
    request: Request,
    content: bytes | Path,
    headers: dict[str, str],
    *,
    size: int | None = None,
    ignore_range: bool = False,
    stop_after: int | None = None,
) -> Response:
    """``content`` by 200, 206 or 416. ``size`` may pretend more than there is; ``stop_after`` bytes the line drops."""
    size = size_of(content) if size is None else size
    wanted = None if ignore_range else asked_range(request.headers.get("Range"), size)
    if request.headers.get("If-Range", headers.get("ETag")) != headers.get("ETag"):
        wanted = None
    if wanted and wanted[0] >= size:
        return Response("", 416, headers | {"Content-Range": f"bytes */{size}"})
    start, stop = wanted or (0, size)
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
    headers["Content-Length"] = str(stop - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"

    def body() -> Iterator[bytes]:
        sent = 0
        for chunk in chunks_of(content, start, stop):
            if stop_after is not None and sent + len(chunk) > stop_after:
                yield chunk[: stop_after - sent]
                raise Dropped
            sent += len(chunk)
            yield chunk
        zeros = min(stop - start - sent, ZEROS_OF_TOO_BIG)
        yield from (bytes(CHUNK) for _ in range(zeros // CHUNK))
        if zeros >= CHUNK:
            raise Dropped

    return Response(body(), 206 if wanted else 200, headers)


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the tensor bytes behind it."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_header(header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file of ``header`` and tensor bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """The same tensors with other __metadata__."""
    header, data = split_header(content)
    header.pop("__metadata__", None)
    return join_header(({"__metadata__": metadata} if metadata else {}) | header, data)


def tiny_lora(seed: int, metadata: dict[str, str] | None = None, rank: int = 2, width: int = 768) -> bytes:
    """A valid kohya LoRA of a few KB; the same bytes for the same arguments."""
    random_numbers = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in ("attn2_to_k", "attn2_to_v"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}"
        tensors[f"{name}.lora_down.weight"] = random_numbers.normal(0, 0.02, (rank, width)).astype(np.float16)
        tensors[f"{name}.lora_up.weight"] = random_numbers.normal(0, 0.02, (32, rank)).astype(np.float16)
        tensors[f"{name}.alpha"] = np.array(rank, dtype=np.float16)
    return with_metadata(save(tensors), metadata or {})


def served(file: SimFile) -> bytes | Path:
    """The bytes that a complete download of ``file`` gives."""
    match file.fault:
        case Fault.pickle:
            return _pickle(zipped=True)
        case Fault.disguised_pickle:
            return _pickle(zipped=file.id % 2 == 0)
        case Fault.huge_header:
            return struct.pack("<Q", 5_000_000_000) + bytes_of(file.content)[8:]
        case Fault.truncated:
            return bytes_of(file.content)[:-100]
        case Fault.bad_header:
            header, data = split_header(bytes_of(file.content))
            entry = header[max(set(header) - {"__metadata__"})]
            entry["data_offsets"] = [offset + 10 * len(data) for offset in entry["data_offsets"]]
            return join_header(header, data)
    return file.content


def hashes(file: SimFile) -> dict[str, str]:
    """The hashes of ``file`` in Civitai's database."""
    right = dict(_hashes(served(file)))
    match file.fault:
        case Fault.missing_sha256:
            del right["SHA256"], right["AutoV2"]
        case Fault.wrong_sha256:
            right["SHA256"] = hashlib.sha256(b"another file" + right["SHA256"].encode()).hexdigest().upper()
            right["AutoV2"] = right["SHA256"][:10]
        case Fault.rewritten_header:
            before = with_metadata(bytes_of(file.content), {"ss_output_name": "before Civitai rewrote the header"})
            right |= {kind: _hashes(before)[kind] for kind in ("SHA256", "AutoV1", "AutoV2", "CRC32", "BLAKE3")}
    return right


@lru_cache(maxsize=4096)
def _hashes(content: bytes | Path) -> dict[str, str]:
    data = bytes_of(content)
    sha256 = hashlib.sha256(data).hexdigest().upper()
    values = {
        "AutoV1": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8].upper(),
        "AutoV2": sha256[:10],
        "SHA256": sha256,
        "CRC32": f"{zlib.crc32(data):08X}",
        "BLAKE3": hashlib.sha3_256(data).hexdigest().upper(),
    }
    if len(data) > 8 and 8 + (start := struct.unpack_from("<Q", data)[0]) <= len(data):
        values["AutoV3"] = hashlib.sha256(data[8 + start :]).hexdigest()[:12].upper()
    return values


def _pickle(zipped: bool) -> bytes:
    data = pickle.dumps({"state_dict": {"weight": [0.0] * 500}}, protocol=2)
    return _zip({"archive/data.pkl": data, "archive/version": b"3\n"}) if zipped else data


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


class Civitai:
    """Serves ``models`` as Civitai's REST API v1 does, with its quirks; a context manager.

    ``token`` None means that downloads need no token. ``counts`` has one entry for each kind of request, ``requests``
    the last 50. ``link_seconds`` can be set to let presigned links expire earlier, ``broken_models`` to the status that
    whatever holds one of these models is answered with, a page of the listing too.
    """

    def __init__(
        self,
        models: list[SimModel],
        *,
        token: str | None = "secret-token",
        page_size_cap: int = 100,
        repeat_at_border: bool = True,
        skip_at_border: bool = False,
        empty_page_every: int = 0,
        burst_429_every: int = 0,
        burst_length: int = 2,
        retry_after: str | None = None,
        error_500_every: int = 0,
        require_user_agent: bool = True,
        latency: float = 0.0,
    ) -> None:
        if empty_page_every == 1:
            raise ValueError("a listing of empty pages only has no end")
        self.token, self.link_seconds, self.latency = token, 3600.0, latency
        self._page_size_cap, self._repeat, self._skip = page_size_cap, repeat_at_border, skip_at_border
        self._empty_page_every, self._retry_after = empty_page_every, retry_after
        self._require_user_agent = require_user_agent
        self._limits = Limits(burst_429_every, burst_length, error_500_every)
        self._record = Record(kept=50)
        self.counts, self.requests = self._record.counts, self._record.requests
        self._secret = secrets.token_bytes(16)
        self._lock = threading.RLock()
        self._models: dict[int, SimModel] = {}
        self._versions: dict[int, tuple[SimModel, SimVersion]] = {}
        self._files: dict[int, SimFile] = {}
        self.broken_models: dict[int, int] = {}
        self._orders: dict[str, list[tuple[str, int]]] = {}
        self._hash_index: dict[str, int] | None = None
        self._begun: set[int] = set()
        self._broken_links: dict[int, str] = {}
        for model in models:
            self.add(model)
        self.region_blocked = False  # every request answers 451, as Civitai's filter of regions does
        self.tensor_metadata = True  # whether GET /model-files/ID/tensor-metadata is served
        self.quota: int | None = None  # downloads that the account has left; then they answer 429
        self.quota_headers: dict[str, str] = {}
        self._api_server = LocalServer(self._api)
        self._store_server = LocalServer(self._store)
        self.url = self._api_server.url + "/api/v1"
        self.store_url = self._store_server.url

    def __enter__(self) -> Civitai:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop both servers."""
        self._api_server.close()
        self._store_server.close()

    def add(self, model: SimModel) -> None:
        """Publish ``model``, or publish it anew."""
        with self._lock:
            self.remove(model.id)
            self._models[model.id] = model
            for version in model.versions:
                self._versions[version.id] = model, version
                self._files |= {file.id: file for file in version.files}
            self._forget_indexes()

    def remove(self, model_id: int) -> None:
        """Delete a model: its requests answer 404 and no listing has it."""
        with self._lock:
            model = self._models.pop(model_id, None)
            for version in model.versions if model else []:
                self._versions.pop(version.id, None)
                for file in version.files:
                    self._files.pop(file.id, None)
            self._forget_indexes()

    def take_down(self, model_id: int) -> None:
        """Set the mode TakenDown: the model stays listed, without files and images."""
        self._models[model_id].mode = "TakenDown"
        self._forget_indexes()

    def archive(self, model_id: int) -> None:
        """Set the mode Archived: the model stays listed, without files."""
        self._models[model_id].mode = "Archived"
        self._forget_indexes()

    def _forget_indexes(self) -> None:
        with self._lock:
            self._orders.clear()
            self._hash_index = None

    # The API

    def _api(self, request: Request) -> Response:
        self._record.see(request)
        if self.latency:
            time.sleep(self.latency)
        if self._require_user_agent and DEFAULT_AGENTS.match(request.headers.get("User-Agent", "")):
            self._record.count("forbidden")
            return Response("<html><title>Just a moment...</title></html>", 403, content_type="text/html")
        if "token" in request.args:
            self._record.count("token-in-query")
        if self.token is not None and request.headers.get("Authorization", self._bearer()) != self._bearer():
            self._record.count("unauthorized")
            return json_response({"error": "Unauthorized"}, 401)
        if self.region_blocked:
            self._record.count("451")
            why = "Access to this service is not available in your region due to legal restrictions."
            return json_response({"error": why, "code": "REGION_BLOCKED"}, 451)
        if self.quota is not None and "download" in request.path:
            if self.quota == 0:
                self._record.count("quota")
                return json_response({"error": "Download limit reached"}, 429, self.quota_headers)
            self.quota -= 1
        if refused := self._limits.refuse():
            self._record.count(str(refused))
            headers = {"Retry-After": self._retry_after} if refused == 429 and self._retry_after else {}
            return json_response({"error": "Too many requests" if refused == 429 else "Server error"}, refused, headers)
        with self._lock:
            return self._route(request)

    def _bearer(self) -> str:
        return f"Bearer {self.token}"

    def _route(self, request: Request) -> Response:
        match (request.method, *request.path.strip("/").split("/")):
            case ("GET" | "HEAD", "login"):
                self._record.count("login")
                return Response("<!DOCTYPE html><html><title>Sign in</title></html>", content_type="text/html")
            case ("GET" | "HEAD", "api", "download", "models", version_id):
                self._record.count("download")
                return self._download(request, version_id)
            case ("GET", "api", "v1", "models"):
                self._record.count("models")
                return self._list_models(request)
            case ("GET", "api", "v1", "models", model_id):
                self._record.count("model")
                model = self._models.get(_number(model_id))
                if broken := self.broken_models.get(_number(model_id)):
                    return json_response({"error": "Server error"}, broken)
                if model is None:
                    return json_response({"error": f"No model with id {model_id}"}, 404)
                return json_response(self._model(model))
            case ("GET" | "POST", "api", "v1", "model-versions", "by-hash", *hashed) if len(hashed) <= 1:
                self._record.count("by-hash")
                return self._by_hash(request, *hashed)
            case ("GET", "api", "v1", "model-versions", version_id):
                self._record.count("version")
                if _number(version_id) not in self._versions:
                    return json_response({"error": f"No version with id {version_id}"}, 404)
                return json_response(self._whole_version(_number(version_id)))
            case ("GET", "api", "v1", "model-files", file_id, "tensor-metadata") if self.tensor_metadata:
                self._record.count("tensor-metadata")
                return self._tensor_metadata(_number(file_id))
            case ("GET", "api", "v1", "images"):
                self._record.count("images")
                return self._list_images(request)
        self._record.count("unknown")
        return json_response({"error": "Not found"}, 404)

    def _list_models(self, request: Request) -> Response:
        args = request.args
        limit, page = _number(args.get("limit", "100")), _number(args.get("page", "0"))
        sort = args.get("sort", "Highest Rated")
        if not 1 <= limit <= 100 or page < 0 or sort not in SORTS or args.get("period", "AllTime") not in PERIODS:
            return json_response({"error": "Invalid limit, page, sort or period"}, 400)
        if page and "query" in args:
            return json_response({"error": "Cannot use page param with query search. Use cursors."}, 400)
        if page * limit > 1000:
            self._record.count("429")
            return json_response({"error": "You've requested too many pages, please use cursors instead"}, 429)
        try:
            number, last = _open_cursor(args["cursor"]) if "cursor" in args else (max(page, 1), None)
        except ValueError:
            return json_response({"error": "Invalid cursor"}, 400)

        order, size = self._order(sort), min(limit, self._page_size_cap)
        if self._empty_page_every and number % self._empty_page_every == 0 and last is not None:
            return json_response(self._page(request, [], _cursor(number + 1, last)))
        find = bisect_right if self._repeat and size > 1 else bisect_left
        end = len(order) if last is None else find(order, last)
        wanted = self._filter(args)
        found = (order[i] for i in range(end - 1, -1, -1) if wanted(self._models[order[i][1]]))
        entries = list(islice(found, (page - 1) * size if page else 0, (max(page, 1) * size) + 2))
        if self._skip and sort == "Newest" and last is not None and number % 5 == 1:
            skipped = next((entry for entry in entries if entry != last), None)
            entries = [entry for entry in entries if entry != skipped]
        more, entries = len(entries) > size, entries[:size]
        broken = [self.broken_models[model_id] for _, model_id in entries if model_id in self.broken_models]
        if broken:
            self._record.count("broken-page")
            return json_response({"error": "Server error"}, broken[0])
        items = [self._model(self._models[model_id], "primaryFileOnly" in args) for _, model_id in entries]
        return json_response(self._page(request, items, _cursor(number + 1, entries[-1]) if more else None))

    def _page(self, request: Request, items: list[dict[str, Any]], cursor: str | None) -> dict[str, Any]:
        metadata = {}
        if cursor is not None:
            query = [pair for pair in request.args.items(multi=True) if pair[0] not in ("cursor", "page")]
            url = f"{self._api_server.url}{request.path}?{urlencode([*query, ('cursor', cursor)])}"
            metadata = {"nextCursor": cursor, "nextPage": url}
        return {"items": items, "metadata": metadata}

    def _order(self, sort: str) -> list[tuple[str, int]]:
        """All models, the first of the listing last, each by a key that other models do not change."""
        if sort not in self._orders:
            models = self._models.values()
            self._orders[sort] = sorted(
                (_published(m) if sort == "Newest" else _mixed(sort, m.id), m.id) for m in models
            )
        return self._orders[sort]

    def _filter(self, args: Any) -> Callable[[SimModel], bool]:
        types, bases = set(args.getlist("types")), set(args.getlist("baseModels"))
        query, tag, username = args.get("query", "").lower(), args.get("tag"), args.get("username")
        nsfw, days, since = args.get("nsfw", "false").lower() == "true", PERIODS[args.get("period", "AllTime")], ""
        if days and self._models:
            newest = datetime.fromisoformat(self._order("Newest")[-1][0])
            since = (newest - timedelta(days=days)).isoformat()

        def wanted(model: SimModel) -> bool:
            return (
                (nsfw or not model.nsfw)
                and (not types or model.type in types)
                and (not bases or any(version.base_model in bases for version in model.versions))
                and query in model.name.lower()
                and (tag is None or tag in model.tags)
                and (username is None or username == model.creator)
                and (not since or _published(model) >= since)
            )

        return wanted

    def _model(self, model: SimModel, primary_only: bool = False) -> dict[str, Any]:
        creator = {"creator": {"username": model.creator, "image": None}} if model.creator is not None else {}
        return {
            "id": model.id,
            "name": model.name,
            "description": model.description,
            "type": model.type,
            "nsfw": model.nsfw,
            "nsfwLevel": model.nsfw_level,
            "poi": model.poi,
            "minor": model.minor,
            "mode": model.mode,
            "allowCommercialUse": model.allow_commercial_use,
            **creator,
            "tags": model.tags,
            "modelVersions": [self._version(model, version, primary_only) for version in model.versions],
        }

    def _version(self, model: SimModel, version: SimVersion, primary_only: bool = False) -> dict[str, Any]:
        files = [] if model.mode else [file for file in version.files if file.primary or not primary_only]
        images = [] if model.mode == "TakenDown" else version.images
        return {
            "id": version.id,
            "name": version.name,
            "baseModel": version.base_model,
            "publishedAt": version.published_at,
            "trainedWords": version.trained_words,
            **self._early_access(version),
            "files": [self._file(version, file) for file in files],
            "images": [
                {
                    "url": image.get("url"),
                    "nsfwLevel": NSFW_LEVELS[image.get("nsfwLevel", "None")],
                    "width": image.get("width"),
                    "height": image.get("height"),
                    "type": "image",
                }
                for image in images
            ],
            "downloadUrl": f"{self._api_server.url}/api/download/models/{version.id}",
        }

    @staticmethod
    def _early_access(version: SimVersion) -> dict[str, Any]:
        if version.early_access_until is None or version.names_the_date == "deadline":
            return {}
        return {"availability": "EarlyAccess", version.names_the_date: version.early_access_until}

    def _whole_version(self, version_id: int) -> dict[str, Any]:
        model, version = self._versions[version_id]
        about = {"name": model.name, "type": model.type, "nsfw": model.nsfw, "poi": model.poi, "mode": model.mode}
        return self._version(model, version) | {"modelId": model.id, "model": about}

    def _file(self, version: SimVersion, file: SimFile) -> dict[str, Any]:
        is_pickle = file.fault is Fault.pickle
        return {
            "id": file.id,
            "name": re.sub(r"\.safetensors$", ".ckpt", file.name) if is_pickle else file.name,
            "type": file.type,
            "sizeKB": size_of(served(file)) / 1024,
            "primary": file.primary,
            "metadata": {"format": "PickleTensor" if is_pickle else file.format, "size": "pruned", "fp": "fp16"},
            "pickleScanResult": file.scan,
            "virusScanResult": file.scan,
            "hashes": hashes(file),
            "downloadUrl": f"{self._api_server.url}/api/download/models/{version.id}?fileId={file.id}",
        }

    def _tensor_metadata(self, file_id: int) -> Response:
        """As civitai's src/pages/api/v1/model-files/[id]/tensor-metadata.ts answers: no __metadata__, no offsets."""
        file = self._files.get(file_id)
        if file is None:
            return json_response({"error": "File not found"}, 404)
        if file.format != "SafeTensor" or file.fault is Fault.pickle:
            return json_response({"error": "File format is not supported"}, 400)
        data = bytes_of(file.content)
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except ValueError as error:
            return json_response({"error": str(error)}, 422)
        tensors = [
            {"name": name, "shape": one["shape"], "dtype": one["dtype"],
             "sizeBytes": one["data_offsets"][1] - one["data_offsets"][0]}
            for name, one in header.items() if name != "__metadata__"
        ]  # fmt: skip
        total = sum(one["sizeBytes"] for one in tensors)
        answer = {"format": "SafeTensor", "tensorCount": len(tensors), "totalTensorBytes": total, "tensors": tensors}
        return json_response(answer | {"dtypeCounts": [], "weightPrecision": None, "vramEstimate": None})

    def _by_hash(self, request: Request, hashed: str | None = None) -> Response:
        if self._hash_index is None:
            self._hash_index = {
                value.upper(): version.id
                for model, version in self._versions.values()
                for file in (version.files if not model.mode else [])
                for value in hashes(file).values()
            }
        if hashed is not None:
            version_id = self._hash_index.get(hashed.upper())
            if version_id is None:
                return json_response({"error": "Model not found"}, 404)
            return json_response(self._whole_version(version_id))
        asked = request.get_json(silent=True, force=True)
        if not isinstance(asked, list) or len(asked) > 100 or not all(isinstance(value, str) for value in asked):
            return json_response({"error": "A list of at most 100 hashes is expected"}, 400)
        found = {self._hash_index.get(value.upper()): None for value in asked}
        return json_response([self._whole_version(version_id) for version_id in found if version_id is not None])

    def _list_images(self, request: Request) -> Response:
        args = request.args
        limit, nsfw = _number(args.get("limit", "100")), args.get("nsfw", "true")
        highest = {"true": 8, "false": 1}.get(nsfw.lower(), NSFW_LEVELS.get(nsfw, 0))
        try:
            _, (_, start) = _open_cursor(args["cursor"]) if "cursor" in args else (0, ("", 0))
        except ValueError:
            return json_response({"error": "Invalid cursor"}, 400)
        if not 1 <= limit <= 200 or not highest:
            return json_response({"error": "Invalid limit or nsfw"}, 400)
        if "modelVersionId" in args:
            only = self._versions.get(_number(args["modelVersionId"]))
            versions = [only] if only else []
        else:
            versions = list(self._versions.values())
        images = [
            (version, image)
            for model, version in versions
            if model.mode != "TakenDown"
            for image in version.images
            if NSFW_LEVELS[image.get("nsfwLevel", "None")] <= highest
        ]
        with_meta = args.get("withMeta") == "true"
        items = [
            {"id": 0, "nsfwLevel": "None"}
            | image
            | {"meta": image.get("meta") if with_meta else None, "modelVersionIds": [version.id]}
            for version, image in images[start : start + limit]
        ]
        more = start + limit < len(images)
        return json_response(self._page(request, items, _cursor(0, ("", start + limit)) if more else None))

    # Downloads

    def _download(self, request: Request, version_id: str) -> Response:
        if request.method == "HEAD":
            return Response("", 401)
        if self.token is not None and request.headers.get("Authorization") is None:
            query = urlencode({"returnUrl": request.path, "reason": "download-auth"})
            return Response("", 307, {"Location": f"{self._api_server.url}/login?{query}"})
        model, version = self._versions.get(_number(version_id), (None, None))
        files = version.files if version and model and not model.mode else []
        wanted = _number(request.args["fileId"]) if "fileId" in request.args else None
        file = next((file for file in files if (file.primary if wanted is None else file.id == wanted)), None)
        until = version.early_access_until if version else None
        if version and until and datetime.fromisoformat(until) > datetime.now(UTC):
            self._record.count("early")
            named = {"deadline": until} if version.names_the_date == "deadline" else {}
            return json_response({"error": "Unauthorized", "message": "Early Access", **named}, 401)
        if file is None or file.fault is Fault.not_found:
            return json_response({"error": "File not found"}, 404)
        if file.fault is Fault.server_error:
            return json_response({"error": "Internal server error"}, 500)
        return Response("", 307, {"Location": self._presigned(file)})

    def _presigned(self, file: SimFile) -> str:
        nonce, until = secrets.token_hex(8), str(int((time.time() + self.link_seconds) * 1000))
        query = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Expires": until,
            "X-Amz-Signature": self._sign(str(file.id), until, nonce),
        }
        return f"{self._store_server.url}/store/{file.id}?{urlencode(query)}"

    def _sign(self, key: str, until: str, nonce: str) -> str:
        return nonce + hmac.digest(self._secret, f"{key} {until} {nonce}".encode(), "sha256").hex()[:48]

    def _store(self, request: Request) -> Response:
        self._record.see(request)
        self._record.count("store")
        if self.latency:
            time.sleep(self.latency)
        if "Authorization" in request.headers:
            self._record.count("store-with-authorization")
            return Response("<Error><Code>InvalidArgument</Code></Error>", 400, content_type="application/xml")
        key, signature = request.path.removeprefix("/store/"), request.args.get("X-Amz-Signature", "")
        until = request.args.get("X-Amz-Expires", "")
        file = self._files.get(_number(key))
        if (
            request.method != "GET"
            or signature != self._sign(key, until, signature[:16])
            or _number(until) < time.time() * 1000
            or self._broken_links.get(_number(key)) == signature
        ):
            self._record.count("store-403")
            return Response("<Error><Code>AccessDenied</Code></Error>", 403, content_type="application/xml")
        if file is None:
            return Response("<Error><Code>NoSuchKey</Code></Error>", 404, content_type="application/xml")
        if file.fault is Fault.html:
            return Response("<!DOCTYPE html><html><title>Come back later</title></html>", content_type="text/html")
        response = self._store_file(request, file, signature)
        self._record.count(f"store-{response.status_code}")
        return response

    def _store_file(self, request: Request, file: SimFile, signature: str) -> Response:
        content = served(file)
        if file.fault in GZIPPED:
            content = gzip.compress(bytes_of(content), mtime=0)
        size = TEN_GIGABYTES if file.fault is Fault.too_big else size_of(content)
        asked = asked_range(request.headers.get("Range"), size)
        stop_after = None
        is_download = asked is None or asked == (0, size)
        if file.fault in (*DROPS, Fault.corrupt_once) and is_download and self._is_first(file.id):
            if file.fault is Fault.corrupt_once:
                data = bytes_of(content)
                content = data[:-1] + bytes([data[-1] ^ 1])
            else:
                stop_after = size // 2
            if file.fault is Fault.link_expires:
                self._broken_links[file.id] = signature
        headers = {
            "ETag": f'"{hashlib.md5(f"{file.id} {size}".encode()).hexdigest()}"',
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name)}",
        }
        if file.fault in GZIPPED:
            headers["Content-Encoding"] = "gzip"
        ignore_range = file.fault in (Fault.ignores_range, Fault.gzipped)
        return file_response(request, content, headers, size=size, ignore_range=ignore_range, stop_after=stop_after)

    def _is_first(self, file_id: int) -> bool:
        with self._lock:
            first = file_id not in self._begun
            self._begun.add(file_id)
        return first


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1


def _published(model: SimModel) -> str:
    return max((version.published_at for version in model.versions), default="")


def _mixed(sort: str, model_id: int) -> str:
    return f"{zlib.crc32(f'{sort}{model_id}'.encode()):010d}"


def _cursor(number: int, last: tuple[str, int]) -> str:
    return base64.urlsafe_b64encode(json.dumps([number, *last]).encode()).decode()


def _open_cursor(cursor: str) -> tuple[int, tuple[str, int]]:
    number, key, model_id = json.loads(base64.urlsafe_b64decode(cursor))
    return number, (key, model_id)


NAMES = (
    "Watercolor Dreams", "水彩の夢", "Élodie's Ink", "Старый фильм", "Neon Noir ✨", "Pixel Sprites", "少女插画风格",
    "Ghibli-ish Backgrounds", "Jane D. style", "Retro Anime [90s]", "Detail Tweaker <b>XL</b>", "Żółta Łódź",
)  # fmt: skip
CREATORS = ("artlover", "Kōhai", "lora_factory", "jane-doe", "x0", "моделист", None)
TAGS = ("style", "character", "anime", "photorealistic", "concept", "watercolor", "celebrity", "woman", "背景")
BASES = ("SD 1.5", "SDXL 1.0", "Flux.1 D", "Pony")
DESCRIPTIONS = (
    None,
    "",
    "<p>Trained on 23 images</p>",
    "<p>Trained on <strong>1,204 pictures</strong> of my own paintings.<br>Weight 0.6 &ndash; 0.8</p>",
    '<h2>Usage</h2><ul><li>trigger: <code>sks style</code></li></ul><script>alert("x")</script>',
    "<p>dataset: 57 images, 10 epochs &amp; 3 repeats</p>",
)
WORDS = ("sks style", "<lora:sks_style:0.8>", "wtrclr, soft light", "1girl", "jane doe", "<lora:other:1> 水彩", " ")
PROMPT = {
    "prompt": "sks style, a boat on a lake <lora:sks_style:0.8>",
    "negativePrompt": "blurry",
    "seed": 1234567890123,
    "steps": 25,
    "civitaiResources": [{"type": "lora", "weight": 0.8, "modelVersionId": 0}],
}


def make_models(count: int, seed: int = 0, files: bool = True) -> list[SimModel]:
    """``count`` varied models, newest first: ids from ``count`` down to 1, and published times descending with them.

    All are LORA, LoCon or DoRA. With ``files`` each file is another LoRA, and every 20th model (id % 20 == 0) has its
    training pictures as a file of type "Training Data"; without, all files share one content.
    """
    shared = tiny_lora(seed)
    return [_make_model(model_id, seed, None if files else shared) for model_id in range(count, 0, -1)]


def _make_model(model_id: int, seed: int, shared: bytes | None) -> SimModel:
    choose = random.Random(seed * 1_000_003 + model_id)
    name, base = f"{choose.choice(NAMES)} {model_id}", choose.choice(BASES)
    versions = []
    first = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=10 * model_id)
    for number in range(choose.choice((1, 1, 2, 3)), 0, -1):
        version_id = 100_000 + 10 * model_id + number
        content = tiny_lora(seed * 1_000_003 + version_id) if shared is None else shared
        file = SimFile(version_id * 10, f"{name} v{number}.safetensors".replace("<b>", "").replace("</b>", ""), content)
        version = SimVersion(
            id=version_id,
            name=f"v{number}.0",
            base_model=base,
            trained_words=choose.choices(WORDS, k=choose.randrange(4)),
            files=[file],
            images=[_make_image(version_id * 10 + i, version_id, choose) for i in range(choose.randrange(4))],
            published_at=(first + timedelta(minutes=2 * number)).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        )
        versions.append(version)
    if shared is None and model_id % 20 == 0:
        pictures = {f"img/10_sks/{i}.txt": f"sks style, picture {i}".encode() for i in range(3)}
        data_file = SimFile(versions[0].id * 10 + 1, f"{model_id}_training_data.zip", _zip(pictures), "Training Data")
        data_file.primary, data_file.format = False, "Other"
        versions[0].files.append(data_file)
    nsfw = choose.random() < 0.1
    return SimModel(
        id=model_id,
        name=name,
        type=choose.choices(("LORA", "LoCon", "DoRA"), (85, 10, 5))[0],
        creator=choose.choice(CREATORS),
        tags=choose.sample(TAGS, k=choose.randrange(4)),
        nsfw=nsfw,
        nsfw_level=28 if nsfw else 1,
        poi=choose.random() < 0.05,
        minor=choose.random() < 0.02,
        allow_commercial_use=choose.choice(([], ["Image"], ["Image", "RentCivit", "Rent", "Sell"])),
        description=choose.choice(DESCRIPTIONS),
        versions=versions,
    )


def _make_image(image_id: int, version_id: int, choose: random.Random) -> dict[str, Any]:
    prompt = PROMPT | {"civitaiResources": [{"type": "lora", "weight": 0.8, "modelVersionId": version_id}]}
    free_form = {"parameters": "sks style, a boat\nNegative prompt: blurry\nSteps: 25", "workflow": "{}"}
    return {
        "id": image_id,
        "url": f"https://image.civitai.example/{image_id}.jpeg",
        "width": choose.choice((512, 832, 1024)),
        "height": choose.choice((512, 768, 1216)),
        "nsfwLevel": choose.choice(("None", "None", "None", "Soft", "Mature", "X")),
        "meta": choose.choice((None, prompt, {"id": image_id, "meta": prompt}, free_form)),
    }
