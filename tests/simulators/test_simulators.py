"""The simulators behave as the services: each quirk once, asked by plain requests and by the real hub client."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import HfApi, close_session, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory
from safetensors.numpy import load

from audit.errors import CheckpointError
from audit.models.safetensors_header import read_header
from tests.simulators.civitai import (
    Civitai,
    Fault,
    SimFile,
    SimModel,
    SimVersion,
    hashes,
    make_models,
    served,
    split_header,
    tiny_lora,
    with_metadata,
)
from tests.simulators.hub import Hub

AGENT = {"User-Agent": "lora-audit-test"}
BEARER = AGENT | {"Authorization": "Bearer secret-token"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


def get(url: str, headers: dict[str, str] = AGENT, **params: Any) -> requests.Response:
    return requests.get(url, params=params, headers=headers, timeout=10, allow_redirects=False)


def pages(civitai: Civitai, **params: Any) -> Iterator[list[int]]:
    url: str | None = f"{civitai.url}/models"
    answer = get(f"{civitai.url}/models", **params).json()
    while url:
        yield [item["id"] for item in answer["items"]]
        url = answer["metadata"].get("nextPage")
        if url:
            assert answer["metadata"]["nextCursor"]
            answer = get(url).json()


def one(fault: Fault = Fault.none, content: bytes | Path | None = None) -> SimModel:
    file = SimFile(3, "å style.safetensors", content or tiny_lora(1), fault=fault)
    images = [
        {"id": 1, "url": "https://image.example/1", "meta": {"meta": {"prompt": "nested"}}},
        {"id": 2, "url": "https://image.example/2", "nsfwLevel": "X", "meta": None},
    ]
    return SimModel(1, "A style", versions=[SimVersion(2, "v1", trained_words=["sks"], files=[file], images=images)])


def listed_file(civitai: Civitai) -> dict[str, Any]:
    return get(f"{civitai.url}/models/1").json()["modelVersions"][0]["files"][0]


def link(civitai: Civitai) -> str:
    answer = get(listed_file(civitai)["downloadUrl"], BEARER)
    assert answer.status_code == 307
    return answer.headers["Location"]


def half(url: str, size: int, headers: dict[str, str] = AGENT) -> None:
    """Download until the connection breaks, at half of the bytes."""
    with requests.get(url, headers=headers, stream=True, timeout=10) as answer:
        assert int(answer.headers["Content-Length"]) == size
        assert len(answer.raw.read1(size)) + len(_until_broken(answer)) == size // 2


def _until_broken(answer: requests.Response) -> bytes:
    got = b""
    try:
        for chunk in answer.iter_content(1):
            got += chunk
    except requests.RequestException:
        return got
    raise AssertionError("the connection does not break")


def test_tiny_loras_are_valid_and_the_same_for_a_seed() -> None:
    content = tiny_lora(7, {"ss_network_dim": "2", "ä": "水彩"})
    assert content == tiny_lora(7, {"ss_network_dim": "2", "ä": "水彩"}) != tiny_lora(8)
    assert split_header(content)[0]["__metadata__"]["ä"] == "水彩"
    tensors = load(content)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert tensors[f"{name}.lora_down.weight"].shape == (2, 768)
    assert tensors[f"{name}.lora_up.weight"].shape == (32, 2)
    assert len(content) < 20_000


def test_made_models_are_varied_and_newest_first() -> None:
    models = make_models(200)
    assert [model.id for model in models] == list(range(200, 0, -1))
    times = [version.published_at for model in models for version in model.versions]
    assert times == sorted(times, reverse=True)
    assert None in {model.creator for model in models}
    assert None in {model.description for model in models}
    files = [file for model in models for version in model.versions for file in version.files]
    assert len({file.id for file in files}) == len({file.content for file in files if file.type == "Model"}) + 10
    shared = make_models(200, files=False)
    assert len({file.content for model in shared for version in model.versions for file in version.files}) == 1


def test_a_listing_repeats_an_item_at_a_border_and_newer_models_do_not_shift_it() -> None:
    with Civitai(make_models(25)) as civitai:
        listing = pages(civitai, sort="Newest", limit=10, nsfw="true")
        first = next(listing)
        civitai.add(SimModel(99, "new", versions=[SimVersion(990, "v1", published_at="2030-01-01T00:00:00.000Z")]))
        second, third = listing
        assert (first[0], first[-1], second[0], third[-1]) == (25, 16, 16, 1)
        assert set(first + second + third) == set(range(1, 26))
        assert next(pages(civitai, sort="Newest"))[0] == 99


def test_a_listing_can_skip_at_a_border_and_have_empty_pages() -> None:
    with Civitai(make_models(60), skip_at_border=True, repeat_at_border=False, empty_page_every=3) as civitai:
        newest = list(pages(civitai, sort="Newest", limit=5, nsfw="true"))
        assert newest.index([]) == 2
        assert newest[-1]
        missing = set(range(1, 61)) - {item for page in newest for item in page}
        assert missing
        other = {item for page in pages(civitai, sort="Most Downloaded", limit=5, nsfw="true") for item in page}
        assert missing <= other


def test_a_listing_is_filtered() -> None:
    with Civitai(make_models(100), page_size_cap=50, repeat_at_border=False) as civitai:
        assert len(next(pages(civitai, limit=100, nsfw="true"))) == 50
        answer = get(f"{civitai.url}/models", types=["LoCon", "DoRA"], baseModels=["Pony", "SD 1.5"])
        assert {item["type"] for item in answer.json()["items"]} == {"LoCon", "DoRA"}
        assert not any(item["nsfw"] for item in answer.json()["items"])
        for item in get(f"{civitai.url}/models", tag="背景", username="artlover", query="DREAM").json()["items"]:
            assert "背景" in item["tags"]
        recent = get(f"{civitai.url}/models", period="Day", nsfw="true", limit=100).json()["items"]
        assert len(recent) == 50  # of 100 in 17 hours


def test_bad_listings_are_refused() -> None:
    with Civitai([one()]) as civitai:
        url = f"{civitai.url}/models"
        assert get(url, page=11, limit=100).status_code == 429
        assert get(url, page=2, limit=100).json() == {"items": [], "metadata": {}}
        assert get(url, page=1, query="x").status_code == 400
        assert get(url, limit=101).status_code == 400
        assert get(url, cursor="no cursor").status_code == 400
        assert requests.get(url, timeout=10).status_code == 403
        assert get(url, {"User-Agent": "Python-urllib/3.11"}).status_code == 403
        assert get(url, AGENT | {"Authorization": "Bearer wrong"}).status_code == 401
        assert civitai.counts["forbidden"] == 2
        assert civitai.counts["unauthorized"] == 1


def test_bursts_of_429_and_single_500() -> None:
    with Civitai([one()], burst_429_every=3, burst_length=2, retry_after="1", error_500_every=7) as civitai:
        answers = [get(f"{civitai.url}/models/1") for _ in range(12)]
        assert [answer.status_code for answer in answers] == [
            200,
            200,
            200,
            429,
            429,
            200,
            500,
            200,
            429,
            429,
            200,
            200,
        ]
        assert answers[3].headers["Retry-After"] == "1"
        assert (civitai.counts["429"], civitai.counts["500"], civitai.counts["model"]) == (4, 1, 7)


def test_models_versions_and_hashes_are_looked_up() -> None:
    with Civitai([one(), *make_models(10, seed=5)[:8]]) as civitai:
        assert get(f"{civitai.url}/models/0").json() == {"error": "No model with id 0"}
        assert get(f"{civitai.url}/model-versions/7").status_code == 404
        file = listed_file(civitai)
        data = tiny_lora(1)
        assert file["hashes"]["SHA256"] == hashlib.sha256(data).hexdigest().upper()
        assert file["hashes"]["AutoV3"] == hashlib.sha256(split_header(data)[1]).hexdigest()[:12].upper()
        assert set(file["hashes"]) == {"AutoV1", "AutoV2", "AutoV3", "SHA256", "CRC32", "BLAKE3"}
        for value in (file["hashes"]["SHA256"].lower(), file["hashes"]["AutoV2"], file["hashes"]["BLAKE3"]):
            version = get(f"{civitai.url}/model-versions/by-hash/{value}").json()
            assert (version["id"], version["modelId"], version["model"]["type"]) == (2, 1, "LORA")
        assert get(f"{civitai.url}/model-versions/by-hash/00").status_code == 404
        url = f"{civitai.url}/model-versions/by-hash"
        found = requests.post(url, json=["00", file["hashes"]["AutoV3"]], headers=AGENT, timeout=10)
        assert [version["id"] for version in found.json()] == [2]
        assert requests.post(url, json=["00"] * 101, headers=AGENT, timeout=10).status_code == 400


def test_images_have_prompts_only_when_asked() -> None:
    with Civitai([one()]) as civitai:
        url = f"{civitai.url}/images"
        with_meta = get(url, modelVersionId=2, withMeta="true", limit=200).json()["items"]
        assert [image["meta"] for image in with_meta] == [{"meta": {"prompt": "nested"}}, None]
        assert [image["nsfwLevel"] for image in with_meta] == ["None", "X"]
        assert [image["meta"] for image in get(url, modelVersionId=2, nsfw="false").json()["items"]] == [None]
        assert get(url, limit=201).status_code == 400
        first = get(url, limit=1).json()
        assert get(first["metadata"]["nextPage"]).json()["items"][0]["id"] == 2


def test_modes_and_removal() -> None:
    with Civitai([one()]) as civitai:
        url = listed_file(civitai)["downloadUrl"]
        civitai.archive(1)
        model = get(f"{civitai.url}/models/1").json()
        assert (model["mode"], model["modelVersions"][0]["files"]) == ("Archived", [])
        assert model["modelVersions"][0]["images"]
        assert get(url, BEARER).status_code == 404
        civitai.take_down(1)
        assert get(f"{civitai.url}/models/1").json()["modelVersions"][0]["images"] == []
        civitai.remove(1)
        assert get(f"{civitai.url}/models/1").status_code == 404
        assert list(pages(civitai)) == [[]]


def test_a_download_needs_the_token_and_leads_to_another_host() -> None:
    with Civitai([one()]) as civitai:
        url = listed_file(civitai)["downloadUrl"]
        assert requests.head(url, headers=BEARER, timeout=10).status_code == 401
        login = get(url)
        assert login.status_code == 307
        assert "reason=download-auth" in login.headers["Location"]
        assert get(login.headers["Location"]).headers["Content-Type"].startswith("text/html")
        assert get(url + "&token=secret-token").status_code == 307
        assert civitai.counts["token-in-query"] == 1

        presigned, data = link(civitai), tiny_lora(1)
        assert presigned.startswith(civitai.store_url)
        assert get(presigned, BEARER).status_code == 400
        assert civitai.counts["store-with-authorization"] == 1
        whole = get(presigned)
        assert (whole.status_code, whole.content) == (200, data)
        part = get(presigned, AGENT | {"Range": "bytes=0-0"})
        assert (part.status_code, part.content) == (206, data[:1])
        assert part.headers["Content-Range"] == f"bytes 0-0/{len(data)}"
        beyond = get(presigned, AGENT | {"Range": f"bytes={len(data)}-"})
        assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
        assert get(presigned[:-1] + "?").status_code == 403
        civitai.link_seconds = -1
        assert get(link(civitai)).status_code == 403
        assert civitai.requests[-1].method == "GET"


def test_a_file_on_disk_is_served(tmp_path: Path) -> None:
    (tmp_path / "lora").write_bytes(tiny_lora(1))
    with Civitai([one(content=tmp_path / "lora")]) as civitai:
        assert listed_file(civitai)["hashes"]["SHA256"] == hashlib.sha256(tiny_lora(1)).hexdigest().upper()
        assert get(link(civitai), AGENT | {"Range": "bytes=-5"}).content == tiny_lora(1)[-5:]


@pytest.mark.parametrize("fault", [Fault.drops_halfway, Fault.link_expires, Fault.ignores_range])
def test_broken_downloads_can_be_resumed(fault: Fault) -> None:
    data = tiny_lora(1)
    with Civitai([one(fault)]) as civitai:
        presigned = link(civitai)
        assert get(presigned, AGENT | {"Range": "bytes=0-0"}).ok  # a probe is not the first download
        half(presigned, len(data))
        rest = get(presigned, AGENT | {"Range": f"bytes={len(data) // 2}-"})
        assert rest.status_code == {"link_expires": 403, "ignores_range": 200, "drops_halfway": 206}[fault]
        if fault is Fault.link_expires:
            rest = get(link(civitai), AGENT | {"Range": f"bytes={len(data) // 2}-"})
        assert rest.content == (data if fault is Fault.ignores_range else data[len(data) // 2 :])


def test_the_database_can_be_wrong() -> None:
    right = hashes(one().versions[0].files[0])
    for fault in (Fault.wrong_sha256, Fault.rewritten_header, Fault.missing_sha256):
        with Civitai([one(fault)]) as civitai:
            listed = listed_file(civitai)["hashes"]
            assert listed.get("SHA256") != right["SHA256"]
            assert listed["AutoV3"] == right["AutoV3"]
            assert get(link(civitai)).content == tiny_lora(1)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.pickle, "zip archive"),
        (Fault.disguised_pickle, "pickle"),
        (Fault.bad_header, None),
        (Fault.huge_header, None),
        (Fault.truncated, None),
        (Fault.html, "web page"),
    ],
)
def test_hostile_files(fault: Fault, reason: str | None, tmp_path: Path) -> None:
    with Civitai([one(fault)]) as civitai:
        listed, answer = listed_file(civitai), get(link(civitai))
        assert answer.status_code == 200
        assert len(answer.content) == int(answer.headers["Content-Length"])
        (tmp_path / "file.safetensors").write_bytes(answer.content)
        with pytest.raises(CheckpointError, match=reason):
            read_header(tmp_path / "file.safetensors")
        if fault is not Fault.html:
            assert listed["hashes"]["SHA256"] == hashlib.sha256(answer.content).hexdigest().upper()
        assert (
            (listed["metadata"]["format"] == "PickleTensor") == listed["name"].endswith(".ckpt") == (fault == "pickle")
        )


def test_downloads_that_never_succeed_and_one_that_does_later() -> None:
    for fault, status in ((Fault.not_found, 404), (Fault.server_error, 500)):
        with Civitai([one(fault)]) as civitai:
            assert get(listed_file(civitai)["downloadUrl"], BEARER).status_code == status
    with Civitai([one(Fault.too_big)]) as civitai:
        assert listed_file(civitai)["sizeKB"] < 20
        with requests.get(link(civitai), headers=AGENT, stream=True, timeout=10) as answer:
            assert answer.headers["Content-Length"] == "10000000000"
            assert answer.raw.read(len(tiny_lora(1))) == tiny_lora(1)
    with Civitai([one(Fault.corrupt_once)]) as civitai:
        first, second = get(link(civitai)).content, get(link(civitai)).content
        assert second == tiny_lora(1)
        assert first[:-1] == second[:-1]
        assert first != second


def test_a_closed_simulator_refuses_and_ten_thousand_models_are_listed_fast() -> None:
    models = make_models(10_000, files=False)
    with Civitai(models, repeat_at_border=False) as civitai:
        start = time.perf_counter()
        with requests.Session() as session:
            session.headers.update(AGENT)
            url: str | None = f"{civitai.url}/models?limit=100&sort=Newest&nsfw=true"
            seen = 0
            while url:
                answer = session.get(url, timeout=10).json()
                seen += len(answer["items"])
                url = answer["metadata"].get("nextPage")
            speed = seen / (time.perf_counter() - start)
            assert seen == 10_000
            assert len(civitai.requests) == 50
            civitai.close()
            with pytest.raises(requests.ConnectionError):
                session.get(f"{civitai.url}/models", timeout=10)
    assert speed > 1000  # about 10,000 alone on a core


def test_same_tensors_with_other_metadata() -> None:
    content = with_metadata(tiny_lora(1), {"a": "b"})
    assert split_header(content)[1] == split_header(tiny_lora(1))[1]
    assert served(SimFile(1, "x", content)) is content


# The hub


@pytest.fixture
def api_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    set_client_factory(default_client_factory)  # the hub's own, also after lora-audit has fetched a base with another
    yield lambda hub, token=False: HfApi(endpoint=hub.url, token=token)
    close_session()


def test_list_models_over_three_pages(api_of: Any) -> None:
    with Hub.serve(page_size=2) as hub:
        for i in range(5):
            modified = f"2026-01-0{i + 1}T00:00:00.000Z"
            card = {"base_model": "org/base", "instance_prompt": "sks"}
            hub.publish(f"jane/l{i}", COMMIT, {"a.safetensors": b"1"}, last_modified=modified, tags=["lora"], card=card)
        hub.publish("john/other", COMMIT, {}, tags=["dora"])
        hub.publish("jane/secret", COMMIT, {}, tags=["lora"], private=True)
        expand = ["author", "sha", "lastModified", "siblings", "cardData"]
        api = api_of(hub)
        found = list(api.list_models(filter="lora", sort="last_modified", expand=expand))
        assert [model.id for model in found] == [f"jane/l{i}" for i in (4, 3, 2, 1, 0)]
        assert hub.counts["models"] == 3
        model = found[0]
        assert (model.author, model.sha, model.likes, model.last_modified.day) == ("jane", COMMIT, None, 5)
        assert [sibling.rfilename for sibling in model.siblings] == ["README.md", "a.safetensors"]
        assert model.card_data.instance_prompt == "sks"
        assert [model.id for model in api.list_models(author="john")] == ["john/other"]
        assert [model.id for model in api.list_models(search="L3", full=True)] == ["jane/l3"]


def test_a_file_is_downloaded_through_the_cdn(api_of: Any, tmp_path: Path) -> None:
    data = tiny_lora(1, {"ss_network_dim": "2"})
    with Hub.serve(token="hf_right") as hub:
        hub.publish("jane/lora", OTHER, {"old.txt": b"old"})
        hub.publish(
            "jane/lora", COMMIT, {"sub/a.safetensors": data, "model.safetensors": data}, card={"tags": ["lora"]}
        )
        api = api_of(hub, "hf_right")
        assert api.model_info("jane/lora").sha == COMMIT
        assert api.model_info("jane/lora", revision=OTHER).siblings[0].rfilename == "old.txt"
        path = api.hf_hub_download("jane/lora", "sub/a.safetensors", revision=COMMIT, local_dir=tmp_path)
        assert Path(path).read_bytes() == data
        assert (hub.counts["cdn"], hub.counts["cdn-with-authorization"]) == (1, 0)
        readme = Path(api.hf_hub_download("jane/lora", "README.md")).read_text()
        assert readme == '---\ntags: ["lora"]\n---\n'
        header = api.parse_safetensors_file_metadata("jane/lora", "sub/a.safetensors", revision=COMMIT)
        assert header.metadata == {"ss_network_dim": "2"}
        assert not api.get_safetensors_metadata("jane/lora").sharded
        part = get(f"{hub.url}/jane/lora/resolve/main/README.md", {"Range": "bytes=1-2"})
        assert (part.status_code, part.content) == (206, b"--")
        direct = get(f"{hub.url}/jane/lora/resolve/main/model.safetensors")
        assert (direct.status_code, direct.headers["X-Linked-Size"]) == (302, str(len(data)))
        assert get(direct.headers["Location"], {"Authorization": "Bearer hf_right"}).status_code == 400


def test_paths_info_and_tree(api_of: Any) -> None:
    with Hub.serve() as hub:
        files = {"a.safetensors": b"weights", "b/c.txt": b"text"}
        hub.publish("jane/lora", COMMIT, files, security={"a.safetensors": "unsafe"})
        api = api_of(hub)
        weights, text = api.get_paths_info("jane/lora", ["a.safetensors", "b/c.txt", "none"], expand=True)
        assert (weights.security.status, weights.security.safe, text.security.status) == ("unsafe", False, "safe")
        assert weights.lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
        assert weights.last_commit.oid == COMMIT
        assert api.get_paths_info("jane/lora", "a.safetensors")[0].security is None
        assert [entry.path for entry in api.list_repo_tree("jane/lora")] == ["a.safetensors", "b"]
        assert [entry.path for entry in api.list_repo_tree("jane/lora", recursive=True)] == ["a.safetensors", "b/c.txt"]
        assert api.model_info("jane/lora", files_metadata=True).siblings[0].lfs.size == 7
        assert api.model_info("jane/lora", securityStatus=True).security_repo_status["filesWithIssues"]


def test_gated_private_and_missing_repositories(api_of: Any) -> None:
    with Hub.serve(token="hf_right") as hub:
        hub.publish("jane/gated", COMMIT, {"a.txt": b"a"}, gated="manual", token_users=["hf_jane"])
        hub.publish("jane/private", COMMIT, {"a.txt": b"a"}, private=True)
        assert api_of(hub).model_info("jane/gated").gated == "manual"
        for token, status in ((False, 401), ("hf_right", 403)):
            with pytest.raises(GatedRepoError) as caught:
                api_of(hub, token).hf_hub_download("jane/gated", "a.txt")
            assert caught.value.response.status_code == status
        assert api_of(hub, "hf_jane").hf_hub_download("jane/gated", "a.txt")
        for name in ("jane/private", "jane/none"):
            with pytest.raises(RepositoryNotFoundError):
                api_of(hub).model_info(name)
        assert api_of(hub, "hf_right").model_info("jane/private").private
        assert {model.id for model in api_of(hub, "hf_right").list_models()} == {"jane/gated", "jane/private"}
        with pytest.raises(RemoteEntryNotFoundError):
            api_of(hub, "hf_right").hf_hub_download("jane/private", "b.txt")
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as wrong:
            api_of(hub, "hf_wrong").model_info("jane/gated")
        assert wrong.value.response.status_code == 401
        hub.remove("jane/private")
        with pytest.raises(RepositoryNotFoundError):
            api_of(hub, "hf_right").model_info("jane/private")


def test_rate_limits_are_waited_for_in_listings_only(api_of: Any) -> None:
    with Hub.serve(burst_429_every=1) as hub:
        hub.publish("jane/lora", COMMIT, {})
        api, start = api_of(hub), time.perf_counter()
        api.model_info("jane/lora")
        assert len(list(api.list_models())) == 1
        assert time.perf_counter() - start > 1.5  # RateLimit's t=1, and one more second
        with pytest.raises(HfHubHTTPError, match="429"):
            api.model_info("jane/lora")
        assert hub.counts["429"] == 2
        assert json.dumps(hub.requests[-1]) == '"/api/models/jane/lora"'
