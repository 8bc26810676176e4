"""One item of a stranger's never ends a crawl: it is recorded with what went wrong, and the others are taken."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from audit.errors import FetchError, WorkspaceError
from audit.storable import path_as_text, path_of_text, storable
from audit.workspace import Workspace
from crawlers import crawl as crawling
from crawlers import http
from crawlers.catalog import Catalog, Outcome
from crawlers.crawl import Counts, Crawl, estimate
from crawlers.http import Token, shown
from crawlers.items import Item
from crawlers.sources.civitai import Civitai
from crawlers.sources.folder import Folder
from crawlers.sources.huggingface import HuggingFace
from crawlers.training_data import unpack
from tests.crawlers.test_folder import lora
from tests.crawlers.test_training_data import packed, png

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.PatientRetry, "unit", 0.01)


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    return folder


def rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    return {row["item_id"]: row for row in workspace.rows("SELECT * FROM checkpoints")}


def look(workspace: Workspace, folder: Path) -> Counts:
    catalog = Catalog(workspace)
    return Crawl(Folder(catalog, str(folder), settle=0), catalog).run()


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


DIGITS = "9" * 5000
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
METADATA = {
    "digits": {"ss_num_train_images": DIGITS, "ss_dataset_dirs": '{"1_a": {"img_count": 3, "n_repeats": 1}}'},
    "products": {"ss_num_train_images": "9" * 4000,
                 "ss_dataset_dirs": '{"1_a": {"img_count": "%s", "n_repeats": "%s"}}' % (("9" * 4000,) * 2)},
    "infinity": {"ss_num_train_images": "1", "ss_dataset_dirs": '{"1_a": {"img_count": 1e999, "n_repeats": 1}}'},
    "tags": {"ss_tag_frequency": '{"1_a": {"cat": %s, "dog": 3}}' % ("9" * 4000)},
    "surrogate": {"ss_sd_model_name": "a\ud800b\x00c", "ss_tag_frequency": '{"1_\\ud800": {"\\ud800": 3}}'},
    "steps": {"ss_steps": DIGITS, "ss_network_dim": "9" * 12, "ss_learning_rate": "1" * 5000},
}  # fmt: skip


@pytest.mark.parametrize("kind", METADATA)
def test_a_file_with_odd_metadata_ends_no_crawl(workspace: Workspace, uploads: Path, kind: str) -> None:
    (uploads / "a.safetensors").write_bytes(
        with_header({"__metadata__": METADATA[kind], "a.lora_down.weight": TENSOR}, b"\0" * 4)
    )
    (uploads / "b.safetensors").write_bytes(lora(1))
    assert sum(look(workspace, uploads).states.values()) == 2
    states = {row["name"]: row["state"] for row in rows(workspace).values()}
    assert states["b.safetensors"] == "stored"
    assert states["a.safetensors"] == "stored"


@pytest.mark.parametrize(
    "name", [f"single_blocks.{DIGITS}.linear1.weight", "lora_unet_double_blocks_" + "1" * 400 + "_"]
)
def test_a_tensor_named_with_thousands_of_digits_ends_no_crawl(workspace: Workspace, uploads: Path, name: str) -> None:
    (uploads / "a.safetensors").write_bytes(with_header({name: TENSOR}, b"\0" * 4))
    (uploads / "b.safetensors").write_bytes(lora(1))
    look(workspace, uploads)
    states = {row["name"]: row["state"] for row in rows(workspace).values()}
    assert states == {"a.safetensors": "refused" if len(name) > 500 else "stored", "b.safetensors": "stored"}


NAMES = [b"caf\xe9.safetensors", b"a\xff\\xff.safetensors", b"line\nbreak.safetensors", b"\xc2\x85.safetensors",
         b"\x1b[31m/red.safetensors", b"//\xfe.safetensors"[2:]]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_text_is_kept_and_shown_escaped(workspace: Workspace, uploads: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(uploads), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(lora(1))
    with open(path + b".json", "w") as file:
        file.write('{"caption": "a sks cat"}')
    assert look(workspace, uploads).states == {"stored": 1}
    [row] = rows(workspace).values()
    shown_path = row["item_id"].split(":", 2)[2]
    assert shown_path.isprintable()
    assert os.fsencode(path_of_text(shown_path)) == name
    assert look(workspace, uploads).new == 0
    catalog = Catalog(workspace)
    folder = Folder(catalog, str(uploads), settle=0)
    assert [item.missing for item in folder.check(row)] == [None]
    os.unlink(path)
    assert [item.missing for item in folder.check(row)] == ["deleted from the folder"]
    assert workspace.rows("SELECT caption FROM captions") == [{"caption": "a sks cat"}]


def test_two_names_never_become_one() -> None:
    names = [b"a\xff", b"a\\xff", b"a\\\xff", b"\\\xff", b"a\x01", b"a\\x01", "a\u0085".encode(), b"a\\u0085"]
    texts = [path_as_text(os.fsdecode(name)) for name in names]
    assert len(set(texts)) == len(names)
    assert [os.fsencode(path_of_text(text)) for text in texts] == names


def test_every_text_becomes_one_that_a_table_holds(workspace: Workspace) -> None:
    odd = "".join(map(chr, range(0x300))) + "\ud800\udc80\U0001f600\u202e"
    storable(odd).encode()
    item = Item("file:1", "file", odd, "1", odd, "", title=odd, tags=(odd,), license=odd)
    Catalog(workspace).record([(item, Outcome("failed", odd))], {})
    [row] = rows(workspace).values()
    assert row["tags"] == [storable(odd)]
    assert "\\x1b" in row["title"]
    assert "\\ud800\\x80\U0001f600" in row["reason"]


class Raising(Folder):
    """A source whose items fail where they are told to."""

    error: Exception = ZeroDivisionError("division by zero")
    where = "fetch"

    def _fails(self, item: Item, where: str) -> None:
        if where == self.where and item.name.startswith("a"):
            raise self.error

    def enrich(self, item: Item) -> Item:
        self._fails(item, "enrich")
        return super().enrich(item)

    def fetch(self, item: Item, tell: Any) -> Outcome:
        self._fails(item, "fetch")
        return super().fetch(item, tell)

    def _item(self, path: str, files: Any) -> Item:
        item = super()._item(path, files)
        self._fails(item, "list")
        return item


@pytest.mark.parametrize("where", ["enrich", "fetch", "list", "conclude"])
@pytest.mark.parametrize("error", [ZeroDivisionError("x\x1b"), RecursionError(), KeyError("a"), zlib.error("bad data")])
def test_any_error_of_one_item_is_its_record_with_a_trace(
    workspace: Workspace, uploads: Path, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name in ("a", "b", "c"):
        (uploads / f"{name}.safetensors").write_bytes(lora(ord(name)))
    catalog = Catalog(workspace)
    source = Raising(catalog, str(uploads), settle=0)
    source.error, source.where = error, where
    if where == "conclude":
        from crawlers import catalog as module

        real = module.conclude

        def conclude(item: Item, header: Any) -> Any:
            source._fails(item, "conclude")
            return real(item, header)

        monkeypatch.setattr(module, "conclude", conclude)
    with caplog.at_level(logging.ERROR):
        counts = Crawl(source, catalog).run()
    [reason] = counts.reasons
    found = re.search(rf"unforeseen {type(error).__name__}: .*\(trace ([0-9a-f]{{8}})\)", reason)
    assert found
    logged = [record for record in caplog.records if found[1] in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info
    states = {row["name"]: row["state"] for row in rows(workspace).values()}
    assert (states["b.safetensors"], states["c.safetensors"]) == ("stored", "stored")
    assert states.get("a.safetensors") == (None if where == "list" else "failed")
    assert list((workspace.root / "crawls").iterdir())  # the next crawl goes on


def test_a_storage_that_fails_still_ends_the_crawl(workspace: Workspace, uploads: Path) -> None:
    (uploads / "a.safetensors").write_bytes(lora(1))
    catalog = Catalog(workspace)
    source = Raising(catalog, str(uploads), settle=0)
    source.error = WorkspaceError("no disk space")
    with pytest.raises(WorkspaceError, match="no disk space"):
        Crawl(source, catalog).run()


def test_a_broken_deflate_costs_the_training_set_alone(workspace: Workspace) -> None:
    whole = packed({"1.png": png(1)}).getvalue()
    at = whole.index(b"1.png") + 5 + 20
    broken = bytearray(whole)
    broken[at : at + 20] = b"\xff" * 20
    with pytest.raises(FetchError, match="no readable zip"):
        unpack(BytesIO(bytes(broken)), workspace.files, "ground-truth/x")


@pytest.mark.parametrize(
    "url", ["https://h:999999/x", "http://[", "https://u:p@h:abc/\ud800", "https://h:-1/", "//", ""]
)
def test_what_is_no_url_is_shown_without_an_error(url: str) -> None:
    shown(url).encode()
    assert "p@" not in shown(url)


def civitai(workspace: Workspace, server: Any, **options: Any) -> Civitai:
    return Civitai(
        Catalog(workspace),
        endpoint=server.url_for("/api"),
        requests_per_second=0,
        retries=0,
        prompts="never",
        **options,
    )


def model(number: int, **version: Any) -> dict[str, Any]:
    file = {"id": 31, "type": "Model", "name": "a.safetensors", "sizeKB": 1, "downloadUrl": "https://h:999999/x"}
    return {"id": number, "name": "x", "modelVersions": [{"id": 21, "files": [file], **version}]}


ODD_VERSIONS: list[dict[str, Any]] = [
    {"files": [{"id": 31, "type": ["Model"], "name": 10**400, "sizeKB": 1}]},
    {"files": [{"id": 31, "type": "Model", "name": {"a": 1}, "sizeKB": 1e400, "downloadUrl": "http://["}]},
    {"files": [{"id": 31, "type": "Model", "name": "x", "hashes": [1], "metadata": "x", "downloadUrl": "https://h:9"}]},
    {"publishedAt": 5, "trainedWords": [1, {"a": 2}, "\ud800"], "description": f"\ud800 trained on {DIGITS} images"},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD_VERSIONS)))
def test_odd_answers_of_civitai_cost_themselves(workspace: Workspace, httpserver: Any, number: int) -> None:
    answer = {"items": [model(1, **ODD_VERSIONS[number]), 5, None, model(2)], "metadata": {}}
    httpserver.expect_request("/api/models").respond_with_data(json.dumps(answer), content_type="application/json")
    source = civitai(workspace, httpserver)
    Crawl(source, source.catalog).run()
    assert rows(workspace)["civitai:2:21:31"]["state"] == "refused"
    assert "not a host of this source" in rows(workspace)["civitai:2:21:31"]["reason"]


def hub(workspace: Workspace, server: Any, token: str | None = None, **options: Any) -> HuggingFace:
    key = Token(token) if token else None
    return HuggingFace(Catalog(workspace), endpoint=server.url_for("").rstrip("/"), token=key, requests_per_second=0)


def hub_model(number: int, **said: Any) -> dict[str, Any]:
    return {"id": f"u/m{number}", "sha": COMMIT, "siblings": [{"rfilename": "a.bin"}], **said}


ODD_MODELS: list[Any] = [
    5, None, [], {"id": 5}, {}, hub_model(1, siblings="x"), hub_model(1, siblings=[5, None, {"rfilename": 5}]),
    hub_model(1, cardData=[1]), hub_model(1, cardData={"base_model": [["x"], 10**400], "widget": [[1]], "tags": 5}),
    hub_model(1, tags=[1, None, {"a": 1}]), hub_model(1, tags="x", author=["x"], lastModified=5),
    hub_model(1, lastModified="not a time"), hub_model(1, cardData={"eval_results": "x", "model-index": [{"a": 1}]}),
    hub_model(1, cardData={"instance_prompt": "\ud800\x1b", "license": "\udc80"}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD_MODELS)))
def test_odd_entries_of_the_hub_cost_themselves(workspace: Workspace, httpserver: Any, number: int) -> None:
    answer = json.dumps([ODD_MODELS[number], hub_model(2)])
    httpserver.expect_request("/api/models").respond_with_data(answer, content_type="application/json")
    source = hub(workspace, httpserver)
    Crawl(source, source.catalog).run()
    assert "huggingface:u/m2:a.bin" in rows(workspace)


def cursors(server: Any, following: Any, items: Any) -> list[str]:
    """Answers Civitai's listing; ``following`` makes the next cursor of one, ``items`` the models at it."""
    from werkzeug import Request, Response

    asked: list[str] = []

    def answer(request: Request) -> Response:
        cursor = request.args.get("cursor", "0")
        asked.append(cursor)
        document = {"items": items(cursor), "metadata": {"nextCursor": following(cursor)}}
        return Response(json.dumps(document), content_type="application/json")

    server.expect_request("/api/models").respond_with_handler(answer)
    return asked


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("kind", ["two in turn", "ever new"])
def test_an_endless_listing_of_civitai_is_left(
    workspace: Workspace, httpserver: Any, monkeypatch: pytest.MonkeyPatch, kind: str, filled: bool
) -> None:
    monkeypatch.setattr(crawling, "MOST_WITHOUT_NEWS", 7)
    turn = {"0": "A", "A": "B", "B": "A"}
    following = turn.__getitem__ if kind == "two in turn" else lambda cursor: str(int(cursor) + 1)
    asked = cursors(httpserver, following, lambda cursor: [model(1)] if filled else [])
    source = civitai(workspace, httpserver)
    counts = Crawl(source, source.catalog, False).run()
    assert len(asked) == 7 + filled
    assert any("without anything new: it was left after 7 such pages" in reason for reason in counts.reasons)
    [state] = [json.loads(path.read_text())["state"] for path in (workspace.root / "crawls").iterdir()]
    assert "without anything new" in state["passed_over"][0]["what"]
    assert estimate(source, source.catalog, None, lambda *_: None)["passed_over"] in (0, 1)


