"""Lists of URLs, data sets of the hub, videos, and forms of ThreatExchange, as inputs of sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pytest_httpserver import HTTPServer
from werkzeug import Response

from audit import add_references
from audit.config import CrawlSettings
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ReferenceSetError
from audit.references import describe, staging
from audit.references.inputs import hub as hub_input
from audit.references.inputs import web
from audit.references.inputs.metadata import metadata_of, metadata_text, plain
from audit.references.inputs.source import opener_of
from audit.references.lists import read_list
from audit.workspace import Workspace
from tests.references.test_inputs import FILES, QUICK, add, parquet_of, rows, tar_of
from tests.simulators.hub import Hub

# Lists of URLs


@pytest.fixture
def served(httpserver: HTTPServer) -> HTTPServer:
    for path in FILES[:4]:
        httpserver.expect_request(f"/{path.name}").respond_with_data(path.read_bytes(), content_type="image/png")
    httpserver.expect_request("/page").respond_with_data(b"<html>")
    return httpserver


def test_a_list_of_urls_is_fetched_and_what_fails_is_named(
    workspace: Workspace, served: HTTPServer, tmp_path: Path
) -> None:
    listed = tmp_path / "l.csv"
    urls = [served.url_for(f"/{path.name}") for path in FILES[:2]]
    lines = ["URL,caption", f"{urls[0]},one", f'{urls[1]},"two, three"', f"{served.url_for('/gone')},x", "ftp://x/y,z",
             f"{served.url_for('/page')},p", f"{urls[0]},again"]  # fmt: skip
    listed.write_text("\n".join(lines))
    skipped = add(workspace, listed)
    told = {name.rpartition("/")[2]: reason for name, reason in skipped.items()}
    assert sorted(told) == ["gone", "page", "y"]
    assert (told["y"], told["page"][:22]) == ("it is no URL of the web", "not a readable picture")
    assert "/gone answers with an error (HTTP 500)" in told["gone"]
    found = rows(workspace)
    assert list(found) == sorted(urls)
    assert found[urls[1]]["metadata"] == {"caption": "two, three", "url": urls[1]}


def test_a_query_is_shown_nowhere_and_tells_pictures_apart(
    workspace: Workspace, served: HTTPServer, tmp_path: Path
) -> None:
    for number in (0, 1):
        data = FILES[number].read_bytes()
        served.expect_request("/p", query_string=f"sig=Secret{number}").respond_with_data(data)
    listed = tmp_path / "l.txt"
    listed.write_text("\n".join(served.url_for(f"/p?sig=Secret{number}#x") for number in (0, 1, 2)))
    told = json.dumps([add(workspace, listed), found := rows(workspace)], default=str)
    assert len(found) == 2
    assert all(name.startswith(served.url_for("/p?")) for name in found)
    assert "Secret" not in told


def test_urls_that_were_described_are_not_asked_for_again(
    workspace: Workspace, served: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "CHUNK", 1)
    monkeypatch.setattr(staging, "ROWS", 1)
    listed = tmp_path / "l.txt"
    listed.write_text("# pictures\n" + "\n".join(served.url_for(f"/{path.name}") for path in FILES[:4]))

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(workspace, listed, progress=stop)
    asked = len(served.log)
    served.clear_log()
    assert add(workspace, listed) == {}
    assert len(rows(workspace)) == 4
    again = {request.path for request, _ in served.log}
    assert not {f"/{path.name}" for path in FILES[:2]} & again
    assert asked >= 2


def test_private_addresses_are_not_asked(workspace: Workspace, served: HTTPServer, tmp_path: Path) -> None:
    listed = tmp_path / "l.txt"
    listed.write_text(f"{served.url_for('/' + FILES[0].name)}\nhttps://192.0.2.7:9/x.png\n")  # not all of this machine
    with pytest.raises(ReferenceSetError, match="not a public address"):
        add(workspace, listed)
    assert served.log == []


def test_redirects_to_private_addresses_and_large_answers_are_refused(
    workspace: Workspace, served: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_FILE_BYTES", 100_000)
    served.expect_request("/large").respond_with_data(bytes(200_000))
    served.expect_request("/away").respond_with_response(Response("", 302, {"Location": "http://192.168.1.1/x"}))
    listed = tmp_path / "l.txt"
    listed.write_text("\n".join(served.url_for(one) for one in ("/" + FILES[0].name, "/large", "/away")))
    skipped = add(workspace, listed)
    assert [reason.split(" ")[0] for reason in skipped.values()] == ["larger", "refused"]


def test_metadata_keeps_no_query_of_a_url() -> None:
    about = {"url": "HTTPS://me:pw@x.org/a.png?sig=s#f", "more": ["http://x.org/b", "why? not"]}
    kept = plain(metadata_text(about))
    assert kept["more"] == about["more"]
    assert kept["url"].startswith("HTTPS://x.org/a.png?")
    assert not [one for one in ("me:pw", "sig=s", "#f") if one in kept["url"]]


# Data sets of the hub

COMMIT = "c" * 40


def test_a_data_set_is_read_at_its_commit(workspace: Workspace, httpserver: HTTPServer, tmp_path: Path) -> None:
    table = parquet_of(tmp_path / "t.parquet", image=[{"bytes": FILES[0].read_bytes(), "path": "a.png"}])
    shard = tar_of(tmp_path / "s.tar", [("k.png", FILES[1].read_bytes())])
    files = {"data/train.parquet": table.read_bytes(), "data/s.tar": shard.read_bytes(),
             "train/cat/x.png": FILES[2].read_bytes(), "README.md": b"x"}  # fmt: skip
    Hub(httpserver).publish("datasets/owner/name", COMMIT, files)
    how = CrawlSettings(hub_endpoint=httpserver.url_for("").rstrip("/"), rate=0, retries=0)
    added = add_references("a", f"hf:owner/name@{COMMIT}", descriptor="pdq", workspace=workspace, crawl=how)
    assert [one.name for one in added.skipped] == ["README.md"]
    assert list(rows(workspace)) == ["data/s.tar/k.png", "data/train.parquet/0 a.png", "train/cat/x.png"]
    add_references("a", f"hf:owner/name@{COMMIT}:train", descriptor="pdq", workspace=workspace, crawl=how)
    assert list(rows(workspace)) == ["train/cat/x.png"]
    for source, why in (
        (f"hf:owner/other@{COMMIT}", "cannot be had"), (f"hf:owner/name@{'d' * 40}", "cannot be had"),
        (f"hf:owner/name@{COMMIT}:none", "holds no pictures, Parquet files or tars below none"),
    ):  # fmt: skip
        with pytest.raises(ReferenceSetError, match=why):
            add_references("b", source, descriptor="pdq", workspace=workspace, crawl=how)


@pytest.mark.parametrize("text", ["hf:owner/name", "hf:owner/name@main", "hf:name@" + COMMIT, f"hf:a/b@{COMMIT[:-1]}"])
def test_a_data_set_without_a_commit_is_refused(text: str) -> None:
    with pytest.raises(ReferenceSetError, match="names no data set at a commit"):
        hub_input.named(text)


# Videos


def video_of(path: Path, seconds: int = 6, rate: int = 5) -> Path:
    av = pytest.importorskip("av")
    pictures = [Image.open(one).convert("RGB").resize((128, 128)) for one in FILES]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(seconds * rate):
            frame = av.VideoFrame.from_image(pictures[number // rate])
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def test_a_frame_every_few_seconds_is_a_reference(workspace: Workspace, tmp_path: Path) -> None:
    skipped = add(workspace, video_of(tmp_path / "v.mp4"), every=2.0)
    assert skipped == {}
    found = rows(workspace)
    assert list(found) == ["v.mp4 at 0.00 s", "v.mp4 at 2.00 s", "v.mp4 at 4.00 s"]
    assert found["v.mp4 at 2.00 s"]["metadata"] == {"seconds": 2.0, "video": "v.mp4"}
    near = PdqDescriptor().describe([Image.open(FILES[2]).convert("RGB")])[0]
    cosines = {name: float(np.dot(row["descriptor"], near)) for name, row in found.items()}
    assert max(cosines, key=lambda one: cosines[one]) == "v.mp4 at 2.00 s"


def test_videos_are_read_in_turns_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from audit.references.inputs import videos

    path = video_of(tmp_path / "v.mp4")
    whole = [one.name for one in videos.given_in(path, 0.5)]
    monkeypatch.setattr(videos, "AT_ONCE", 5)
    assert [one.name for one in videos.given_in(path, 0.5)] == whole
    assert len(whole) == 12
    monkeypatch.setattr(videos, "MOST_FRAMES", 5)
    assert "more than 5" in (list(videos.given_in(path, 0.5))[-1].refused or "")
    monkeypatch.setattr(videos, "MOST_PIXELS", 100)
    [refused] = videos.given_in(path, 0.5)
    assert "128 x 128 pixels a frame are too many" in (refused.refused or "")
    (tmp_path / "b.mp4").write_bytes(path.read_bytes()[:300])
    [broken] = videos.given_in(tmp_path / "b.mp4", 0.5)
    assert "not a readable video" in (broken.refused or "")


# Others


def test_what_is_no_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.doc").write_text("x")
    for source, why in (("x.doc", "is none of these"), ("none.tar", "not there"), ("none", "is not a folder")):
        with pytest.raises(ReferenceSetError, match=why):
            opener_of(str(tmp_path / source), QUICK)


def test_metadata_is_bounded() -> None:
    assert metadata_text({"b": [1, {"c": None}], "a": "x\x00"}) == '{"a": "x\\\\x00", "b": [1, {"c": null}]}'
    deep: Any = {}
    for _ in range(9):
        deep = {"a": deep}
    for value, why in (
        ({"a": "x" * 5000}, "4096"),
        ([], "no object"),
        (deep, "nested"),
        ({"a": float("nan")}, "finite"),
    ):
        with pytest.raises(ValueError, match=why):
            metadata_text(value)
    for text in ("[", "[" * 9000, "x" * 99_999, '"a"'):
        with pytest.raises(ValueError, match="metadata"):
            metadata_of(text)


def test_forms_of_threatexchange_are_read(tmp_path: Path) -> None:
    one, two = "0f" * 32, "ab" * 32
    (tmp_path / "local.txt").write_text(f"pdq {one}\nvideo_md5 {'a' * 32}\npdq {two}\n")
    (tmp_path / "api.json").write_text(json.dumps({"data": [
        {"id": 7, "indicator": one, "type": "HASH_PDQ", "status": "MALICIOUS", "tags": ["x", "y"]},
        {"id": 8, "indicator": "a" * 32, "type": "HASH_MD5"}, "nonsense",
    ]}))  # fmt: skip
    local, api = read_list(tmp_path / "local.txt"), read_list(tmp_path / "api.json")
    assert [one.tobytes().hex() for one in local.hashes] == [one, two]
    assert [skipped.reason for skipped in local.skipped] == ["it is a video_md5, and no PDQ hash"]
    assert (api.names, [plain(text) for text in api.metadata]) == (["7"], [{"status": "MALICIOUS", "tags": ["x", "y"]}])
    assert [skipped.reason for skipped in api.skipped] == [
        "it is a HASH_MD5, and no PDQ hash", "it has no hash of 64 hex digits",
    ]  # fmt: skip
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ReferenceSetError, match="holds no list of hashes"):
        read_list(tmp_path / "no.json")
