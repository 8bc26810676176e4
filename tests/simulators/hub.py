"""A local Hugging Face Hub that speaks what huggingface_hub's snapshot_download asks for, over HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response


class Hub:
    """Serves folders as model repositories at a commit; everything else is 404 with the hub's error header."""

    def __init__(self, server: HTTPServer) -> None:
        self.url = server.url_for("")
        self._repos: dict[tuple[str, str], Path] = {}
        self.requests: list[str] = []
        server.expect_request(re.compile("^/.*")).respond_with_handler(self._answer)

    def add(self, name: str, commit: str, folder: Path) -> None:
        """Publish ``folder`` as ``name`` at ``commit``."""
        self._repos[name, commit] = folder

    def _answer(self, request: Request) -> Response:
        self.requests.append(request.path)
        for (name, commit), folder in self._repos.items():
            if request.path in (f"/api/models/{name}/revision/{commit}", f"/api/models/{name}"):
                return self._json(
                    {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in self._files(folder)]}
                )
            if request.path.startswith((f"/api/models/{name}/tree/{commit}",)):
                rows = [self._row(folder, file) for file in self._files(folder)]
                return self._json(rows)
            prefix = f"/{name}/resolve/{commit}/"
            if request.path.startswith(prefix):
                file = request.path.removeprefix(prefix)
                if file in self._files(folder):
                    return self._file(folder / file, commit)
        return Response("{}", 404, {"X-Error-Code": "RepoNotFound"}, content_type="application/json")

    @staticmethod
    def _files(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    @staticmethod
    def _row(folder: Path, file: str) -> dict[str, object]:
        digest = hashlib.sha1((folder / file).read_bytes()).hexdigest()
        return {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": digest}

    @staticmethod
    def _json(value: object) -> Response:
        return Response(json.dumps(value), content_type="application/json")

    @staticmethod
    def _file(path: Path, commit: str) -> Response:
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return Response(data, headers=headers, content_type="application/octet-stream")