def test_pages_with_news_between_empty_ones_are_followed(
    workspace: Workspace, httpserver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crawling, "MOST_WITHOUT_NEWS", 7)
    asked = cursors(
        httpserver,
        lambda cursor: str(int(cursor) + 1) if int(cursor) < 40 else None,
        lambda cursor: [model(int(cursor))] if int(cursor) % 5 == 0 else [],
    )
    source = civitai(workspace, httpserver)
    counts = Crawl(source, source.catalog, False).run()
    assert (len(asked), counts.passed_over, len(rows(workspace))) == (41, 0, 9)


@pytest.mark.parametrize("kind", ["itself", "two in turn", "ever new"])
def test_an_endless_listing_of_the_hub_is_left(
    workspace: Workspace, httpserver: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from werkzeug import Request, Response

    monkeypatch.setattr(crawling, "MOST_WITHOUT_NEWS", 7)
    asked: list[int] = []

    def answer(request: Request) -> Response:
        number = int(request.args.get("cursor", "0"))
        asked.append(number)
        following = {"itself": max(1, number), "two in turn": 1 + number % 2, "ever new": number + 1}[kind]
        link = f'<{httpserver.url_for("/api/models")}?cursor={following}>; rel="next"'
        return Response(json.dumps([hub_model(1)]), headers={"Link": link}, content_type="application/json")

    httpserver.expect_request("/api/models").respond_with_handler(answer)
    source = hub(workspace, httpserver)
    counts = Crawl(source, source.catalog, False).run()
    assert len(asked) == (2 if kind == "itself" else 8)
    said = "names a page as its own successor" if kind == "itself" else "it was left after 7 such pages"
    assert any(said in reason for reason in counts.reasons)
    [state] = [json.loads(path.read_text())["state"] for path in (workspace.root / "crawls").iterdir()]
    assert said in state["passed_over"][0]["what"]


def test_the_token_follows_no_link_to_another_host(workspace: Workspace, httpserver: Any) -> None:
    from pytest_httpserver import HTTPServer

    with HTTPServer(host="127.0.0.1") as other:
        other.expect_request("/api/models").respond_with_json([])
        link = f'<{other.url_for("/api/models")}?cursor=1>; rel="next"'
        httpserver.expect_request("/api/models").respond_with_json([hub_model(1)], headers={"Link": link})
        source = hub(workspace, httpserver, "hf_secret")
        with pytest.raises(Exception, match="not a host of this source"):
            Crawl(source, source.catalog, False).run()
        assert other.log == []
    assert httpserver.log[0][0].headers["Authorization"] == "Bearer hf_secret"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_token_goes_through_no_proxy_of_the_environment(
    workspace: Workspace, httpserver: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    from pytest_httpserver import HTTPServer

    with HTTPServer(host="127.0.0.1") as proxy:
        proxy.expect_request("/api/models").respond_with_json([])
        monkeypatch.setenv(variable, proxy.url_for(""))
        httpserver.expect_request("/api/models").respond_with_json([hub_model(1)])
        source = hub(workspace, httpserver, "hf_secret")
        Crawl(source, source.catalog, False).run()
        assert proxy.log == []
    assert len(rows(workspace)) == 1


def test_answers_of_the_hub_have_a_cap(workspace: Workspace, httpserver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr(http, "MAX_JSON_BYTES", 1 << 20)
    body = gzip.compress(json.dumps([{"id": "u/m", "sha": "x" * (64 << 20)}]).encode())
    assert len(body) < 1 << 17
    httpserver.expect_request("/api/models").respond_with_data(
        body, headers={"Content-Encoding": "gzip"}, content_type="application/json"
    )
    source = hub(workspace, httpserver)
    with pytest.raises(Exception, match="more than 1 MiB of JSON"):
        Crawl(source, source.catalog, False).run()
