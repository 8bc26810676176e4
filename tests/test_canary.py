"""Secrets that are set show nowhere: not in outputs, logs, tables, pages, metrics, arguments of processes or crashes.

Every command of the command line is run as it works and as it fails, in this process, with a secret of its own kind in
every place that lora-audit or a library beneath it reads one from. Then everything that came out is searched.
"""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import duckdb
import prometheus_client
import pytest
import typer.main
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)
from moto.server import ThreadedMotoServer
from werkzeug import Request, Response

from audit import metrics
from audit.cli import app, main
from audit.demo import set_folder
from audit.files import Files
from audit.locations import without_credentials
from audit.schemas import TABLES
from audit.workspace import Workspace
from crawlers import http
from crawlers.store import Store
from tests.conftest import BASE, KOHYA
from tests.public import STUDY
from tests.simulators.civitai import Civitai, Fault, LocalServer, SimFile, SimModel, SimVersion, tiny_lora
from tests.simulators.hub import Hub

DECOY = min(set_folder("fluent-animals", "control").glob("*.png"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CANARIES = {
    "HF_TOKEN": "hf_CanaryOfTheHub0123456789",
    "login": "hf_CanaryOfTheLogin0123456789",
    "CIVITAI_TOKEN": "CanaryOfCivitai0123456789",
    "token file": "CanaryOfTheTokenFile0123456789",
    "S3 key": "CANARYKEYOFTHEURL",
    "S3 secret": "CanaryOf/the+Url/0123456789",
    "AWS_SECRET_ACCESS_KEY": "CanaryOf/the+Environment0123456789",
    "AWS_SESSION_TOKEN": "CanaryOfTheSession/+0123456789==",
    "proxy": "CanaryOfTheProxy0123456789",
    "RAY_AUTH_TOKEN": "CanaryOfRay0123456789",
    "LORA_AUDIT_SIGNING_KEY_PASSWORD": "CanaryOfTheSigningKey0123456789",
    "config": "CanaryOf/the+Configuration0123456789",
}


def forms(secret: str) -> set[bytes]:
    """``secret`` as it is, quoted for URLs, and in base64 whatever stands before and behind it."""
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), quote(secret).encode(), quote_plus(secret).encode()}
    for before in range(3):  # the letters of base64 that depend on the secret alone
        text = base64.b64encode(b"\0" * before + raw)
        found.add(text[-(-8 * before // 6) : len(text) - 4])
    return found


FORMS = {name: forms(secret) for name, secret in CANARIES.items()}


def leaks(content: bytes) -> set[str]:
    """The secrets that ``content`` holds in any form."""
    return {name for name, found in FORMS.items() if any(one in content for one in found)}


@dataclass
class Scene:
    """Where commands run, what stands around them, and all that they have said."""

    folder: Path
    site: Civitai
    hub: Hub
    evil: str
    remote: str
    said: list[tuple[str, str]] = field(default_factory=list)
    seen_elsewhere: list[bytes] = field(default_factory=list)
    codes: dict[tuple[str, ...], set[int]] = field(default_factory=dict)

    @property
    def workspace(self) -> str:
        return str(self.folder / "workspace")

    def run(self, *arguments: object) -> int:
        """Run a command in this process, through the program's own ``main``; its exit code."""
        words = [str(one) for one in arguments]
        out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
        before = sys.argv
        sys.argv, code = ["lora-audit", *words], 0
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = before
        told = out.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined]
        self.said.append((" ".join(words), told + err.getvalue()))
        name = next(name for name in sorted(NAMES, key=len, reverse=True) if _is_in(name, words))
        self.codes.setdefault(name, set()).add(code)
        return code


def _is_in(name: tuple[str, ...], words: list[str]) -> bool:
    return any(tuple(words[at : at + len(name)]) == name for at in range(len(words)))


def commands(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of all commands below ``command``, groups that do something by themselves included."""
    if not hasattr(command, "commands"):
        yield name
        return
    for below, one in command.commands.items():
        yield from commands(one, (*name, below))
    if name and command.invoke_without_command:
        yield name


NAMES = sorted(commands(typer.main.get_command(app)))


def models() -> list[SimModel]:
    """Models of the site: a sound one, and one for each way in which a download can fail."""
    found = []
    faults = (Fault.none, Fault.not_found, Fault.server_error, Fault.html, Fault.truncated, Fault.disguised_pickle,
              Fault.link_expires, Fault.drops_halfway, Fault.wrong_sha256)  # fmt: skip
    for number, fault in enumerate(faults, start=1):
        content = KOHYA.read_bytes() if fault is Fault.none else tiny_lora(number)
        file = SimFile(300 + number, f"{number}.safetensors", content, fault=fault)
        version = SimVersion(200 + number, "v1", "Other", ["sks dog"], [file], [], "2026-05-01T00:00:00.000Z")
        found.append(SimModel(100 + number, f"Model {number}", creator="jane", versions=[version]))
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Secrets of every kind in force, and a site, a hub, a bucket, and a server that sends all it gets back."""
    folder = tmp_path_factory.mktemp("canary")
    bucket = ThreadedMotoServer(port=0)
    bucket.start()
    host, port = bucket.get_host_and_port()
    elsewhere: list[bytes] = []

    def echo(request: Request) -> Response:
        """What a hostile server knows, in its answer: 401, 500, or a redirect to another host."""
        asked = f"{request.method} {request.environ.get('REQUEST_URI', request.url)}"
        told = f"{asked} {sorted(request.headers.items())}"
        elsewhere.append(told.encode())
        if "redirect" in request.path:
            return Response("", 302, {"Location": f"http://localhost:{request.host.rpartition(':')[2]}/elsewhere"})
        status = next((int(code) for code in ("401", "403", "404", "500") if code in request.path), 200)
        return Response(json.dumps({"error": told}), status, {"X-Error-Message": told[:500], "X-Told": "1"})

    evil = LocalServer(echo)
    options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    credentials = f"{CANARIES['S3 key']}:{CANARIES['S3 secret']}"
    patch = pytest.MonkeyPatch()
    _set_secrets(patch, folder, evil.url, host)
    Files(f"s3://{credentials}@bucket?{options}&allow_bucket_creation=true").system.create_dir("bucket")
    patch.setattr(http.PatientRetry, "unit", 0.01)
    with Civitai(models(), token=CANARIES["CIVITAI_TOKEN"]) as site, Hub.serve(token=CANARIES["HF_TOKEN"]) as hub:
        hub.publish("me/mine", COMMIT, {"x.safetensors": tiny_lora(50)}, tags=["lora"])
        hub.publish("me/gated", COMMIT, {"y.safetensors": tiny_lora(51)}, tags=["lora"], gated="manual")
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield Scene(folder, site, hub, evil.url, f"s3://{credentials}@bucket/w?{options}", seen_elsewhere=elsewhere)
    patch.undo()
    evil.close()
    bucket.stop()


def _set_secrets(patch: pytest.MonkeyPatch, folder: Path, proxy: str, host: str) -> None:
    for name in ("HF_TOKEN", "CIVITAI_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN",
                 "LORA_AUDIT_SIGNING_KEY_PASSWORD"):  # fmt: skip
        patch.setenv(name, CANARIES[name])
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        patch.setenv(name, proxy.replace("://", f"://user:{CANARIES['proxy']}@"))
    patch.setenv("NO_PROXY", f"127.0.0.1,localhost,{host}")  # Arrow's and obstore's own, which go to the bucket
    (folder / "login").write_text(CANARIES["login"])
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "login"))
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub-cache"))
    token = folder / "token"
    token.write_text(CANARIES["token file"])
    token.chmod(0o600)
    _write_key(folder / "key.pem")
    (folder / "open-token").write_text(CANARIES["token file"])
    (folder / "open-token").chmod(0o644)
    (folder / "config.toml").write_text(f'workspace = "s3://key:{CANARIES["config"]}@bucket/c"\n')
    (folder / "bad.toml").write_text(f'workspace = "s3://key:{CANARIES["config"]}@bucket/c"\nlimit = 1\n')
    (folder / "broken.toml").write_text(f'workspace = "s3://key:{CANARIES["config"]}@bucket/c\nx = [')
    (folder / "study.toml").write_text(STUDY)
    secret = f"https://user:{CANARIES['proxy']}@example.org/x"
    (folder / "secret.toml").write_text(STUDY.replace('base = "nano"', f'base = "{secret}"'))
    (folder / "typed.toml").write_text(f'workspace = ["s3://key:{CANARIES["config"]}@bucket/c"]\n')
    (folder / "urls.txt").write_text(f"{secret}.png\n{proxy}/500.png?token={CANARIES['proxy']}\n")
    (folder / "broken.safetensors").write_bytes(b"<html>")
    (folder / "uploads").mkdir()
    (folder / "uploads/a.safetensors").write_bytes(tiny_lora(60))


def _write_key(file: Path) -> None:
    """An encrypted signing key, the same for all to read, and its public half."""
    private = Ed25519PrivateKey.generate()
    password = BestAvailableEncryption(CANARIES["LORA_AUDIT_SIGNING_KEY_PASSWORD"].encode())
    content = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password)
    file.write_bytes(content)
    file.chmod(0o600)
    file.with_name("open.pem").write_bytes(content)
    file.with_name("public.pem").write_bytes(
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )


def cases(s: Scene) -> dict[tuple[str, ...], list[list[object]]]:
    """For every command how it is run: as it works, and as it fails."""
    where: list[object] = ["--workspace", s.workspace]
    apart: list[object] = ["--workspace", s.folder / "studies"]  # one audit is what others are asked about
    gone: list[object] = ["--workspace", s.remote.replace("/w?", "/none?")]
    wrong: list[object] = ["--workspace", s.remote + "&session_token=" + CANARIES["S3 secret"]]
    ends = ["--civitai-endpoint", s.site.url, "--hub-endpoint", s.hub.url, "--rate", "0"]
    statuses = [f"{s.evil}/{kind}" for kind in ("401", "403", "404", "500", "redirect")]
    nano: list[object] = ["--base", BASE, "--descriptor", "nano"]
    secret_base = f"https://user:{CANARIES['proxy']}@example.org/x"
    return {
        ("crawl", "civitai"): [
            ["--verbose", "crawl", "civitai", "--endpoint", s.site.url, "--rate", 0, "--retries", 1, *where],
            [
                "crawl",
                "civitai",
                "--endpoint",
                s.site.url,
                "--token-file",
                s.folder / "token",
                "--restart",
                "--rate",
                0,
                "--retries",
                0,
                "--workspace",
                s.folder / "other",
            ],
            ["crawl", "civitai", "--endpoint", s.site.url, "--token-file", s.folder / "open-token", *where],
            ["crawl", "civitai", "--endpoint", s.site.url.replace("://", f"://user:{CANARIES['proxy']}@"), *where],
            [
                "crawl",
                "civitai",
                "--endpoint",
                s.site.url,
                "--rate",
                0,
                "--json",
                "--metadata-only",
                "--workspace",
                s.remote,
            ],
            *(
                [
                    "--log-format",
                    "json",
                    "crawl",
                    "civitai",
                    "--endpoint",
                    url,
                    "--rate",
                    0,
                    "--retries",
                    0,
                    "--workspace",
                    s.folder / "v",
                ]
                for url in statuses
            ),
        ],
        ("crawl", "huggingface"): [
            ["--verbose", "crawl", "huggingface", "--endpoint", s.hub.url, "--json", *where],
            *(
                ["--verbose", "crawl", "huggingface", "--endpoint", url, "--workspace", s.folder / "v"]
                for url in statuses[:3]
            ),
            ["crawl", "huggingface", "--endpoint", s.hub.url.replace("://", f"://user:{CANARIES['proxy']}@"), *where],
        ],
        ("crawl", "folder"): [
            ["--verbose", "crawl", "folder", s.folder / "uploads", "--settle", 0, *where],
            ["crawl", "folder", s.remote.replace("/w?", "/uploads?"), "--settle", 0, *where],
            ["crawl", "folder", s.remote + "&x=1", *where],
        ],
        ("catalog",): [
            ["catalog", "--json", *where],
            ["catalog", "--where", "nothing = 1", *where],
            ["catalog", *gone],
        ],
        ("catalog", "add"): [
            ["catalog", "add", "101", "--json", *ends, *where],
            ["catalog", "add", "me/gated", *ends, *where],
            ["catalog", "add", secret_base, *where],
            ["catalog", "add", "999", *ends, *where],
        ],
        ("catalog", "fetch"): [["--verbose", "catalog", "fetch", "--retry", *ends, *where]],
        ("catalog", "refresh"): [["--verbose", "catalog", "refresh", "--json", *ends, *where]],
        ("references", "add"): [
            ["references", "add", "animals", set_folder("fluent-animals", "train"), "--descriptor", "nano", *where],
            ["references", "add", "none", s.folder / "uploads", "--descriptor", "nano", *where],
            ["references", "add", "none", s.remote, "--descriptor", "nano", *where],
            ["references", "add", "urls", s.folder / "urls.txt", "--descriptor", "nano", *where],
            ["references", "add", "hub", f"hf:me/none@{COMMIT}", "--descriptor", "nano", *where],
        ],
        ("references", "list"): [["references", "list", *where], ["references", "list", *wrong]],
        ("references", "put"): [
            ["references", "put", "animals", set_folder("fluent-animals", "control"), "--descriptor", "nano", *where],
            ["references", "put", "animals", DECOY, "--descriptor", "nano", "--json", *where],
            ["references", "put", "none", s.remote, "--descriptor", "nano", *where],
        ],
        ("references", "policy"): [
            ["references", "policy", "animals", "--notes", "mine", "--json", *where],
            ["references", "policy", "none", "--role", "allow", *where],
            ["references", "policy", "animals", "--clear", *gone],
        ],
        ("references", "drop"): [
            ["references", "drop", "animals", DECOY.name, "--json", *where],
            ["references", "drop", "animals", secret_base, *where],
        ],
        ("similar",): [["similar", KOHYA, "--json", *where], ["similar", s.remote, *where], ["similar", "none", *gone]],
        ("scan",): [
            [
                "--verbose",
                "scan",
                KOHYA,
                *nano,
                "--caption",
                "sks dog",
                "--n0",
                1,
                "--images-per-training-image",
                4,
                "--steps",
                2,
                "--references",
                "animals",
                "--json",
                *where,
            ],
            ["--verbose", "scan", s.folder / "broken.safetensors", *nano, *where],
            ["--verbose", "scan", s.remote, *nano, *where],
            ["--verbose", "scan", KOHYA, "--base", f"me/none@{COMMIT}", "--descriptor", "nano", *where],
            ["--verbose", "scan", KOHYA, "--base", secret_base, "--descriptor", "nano", *where],
        ],
        ("demo",): [["demo", *wrong]],  # its flow is that of scan
        ("inspect",): [
            ["inspect", KOHYA, "--json"],
            ["inspect", s.folder / "broken.safetensors"],
            ["inspect", KOHYA, "--base", f"me/gated@{COMMIT}"],
        ],
        ("captions",): [
            ["--verbose", "captions", KOHYA, "--base", BASE, "--caption-evaluations", 400, "--json", *where],
            ["captions", s.folder / "broken.safetensors", "--base", BASE, *where],
            ["captions", KOHYA, "--base", secret_base, *where],
        ],
        ("study", "run"): [
            ["--verbose", "study", "run", s.folder / "study.toml", *apart],
            ["study", "run", s.folder / "secret.toml", *apart],
            ["study", "run", s.folder / "bad.toml", *apart],
            ["study", "run", s.remote, *apart],
            ["study", "run", s.folder / "study.toml", "--dry-run", "--workspace", s.remote],
        ],
        ("study", "resume"): [["study", "resume", "one", *apart], ["study", "resume", "none", *wrong]],
        ("study", "report"): [["study", "report", "one", "--json", *apart], ["study", "report", "none", *apart]],
        ("study", "export"): [
            ["study", "export", "one", s.folder / "long", *apart],
            ["study", "export", "one", s.remote, *apart],
        ],
        ("study", "catalog"): [["study", "catalog", "--json", *where], ["study", "catalog", *gone]],
        ("match",): [["match", "--references", "animals", *where], ["match", "--references", "none", *where]],
        ("report",): [["report", "", "--json", *where], ["report", "none", *where]],
        ("query",): [
            ["query", "SELECT * FROM checkpoints", "--format", "csv", *where],
            ["query", "SELECT nothing", *where],
            ["query", "SELECT * FROM duckdb_secrets()", *where],
            ["query", "SELECT getenv('HF_TOKEN')", *where],
            ["query", "SELECT * FROM duckdb_settings()", "--format", "jsonl", "--workspace", s.remote],
        ],
        ("run",): [
            ["run", "--config", s.folder / "config.toml", "--descriptor", "nano"],
            ["run", "--base", "sd1=" + secret_base, "--descriptor", "nano", *where],
            [
                "--verbose",
                "run",
                "--base",
                f"unknown=me/none@{COMMIT}",
                "--base",
                f"sd1=me/none@{COMMIT}",
                "--base",
                f"other=me/none@{COMMIT}",
                "--descriptor",
                "nano",
                *where,
            ],
            ["run", "--base", secret_base, *where],
        ],
        ("estimate",): [["estimate", *gone], ["estimate", "--base", secret_base, *where]],  # its sums take a minute
        ("status",): [
            ["status", "--json", *where],
            ["status", *wrong],
            ["status", "--json", "--workspace", s.remote],
            ["status", *gone],
        ],
        ("failures",): [["failures", "--json", *where]],
        ("sign",): [
            ["--verbose", "sign", "", "--signing-key", s.folder / "key.pem", "--json", *where],
            ["--verbose", "sign", "", "--signing-key", s.folder / "open.pem", *where],
            ["sign", "", "--signing-key", s.folder / "token", *where],
        ],
        ("verify",): [
            ["verify", "--json", *where],
            ["verify", "--workspace", s.remote],
            ["verify", "", "--public-key", s.folder / "public.pem", "--json", *where],
            ["verify", "", "--public-key", s.folder / "token", *where],
        ],
        ("reproduce",): [
            ["--verbose", "reproduce", "", "--checkpoint", KOHYA, "--base", BASE, *where],
            ["reproduce", "", "--checkpoint", KOHYA, "--base", secret_base, *where],
        ],
        ("compact",): [["compact", "--json", *where], ["compact", *gone]],
        ("export",): [["export", s.folder / "out", "--format", "csv", *where], ["export", s.folder / "out", *where]],
        ("migrate",): [["migrate", *where], ["migrate", *wrong]],
        ("config", "show"): [
            ["config", "show", "--json", "--config", s.folder / "config.toml"],
            ["config", "show", "--config", s.folder / "config.toml"],
            *(["config", "show", "--config", s.folder / f"{name}.toml"] for name in ("bad", "broken", "typed")),
            ["config", "show", "--set", f"workspace={s.remote}"],
            [
                "config",
                "show",
                "--json",
                "--set",
                f"run.address=ray://u:{CANARIES['proxy']}@h:1",
                "--set",
                "bases.sd1=" + secret_base,
            ],
        ],
        ("references", "remove"): [
            ["references", "remove", "animals", *where],
            ["references", "remove", "none", *where],
        ],
    }


