"""Base models from the hub: the token reaches the hub's own host, and no other host and no proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, get_session, set_client_factory
from werkzeug import Request, Response

from audit.errors import CheckpointError
from audit.models import hub as ours
from audit.models.hub import CONFIG_FILES, download_snapshot
from tests.simulators.civitai import LocalServer
from tests.simulators.hub import Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canary"
LOGIN = "hf_stored_login"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache, a token in the environment, and a stored login."""
    (tmp_path / "login").write_text(LOGIN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    close_session()
    yield monkeypatch
    close_session()


@contextmanager
def listening(status: int = 200, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[Request]]]:
    """A server of another host, and what arrives at it."""
    seen: list[Request] = []

    def answer(request: Request) -> Response:
        seen.append(request)
        return Response("[]", status, headers or {}, content_type="application/json")

    server = LocalServer(answer)
    try:
        yield server.url.rstrip("/"), seen
    finally:
        server.close()


def point_to(hub_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = hub_url.rstrip("/")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


FILES = {"model_index.json": b"{}", "unet/config.json": b"{}", "unet/a.safetensors": b"weights"}
PATTERNS = [*CONFIG_FILES, "*/*.safetensors"]


def test_the_token_opens_a_gated_model_and_reaches_neither_cdn_nor_proxy(environment: pytest.MonkeyPatch) -> None:
    with Hub.serve(token="hf_other") as hub, listening() as (proxy, at_the_proxy):
        hub.publish("jane/base", COMMIT, FILES, gated="manual", token_users=[TOKEN])
        point_to(hub.url, environment)
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            environment.setenv(name, proxy.replace("://", "://user:password@"))
        folder = download_snapshot(f"jane/base@{COMMIT}", PATTERNS)
        assert (folder / "unet/a.safetensors").read_bytes() == b"weights"
        assert at_the_proxy == []
        assert (hub.counts["cdn"], hub.counts["cdn-with-authorization"]) == (1, 0)
        assert {one.headers["Authorization"] for one in hub.seen if "/cdn/" not in one.path} == {f"Bearer {TOKEN}"}


def test_a_worker_without_a_token_finds_a_gated_model_in_a_cache_that_the_driver_has_filled(
    environment: pytest.MonkeyPatch,
) -> None:
    with Hub.serve(token="hf_other") as hub:
        hub.publish("jane/base", COMMIT, FILES, gated="manual", token_users=[TOKEN])
        point_to(hub.url, environment)
        filled = download_snapshot(f"jane/base@{COMMIT}", PATTERNS)
        environment.setenv("HF_TOKEN", "")
        assert download_snapshot(f"jane/base@{COMMIT}", PATTERNS) == filled


def test_a_stored_login_is_not_used(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("HF_TOKEN")
    with Hub.serve(token=LOGIN) as hub:
        hub.publish("jane/base", COMMIT, FILES)
        hub.publish("jane/gated", COMMIT, FILES, gated="manual", token_users=[LOGIN])
        point_to(hub.url, environment)
        assert download_snapshot(f"jane/base@{COMMIT}", PATTERNS).is_dir()
        with pytest.raises(CheckpointError, match=r"gated: ask for access .* HF_TOKEN"):
            download_snapshot(f"jane/gated@{COMMIT}", PATTERNS)
        assert not any("Authorization" in one.headers for one in hub.seen)


@pytest.mark.parametrize("how", ["redirect", "link"])
def test_neither_a_redirect_nor_a_link_leads_the_token_to_another_host(
    environment: pytest.MonkeyPatch, how: str
) -> None:
    with listening() as (other, elsewhere):
        headers = {"Location": f"{other}/x"} if how == "redirect" else {"Link": f'<{other}/next>; rel="next"'}
        with listening(307 if how == "redirect" else 200, headers) as (own, here):
            point_to(own, environment)
            set_client_factory(ours.client)
            if how == "redirect":
                get_session().get(f"{own}/a", headers={"Authorization": f"Bearer {TOKEN}"})
            else:
                list(HfApi(endpoint=own, token=TOKEN).list_repo_tree("jane/base", revision=COMMIT))
            assert [one.headers.get("Authorization") for one in here] == [f"Bearer {TOKEN}"]
            assert [one.headers.get("Authorization") for one in elsewhere] == [None]


def test_redirects_end(environment: pytest.MonkeyPatch) -> None:
    with listening(307, {"Location": "/again"}) as (own, here):
        point_to(own, environment)
        with pytest.raises(CheckpointError, match="cannot be downloaded"):
            download_snapshot(f"jane/base@{COMMIT}", PATTERNS)
        assert len(here) <= 3 * (ours.MOST_REDIRECTS + 1)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://huggingface.co/api", True),
        ("https://HUGGINGFACE.CO/api", True),
        ("https://huggingface.co:8443/api", False),
        ("https://cdn.huggingface.co/api", False),
        ("https://huggingface.co.example/api", False),
        ("https://huggingface.co@example.org/", False),
        ("http://127.0.0.1:8000/", False),
    ],
)
def test_only_the_own_host_gets_the_token(url: str, kept: bool) -> None:
    headers = {"Authorization": "Bearer x", "Cookie": "y", "Accept": "z"}
    ours.check(url, headers, "https://huggingface.co")
    assert set(headers) == ({"Authorization", "Cookie", "Accept"} if kept else {"Accept"})


@pytest.mark.parametrize("url", ["http://huggingface.co/", "ftp://huggingface.co/", "http://10.0.0.1/"])
def test_only_https_is_used(url: str) -> None:
    with pytest.raises(ValueError, match="only https is used"):
        ours.check(url, {}, "https://huggingface.co")


def test_a_token_that_is_none_is_refused_without_being_shown(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HF_TOKEN", "hf_secret\nx")
    with pytest.raises(CheckpointError, match="HF_TOKEN does not hold a token") as caught:
        download_snapshot(f"jane/base@{COMMIT}", PATTERNS)
    assert "hf_secret" not in str(caught.value)


def test_signed_links_are_not_shown() -> None:
    assert ours._without_queries("for url 'https://cdn.x/a?X-Amz-Signature=abc' x") == "for url 'https://cdn.x/a' x"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("jane/lora", True), ("jane", False), ("jane/" + "x" * 200, False), ("jane/a--b", False), ("jane/a.git", False)],
)
def test_names_that_the_hub_has_not_are_none(name: str, is_one: bool) -> None:
    assert ours.is_hub_id(name) is is_one
