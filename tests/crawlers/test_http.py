"""The crawlers' session: retries, waits, tokens, hosts, addresses and caps, against real servers on loopback."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from audit.errors import CrawlError, FetchError
from crawlers import http
from crawlers.http import RateLimit, Session, Token, check_address, check_url, pause_asked, read_token, shown


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.PatientRetry, "unit", 0.01)


@pytest.fixture
def other() -> Iterator[HTTPServer]:
    with HTTPServer() as server:
        yield server


def session(server: HTTPServer, **options: object) -> Session:
    return Session([f"{server.host}:{server.port}"], requests_per_second=0, **options)  # type: ignore[arg-type]


def answers(server: HTTPServer, *statuses: int, **headers: str) -> list[Request]:
    seen: list[Request] = []

    def answer(request: Request) -> Response:
        seen.append(request)
        status = statuses[min(len(seen), len(statuses)) - 1]
        return Response('{"ok": true}', status, {} if status == 200 else headers, content_type="application/json")

    server.expect_request("/x").respond_with_handler(answer)
    return seen


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_errors_that_pass_are_tried_again(httpserver: HTTPServer, status: int) -> None:
    seen = answers(httpserver, status, status, 200)
    assert session(httpserver).get_json(httpserver.url_for("/x")) == {"ok": True}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("status", "state"), [(400, "failed"), (401, "failed"), (403, "failed"), (404, "gone"), (410, "gone")]
)
def test_other_errors_are_not(httpserver: HTTPServer, status: int, state: str) -> None:
    seen = answers(httpserver, status)
    with pytest.raises(FetchError, match=str(status)) as caught:
        session(httpserver).get_json(httpserver.url_for("/x"))
    assert caught.value.state == state
    assert len(seen) == 1


def test_retries_end(httpserver: HTTPServer) -> None:
    seen = answers(httpserver, 429)
    with pytest.raises(FetchError, match="fewer requests"):
        session(httpserver, retries=2).get_json(httpserver.url_for("/x"))
    assert len(seen) == 3


def test_retry_after_is_waited_for(httpserver: HTTPServer) -> None:
    answers(httpserver, 429, 200, **{"Retry-After": "1"})
    started = time.monotonic()
    session(httpserver).get_json(httpserver.url_for("/x"))
    assert time.monotonic() - started >= 1


def test_no_header_makes_us_wait_for_a_day(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    answers(httpserver, 429, 503, 200, **{"Retry-After": "86400"})
    session(httpserver).get_json(httpserver.url_for("/x"))
    assert waits == [http.MAX_WAIT, http.MAX_WAIT]


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"RateLimit": '"api";r=0;t=12'}, 12),
        ({"RateLimit": '"api";r=3;t=12'}, 0),
        ({"RateLimit": "limit=10, remaining=0, reset=7"}, 7),
        ({"RateLimit-Remaining": "0", "RateLimit-Reset": "5"}, 5),
        ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "999999"}, http.MAX_WAIT),
        ({"RateLimit": "nonsense;;r=;t=x"}, 0),
        ({}, 0),
    ],
)
def test_rate_limit_headers(headers: dict[str, str], pause: float) -> None:
    assert pause_asked(headers) == pause


def test_a_reset_can_be_a_time_of_day() -> None:
    headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + 30)}
    assert 25 < pause_asked(headers) <= 30


def test_the_rate_holds_between_requests_and_pauses_are_kept() -> None:
    limit = RateLimit(50)
    started = time.monotonic()
    for _ in range(6):
        limit.wait("a")
    assert time.monotonic() - started >= 5 / 50
    limit.note("a", {"RateLimit": '"api";r=0;t=1'})
    started = time.monotonic()
    limit.wait("b")
    assert time.monotonic() - started < 0.5
    limit.wait("a")
    assert time.monotonic() - started >= 0.9


def test_the_token_goes_to_its_host_alone(httpserver: HTTPServer, other: HTTPServer) -> None:
    headers: dict[str, str | None] = {}

    def at_home(request: Request) -> Response:
        headers["home"] = request.headers.get("Authorization")
        return Response("", 307, {"Location": other.url_for("/away")})

    def away(request: Request) -> Response:
        headers["away"] = request.headers.get("Authorization")
        return Response("{}", content_type="application/json")

    httpserver.expect_request("/x").respond_with_handler(at_home)
    other.expect_request("/away").respond_with_handler(away)
    session(httpserver, token=Token("s3cret")).get_json(httpserver.url_for("/x"))
    assert headers == {"home": "Bearer s3cret", "away": None}


def test_the_token_follows_a_redirect_to_another_host_of_the_source(httpserver: HTTPServer, other: HTTPServer) -> None:
    hosts = [urlsplit(server.url_for("/")).netloc for server in (httpserver, other)]
    httpserver.expect_request("/file").respond_with_data("", 307, {"Location": other.url_for("/there")})
    other.expect_request("/there", headers={"Authorization": "Bearer secret"}).respond_with_json({"right": True})
    assert Session(hosts, Token("secret"), 0).get_json(httpserver.url_for("/file")) == {"right": True}


def test_errors_show_neither_token_nor_query(httpserver: HTTPServer) -> None:
    answers(httpserver, 500)
    asked = session(httpserver, token=Token("s3cret"), retries=0)
    for url in (httpserver.url_for("/x") + "?X-Amz-Signature=s1gned", "http://127.0.0.1:1/x?token=s1gned"):
        with pytest.raises(FetchError) as caught:
            asked.get_json(url)
        assert "s3cret" not in str(caught.value)
        assert "s1gned" not in str(caught.value)
    assert "s3cret" not in f"{Token('s3cret')} {Token('s3cret')!r}"
    assert shown("https://user:pw@host:8/p?q=1#f") == "https://host:8/p"


def test_only_the_sources_hosts_are_asked(httpserver: HTTPServer, other: HTTPServer) -> None:
    with pytest.raises(FetchError, match="not a host of this source"):
        session(httpserver).get_json(other.url_for("/x"))


def test_answers_are_bounded_and_must_be_json(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    httpserver.expect_request("/big").respond_with_data(b"[" + b"1," * 5000 + b"1]")
    httpserver.expect_request("/html").respond_with_data(b"<html>")
    monkeypatch.setattr(http, "MAX_JSON_BYTES", 5000)
    for path, words in (("/big", "more than"), ("/html", "no JSON")):
        with pytest.raises(FetchError, match=words):
            session(httpserver).get_json(httpserver.url_for(path))


def test_a_redirect_without_end_or_to_another_scheme_is_an_error(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/loop").respond_with_data("", 307, {"Location": "/loop"})
    httpserver.expect_request("/ftp").respond_with_data("", 307, {"Location": "http://example.org/x"})
    for path, words in (("/loop", "without end"), ("/ftp", "only https")):
        with pytest.raises(FetchError, match=words):
            session(httpserver).get_json(httpserver.url_for(path))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "fd00::1", "0.0.0.0",
     "::ffff:10.0.0.1", "224.0.0.1", "100.64.0.1", "::127.0.0.1", "::10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
     "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:c0a8:1::5", "::ffff:0:10.0.0.1",
     "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::", "ff02::1"],
)  # fmt: skip
def test_private_addresses_are_refused(address: str) -> None:
    with pytest.raises(CrawlError, match="not a public address"):
        check_address(address)


def test_public_addresses_are_not() -> None:
    check_address("93.184.216.34")
    check_address("2606:2800:220:1:248:1893:25c8:1946")
    check_address("64:ff9b::5db8:d822")  # 93.184.216.34 behind NAT64
    check_address("2002:5db8:d822::1")


def test_a_name_that_leads_into_the_own_network_is_refused_before_a_byte_is_sent(httpserver: HTTPServer) -> None:
    seen = answers(httpserver, 200)
    asked = Session([f"{httpserver.host}:{httpserver.port}", "public.example"], requests_per_second=0, retries=0)
    with pytest.raises(FetchError, match="not a public address"):  # as if its DNS said 127.0.0.1
        asked.get_json(httpserver.url_for("/x"))
    assert seen == []


def test_a_name_that_changes_its_address_is_judged_by_the_connection_and_not_by_a_look_up(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, asked = answers(httpserver, 200), []
    real = socket.getaddrinfo

    def changing(host: str, port: int, *rest: Any, **options: Any) -> Any:
        if host != "rebound.example":
            return real(host, port, *rest, **options)
        asked.append(host)
        address = "93.184.216.34" if len(asked) > 1 else "127.0.0.1"  # the connection's look-up, and any other after it
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    monkeypatch.setattr(http, "check_url", lambda url: None)  # as if it were https
    host = f"rebound.example:{httpserver.port}"
    with pytest.raises(FetchError, match=r"refused to talk to 127\.0\.0\.1"):
        Session([host], requests_per_second=0, retries=0).get_json(f"http://{host}/x")
    assert asked == ["rebound.example"]
    assert seen == []


def test_http_is_for_this_machine_alone() -> None:
    check_url("http://127.0.0.1:80/x")
    check_url("http://localhost/x")
    check_url("https://example.org")
    for url in ("http://example.org", "ftp://example.org", "file:///etc/passwd", "http://127.0.0.1.example.org/"):
        with pytest.raises(CrawlError, match="only https"):
            check_url(url)


def test_the_user_agent_is_ours(httpserver: HTTPServer) -> None:
    seen = answers(httpserver, 200)
    session(httpserver).get_json(httpserver.url_for("/x"))
    assert seen[0].headers["User-Agent"].startswith("lora-audit/")


def test_tokens_come_from_a_private_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("abc123\n")
    file.chmod(0o644)
    with pytest.raises(CrawlError, match="chmod 600"):
        read_token("X_TOKEN", file)
    file.chmod(0o600)
    assert read_token("X_TOKEN", file) == Token("abc123")
    monkeypatch.setenv("X_TOKEN", "fromenv")
    assert read_token("X_TOKEN", None) == Token("fromenv")
    monkeypatch.setenv("X_TOKEN", "two words")
    with pytest.raises(CrawlError, match="does not hold a token"):
        read_token("X_TOKEN", None)
    monkeypatch.delenv("X_TOKEN")
    assert read_token("X_TOKEN", None) is None
    with pytest.raises(CrawlError, match="cannot be read"):
        read_token("X_TOKEN", tmp_path / "none")


def test_the_environments_proxies_and_netrc_are_not_used(
    httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = urlsplit(httpserver.url_for("/")).hostname
    (tmp_path / "netrc").write_text(f"machine {host} login me password mine\n")
    monkeypatch.setitem(os.environ, "NETRC", str(tmp_path / "netrc"))
    monkeypatch.setitem(os.environ, "http_proxy", "http://127.0.0.1:1")
    seen = answers(httpserver, 200)
    session(httpserver).get_json(httpserver.url_for("/x"))
    assert "Authorization" not in seen[0].headers