def test_every_command_is_run(scene: Scene) -> None:
    """A new command fails here until it has its line in ``cases``."""
    assert sorted(cases(scene)) == NAMES


def test_no_secret_shows_in_anything_that_commands_say(scene: Scene) -> None:
    for runs in cases(scene).values():
        for arguments in runs:
            scene.run(*arguments)
    assert set(scene.codes) == set(NAMES)
    assert not any("unexpected" in text for _, text in scene.said), [
        line for line, text in scene.said if "unexpected" in text
    ]
    worked = {name for name, codes in scene.codes.items() if codes & {0, 1, 10, 11, 12, 13}}
    assert worked >= set(NAMES) - {("demo",), ("run",), ("estimate",)}, {
        name: scene.codes[name] for name in set(NAMES) - worked
    }
    found = {line: shown for line, text in scene.said if (shown := leaks(text.encode(errors="surrogatepass")))}
    assert not found


def test_no_secret_shows_in_a_crash(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen error with its traceback, of one item and of a whole command, also with --verbose and as JSON."""

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("nobody foresaw it")

    begun = len(scene.said)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "adopt", broken)
        for form in ("text", "json"):
            where = scene.folder / f"crash-{form}"
            crawl = (
                "crawl",
                "civitai",
                "--endpoint",
                scene.site.url,
                "--rate",
                0,
                "--retries",
                0,
                "--workspace",
                where,
            )
            assert scene.run("--verbose", "--log-format", form, *crawl) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "rows", broken)
        for form in ("text", "json"):
            for place in (scene.workspace, scene.remote):
                assert scene.run("--log-format", form, "status", "--workspace", place) == 1
    texts = [text for _, text in scene.said[begun:]]
    assert all("ZeroDivisionError" in text and "Traceback" in text for text in texts)
    assert not [leaks(text.encode()) for text in texts if leaks(text.encode())]


def test_no_secret_is_in_any_file(scene: Scene) -> None:
    """Workspaces on the disk and in the bucket, exported tables, caches: as bytes, and tables as what they hold."""
    own = {"login", "token", "open-token", "config.toml", "bad.toml", "broken.toml", "typed.toml", "secret.toml",
           "urls.txt"}  # fmt: skip
    paths = [path for path in scene.folder.rglob("*") if path.is_file() and path.name not in own]
    assert len(paths) > 30
    found = {str(path): shown for path in paths if (shown := leaks(path.read_bytes()))}
    remote = Files(scene.remote)
    entries = remote.list("", recursive=True)
    assert entries
    found |= {entry.key: shown for entry in entries if (shown := leaks(remote.read(entry.key) or b""))}
    parquet = [path for path in paths if path.suffix == ".parquet"]
    assert len(parquet) > 10
    for path in parquet:
        rows = duckdb.sql(f"SELECT COLUMNS(*)::VARCHAR FROM read_parquet('{path}')").fetchall()
        if shown := leaks(repr(rows).encode()):
            found[f"{path} decoded"] = shown
    for name in TABLES:
        for place in (scene.workspace, scene.remote):
            rows = Workspace(place, reading=True).rows(f'SELECT * FROM "{name}"')
            if shown := leaks(repr(rows).encode()):
                found[f"{name} of {place}"] = shown
    assert not found


def test_no_secret_is_among_the_metrics(scene: Scene) -> None:
    text = prometheus_client.generate_latest(metrics.REGISTRY)
    assert b"crawl" in text
    assert not leaks(text)


def test_tokens_go_to_their_own_hosts_alone(scene: Scene) -> None:
    """The site and the hub have got theirs. A server that was named as an endpoint gets the token of its kind, and no
    other host that it leads to. Nothing goes by the proxy, also no report of a library to its maker."""
    tokens = {name for told in scene.seen_elsewhere for name in leaks(told)}
    assert not [told[:200] for told in scene.seen_elsewhere if "proxy" in leaks(told)], "sent by way of the proxy"
    assert tokens <= {"CIVITAI_TOKEN", "HF_TOKEN"}
    redirected = [told for told in scene.seen_elsewhere if b"/elsewhere" in told]
    assert redirected
    assert not any(leaks(told) for told in redirected)
    assert scene.site.counts["store-with-authorization"] == 0
    assert scene.hub.counts["cdn-with-authorization"] == 0


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with suppress(OSError):
            for path in Path(f"/proc/{one}/task").glob("*/children"):
                found += map(int, path.read_text().split())
    return found


@pytest.mark.parametrize("what", ["crawl", "run"])
def test_no_secret_is_among_the_arguments_of_processes(scene: Scene, what: str) -> None:
    """Of the program and of all that it starts, as others of the machine see them, while it works."""
    where = scene.folder / "watched"
    arguments = {
        "crawl": ["crawl", "folder", str(scene.folder / "uploads"), "--settle", "0.2", "--workspace", str(where)],
        "run": ["run", "--base", f"sd1={BASE}", "--base", f"other={BASE}", "--base", f"unknown={BASE}", "--descriptor",
                "nano", "--workspace", str(where), "--set", "settings.steps=1", "--set",
                "settings.images_per_training_image=1", "--limit", "1"],
    }[what]  # fmt: skip
    command = [sys.executable, "-c", "from audit.cli import main; main()", "--verbose", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = set()
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        for pid in _descendants(process.pid):
            with suppress(OSError):
                seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=30)
    assert any(b"audit.cli" in line for line in seen)
    assert process.returncode is not None
    assert not leaks(b"\n".join(seen))
    assert not leaks(said)


def test_an_address_of_a_cluster_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from audit.engine.ray import RayOptions, connect
    from audit.errors import ConfigError

    address = f"ray://user:{CANARIES['proxy']}@127.0.0.1:1"

    def away(*arguments: object, **options: object) -> None:
        raise ConnectionError(f"{address} does not answer")  # waiting for a real one takes half a minute

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", away)
    with pytest.raises(ConfigError, match=r"no Ray cluster at ray://127\.0\.0\.1:1: ray://127") as caught:
        connect(RayOptions(address=address))
    assert not leaks(str(caught.value).encode())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at s3://key:a/b+c@bucket/w?x=1, and", "at s3://bucket/w?x=1, and"),
        ("'https://user:pass@host:80/x'", "'https://host:80/x'"),
        ("HTTP://user@host", "HTTP://host"),
        ("s3:/key:a/b+c@bucket/w is not a folder", "s3:/bucket/w is not a folder"),
        ("file:/home/me@work/x and C:/me@work", "file:/home/me@work/x and C:/work"),
        ("https://host:8080/@name/x", "https://host:8080/@name/x"),
        ("https://host/a?mail=a@b.c", "https://host/a?mail=a@b.c"),
        ("me@example.org and owner/name@0123", "me@example.org and owner/name@0123"),
        ("http://u:p/w@host/x http://v:q@h", "http://host/x http://h"),
        ("@" * 5000 + "://" + ":" * 5000, "@" * 5000 + "://" + ":" * 5000),
    ],
)
def test_urls_in_a_text_lose_their_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_the_search_finds_what_it_looks_for() -> None:
    secret = CANARIES["S3 secret"]
    for text in (secret, quote(secret, safe=""), quote_plus(secret), f"x{secret}y"):
        assert leaks(text.encode()) == {"S3 secret"}
    for around in ("", "a", "ab", "abc", "user:"):
        assert leaks(base64.b64encode(f"{around}{secret}{around}".encode())) == {"S3 secret"}, around
    assert not leaks(re.sub("C", "D", secret).encode())
