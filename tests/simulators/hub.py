"""A local Hugging Face Hub that speaks what the real huggingface_hub client asks for, over HTTP on loopback."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests.simulators.civitai import (
    Limits,
    LocalServer,
    Record,
    bytes_of,
    file_response,
    json_response,
    size_of,
)

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".zip")
FULL = ("author", "sha", "lastModified", "gated", "disabled", "siblings")
DEFAULT = ("private", "downloads", "likes", "tags", "pipeline_tag", "library_name", "createdAt")
BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class _Snapshot:
    """A repository at a commit."""

    name: str
    commit: str
    files: dict[str, bytes | Path]
    last_modified: str = "2026-01-01T00:00:00.000Z"
    tags: list[str] = field(default_factory=list)
    card: dict[str, Any] | None = None
    gated: bool | str = False
    private: bool = False
    token_users: Collection[str] | None = None
    security: dict[str, str] | None = None
    hashes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def ids(self, file: str) -> tuple[str, str]:
        """The git object id and the SHA256 of a file."""
        if file not in self.hashes:
            data = bytes_of(self.files[file])
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.hashes[file] = oid, hashlib.sha256(data).hexdigest()
        return self.hashes[file]

    @property
    def author(self) -> str | None:
        return self.name.split("/")[0] if "/" in self.name else None


class Hub:
    """Serves folders and files as model repositories at a commit; everything else is 404 with the hub's error header.

    ``Hub(server)`` answers on a pytest-httpserver; ``Hub.serve()`` on servers of its own, where weights are a redirect
    to a second one, the CDN. ``broken`` names a model and a status by order of the listing: its page is answered with
    that. ``counts`` has one entry for each kind of request, ``requests`` the last 200 paths.
    """

    def __init__(self, server: HTTPServer | None = None) -> None:
        self.token: str | None = None
        self._record = Record(kept=200)
        self.counts, self.seen = self._record.counts, self._record.requests
        self._limits = Limits(0, 0, 0)
        self._page_size = 1000
        self.broken: dict[str, tuple[str, int]] = {}
        self._secret = secrets.token_bytes(16)
        self._user_tokens: set[str] = set()
        self._repos: dict[str, dict[str, _Snapshot]] = {}
        self._cdn: LocalServer | None = None
        if server is not None:
            self.url = server.url_for("")
            server.expect_request(re.compile("^/.*")).respond_with_handler(self._answer)

    @classmethod
    @contextmanager
    def serve(
        cls,
        *,
        token: str | None = None,
        page_size: int = 1000,
        burst_429_every: int = 0,
        burst_length: int = 1,
        error_500_every: int = 0,
    ) -> Iterator[Hub]:
        """A hub on two ports of its own. With ``token`` another token is 401; without, every token is right."""
        hub = cls()
        hub.token, hub._page_size = token, page_size
        hub._limits = Limits(burst_429_every, burst_length, error_500_every)
        server, hub._cdn = LocalServer(hub._answer), LocalServer(hub._answer_cdn)
        hub.url = server.url
        try:
            yield hub
        finally:
            server.close()
            hub._cdn.close()

    @property
    def requests(self) -> list[str]:
        """The paths of the last requests, without their queries."""
        return [seen.path.split("?")[0] for seen in self.seen]

    def add(self, name: str, commit: str, folder: Path) -> None:
        """Publish ``folder`` as ``name`` at ``commit``."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self._publish(_Snapshot(name, commit, dict(files)))

    def publish(
        self,
        name: str,
        commit: str,
        files: dict[str, bytes],
        *,
        last_modified: str = "2026-01-01T00:00:00.000Z",
        tags: Collection[str] = (),
        card: dict[str, Any] | None = None,
        gated: bool | str = False,
        private: bool = False,
        token_users: Collection[str] | None = None,
        security: dict[str, str] | None = None,
    ) -> None:
        """Publish ``files`` as ``name`` at ``commit``, which becomes its newest; earlier commits stay.

        ``card`` is the front matter: README.md is made of it where ``files`` has none. ``token_users`` are the tokens
        that may read it where it is gated or private; None means every right token. ``security`` is the status of
        files; of others it is "safe", and None means that nothing is scanned yet.
        """
        text = "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in (card or {}).items()) + "---\n"
        all_files = {"README.md": text.encode(), **files} if card is not None else files
        self._publish(
            _Snapshot(
                name,
                commit,
                dict(sorted(all_files.items())),
                last_modified,
                list(tags),
                card,
                "auto" if gated is True else gated,
                private,
                token_users,
                security,
            )
        )

    def remove(self, name: str) -> None:
        """Delete a repository."""
        self._repos.pop(name, None)

    def _publish(self, snapshot: _Snapshot) -> None:
        self._user_tokens.update(snapshot.token_users or ())
        commits = self._repos.get(snapshot.name, {})
        commits.pop(snapshot.commit, None)
        self._repos[snapshot.name] = commits | {snapshot.commit: snapshot}

    # The hub

    def _answer(self, request: Request) -> Response:
        self._record.see(request)
        bearer = request.headers.get("Authorization")
        if (
            bearer is not None
            and self.token is not None
            and bearer.removeprefix("Bearer ") not in (self.token, *self._user_tokens)
        ):
            self._record.count("unauthorized")
            return _error(401, BAD_TOKEN)
        if refused := self._limits.refuse():
            self._record.count(str(refused))
            headers = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
            return _error(refused, "Refused", headers=headers | {"Retry-After": "1"} if refused == 429 else {})
        if request.path == "/api/models":
            self._record.count("models")
            return self._list(request)
        path = request.path.replace("/api/datasets/", "/api/models/datasets/")  # as their files' URLs begin
        match = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if match:
            name, kind, revision, path = match.groups()
            snapshot = self._snapshot(request, name, revision)
            if isinstance(snapshot, Response):
                return snapshot
            self._record.count({"tree": "tree", "paths-info": "paths-info"}.get(kind, "model"))
            if kind == "tree":
                return self._tree(request, snapshot, path or "")
            if kind == "paths-info":
                rows = self._rows(snapshot, request.form.get("expand", "").lower() == "true")
                return json_response([row for row in rows if row["path"] in request.form.getlist("paths")])
            return json_response(self._info(snapshot, request))
        match = re.fullmatch(r"/(.+?)/(?:resolve|raw)/([^/]+)/(.+)", request.path)
        if match:
            name, revision, file = match.groups()
            snapshot = self._snapshot(request, name, revision)
            if isinstance(snapshot, Response):
                return snapshot
            self._record.count("resolve")
            return self._resolve(request, snapshot, file)
        return _error(404, "Repository not found", "RepoNotFound")

    @staticmethod
    def _may_read(request: Request, snapshot: _Snapshot) -> bool:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return bool(token) and (snapshot.token_users is None or token in snapshot.token_users)

    def _snapshot(self, request: Request, name: str, revision: str | None) -> _Snapshot | Response:
        commits = self._repos.get(name)
        newest = list(commits.values())[-1] if commits else None
        if commits is None or newest is None:
            return _error(404, "Repository not found", "RepoNotFound")
        if newest.private and not self._may_read(request, newest):
            status = 404 if "Authorization" in request.headers else 401
            return _error(status, "Repository not found", "RepoNotFound")
        snapshot = newest if revision in (None, "main") else commits.get(revision or "")
        return snapshot or _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _list(self, request: Request) -> Response:
        args = request.args
        tags, author, search = args.getlist("filter"), args.get("author"), args.get("search", "").lower()
        gated = args.get("gated")
        sort = args.get("sort", "trendingScore")
        found = []
        for name, commits in list(self._repos.items()):
            snapshot = list(commits.values())[-1]
            if (
                set(tags) <= set(snapshot.tags)
                and author in (None, snapshot.author)
                and search in name.lower()
                and (gated is None or (gated.lower() == "true") == bool(snapshot.gated))
                and (not snapshot.private or self._may_read(request, snapshot))
            ):
                key = snapshot.last_modified if sort == "lastModified" else f"{_downloads(name):06d}"
                found.append((key, name, snapshot))
        found.sort(key=lambda entry: entry[:2], reverse=True)
        try:
            size = min(int(args.get("limit", self._page_size)), self._page_size)
            last = tuple(json.loads(base64.urlsafe_b64decode(args["cursor"]))) if "cursor" in args else None
        except ValueError:
            return _error(400, "Invalid limit or cursor")
        if last is not None:
            found = [entry for entry in found if entry[:2] < last]
        page = found[:size]
        broken, status = self.broken.get(sort, (None, 0))
        if broken in [name for _, name, _ in page]:
            self._record.count("broken-page")
            return _error(status, "Internal Error")
        headers = {}
        if len(found) > size:
            cursor = base64.urlsafe_b64encode(json.dumps(page[-1][:2]).encode()).decode()
            query = [pair for pair in args.items(multi=True) if pair[0] != "cursor"] + [("cursor", cursor)]
            headers["Link"] = f'<{self.url.rstrip("/")}/api/models?{urlencode(query)}>; rel="next"'
        return json_response([self._item(snapshot, request) for _, _, snapshot in page], headers=headers)

    def _item(self, snapshot: _Snapshot, request: Request) -> dict[str, Any]:
        """An entry of the listing: with ``expand`` the id and what is asked for, else the usual."""
        args = request.args
        names = [*args.getlist("expand"), *args.getlist("expand[]")]
        if not names:
            names = [*DEFAULT, *(FULL if args.get("full", "").lower() == "true" else ())]
            names += ["cardData"] if args.get("cardData", "").lower() == "true" else []
        properties = self._properties(snapshot)
        return {"_id": hashlib.sha1(snapshot.name.encode()).hexdigest()[:24], "id": snapshot.name} | {
            name: properties[name] for name in names if name in properties
        }

    def _info(self, snapshot: _Snapshot, request: Request) -> dict[str, Any]:
        """Everything about one repository, or what ``expand`` asks for."""
        if "expand" in request.args or "expand[]" in request.args:
            return self._item(snapshot, request)
        info = {"id": snapshot.name, "modelId": snapshot.name} | self._properties(snapshot)
        if request.args.get("blobs", "").lower() == "true":
            info["siblings"] = [
                {"rfilename": row["path"], "size": row["size"], "blobId": row["oid"]}
                | ({"lfs": row["lfs"] | {"sha256": row["lfs"]["oid"]}} if "lfs" in row else {})
                for row in self._rows(snapshot)
            ]
        if request.args.get("securityStatus", "").lower() == "true":
            issues = [
                {"path": path, "level": level} for path, level in (snapshot.security or {}).items() if level != "safe"
            ]
            info["securityRepoStatus"] = {"scansDone": snapshot.security is not None, "filesWithIssues": issues}
        return info

    @staticmethod
    def _properties(snapshot: _Snapshot) -> dict[str, Any]:
        return {
            "author": snapshot.author,
            "sha": snapshot.commit,
            "lastModified": snapshot.last_modified,
            "createdAt": "2024-01-01T00:00:00.000Z",
            "private": snapshot.private,
            "gated": snapshot.gated,
            "disabled": False,
            "tags": snapshot.tags,
            "cardData": snapshot.card or {},
            "siblings": [{"rfilename": file} for file in snapshot.files],
            "downloads": _downloads(snapshot.name),
            "likes": _downloads(snapshot.name) // 10,
            "pipeline_tag": "text-to-image",
            "library_name": "diffusers",
        }

    @staticmethod
    def _rows(snapshot: _Snapshot, expand: bool = False) -> list[dict[str, Any]]:
        """The files of a tree or paths-info answer."""
        rows: list[dict[str, Any]] = []
        for file, content in snapshot.files.items():
            oid, sha256 = snapshot.ids(file)
            row: dict[str, Any] = {"type": "file", "path": file, "size": size_of(content), "oid": oid}
            if file.endswith(LFS_SUFFIXES):
                row["lfs"] = {"oid": sha256, "size": row["size"], "pointerSize": 134}
            if expand:
                row["lastCommit"] = {"id": snapshot.commit, "title": "Upload", "date": snapshot.last_modified}
                if snapshot.security is not None:
                    status = snapshot.security.get(file, "safe")
                    row["securityFileStatus"] = {"status": status, "avScan": None, "pickleImportScan": None}
            rows.append(row)
        return rows

    def _tree(self, request: Request, snapshot: _Snapshot, folder: str) -> Response:
        rows = self._rows(snapshot, request.args.get("expand", "").lower() == "true")
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        rows = [row for row in rows if row["path"].startswith(prefix)]
        if prefix and not rows:
            return _error(404, f"{folder} does not exist", "EntryNotFound")
        if request.args.get("recursive", "").lower() != "true":
            inside = [row["path"].removeprefix(prefix) for row in rows]
            folders = dict.fromkeys(prefix + path.split("/")[0] for path in inside if "/" in path)
            rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
            rows += [
                {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
                for path in folders
            ]
        return json_response(rows)

    def _resolve(self, request: Request, snapshot: _Snapshot, file: str) -> Response:
        commit = {"X-Repo-Commit": snapshot.commit}
        if snapshot.gated and not self._may_read(request, snapshot):
            self._record.count("gated")
            status = 403 if "Authorization" in request.headers else 401
            return _error(status, f"Access to model {snapshot.name} is restricted.", "GatedRepo", commit)
        if file not in snapshot.files:
            return _error(404, "Entry not found", "EntryNotFound", commit)
        content = snapshot.files[file]
        oid, sha256 = snapshot.ids(file)
        if not file.endswith(LFS_SUFFIXES):
            return file_response(request, content, commit | {"ETag": f'"{oid}"'})
        if self._cdn is None or "/raw/" in request.path:
            return file_response(request, content, commit | {"ETag": f'"{sha256}"'})
        path = f"/cdn/{snapshot.name}/-/{snapshot.commit}/{file}"
        linked = {"X-Linked-Size": str(size_of(content)), "X-Linked-Etag": f'"{sha256}"'}
        location = f"{self._cdn.url}{quote(path)}?X-Amz-Signature={self._sign(path)}"
        return Response("", 302, commit | linked | {"Location": location})

    # The CDN

    def _sign(self, path: str) -> str:
        return hmac.digest(self._secret, path.encode(), "sha256").hex()

    def _answer_cdn(self, request: Request) -> Response:
        self._record.see(request)
        self._record.count("cdn")
        if "Authorization" in request.headers:
            self._record.count("cdn-with-authorization")
            return Response("<Error><Code>InvalidArgument</Code></Error>", 400, content_type="application/xml")
        match = re.fullmatch(r"/cdn/(.+?)/-/([^/]+)/(.+)", request.path)
        if not match or request.args.get("X-Amz-Signature") != self._sign(request.path):
            return Response("<Error><Code>AccessDenied</Code></Error>", 403, content_type="application/xml")
        name, commit, file = match.groups()
        snapshot = self._repos.get(name, {}).get(commit)
        if snapshot is None:
            return Response("<Error><Code>NoSuchKey</Code></Error>", 404, content_type="application/xml")
        return file_response(request, snapshot.files[file], {"ETag": f'"{snapshot.ids(file)[1]}"'})


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
    return json_response({"error": message}, status, headers)


def _downloads(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest()[:4], 16)
