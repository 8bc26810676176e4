"""The Hugging Face crawler against a simulator of the hub."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from audit.errors import CrawlError, FetchError
from audit.models.checkpoint import open_checkpoint
from audit.models.inspect import inspect
from audit.upkeep.damage import verify
from audit.workspace import Workspace
from crawlers import http
from crawlers.catalog import Catalog
from crawlers.crawl import Counts, Crawl
from crawlers.http import Token
from crawlers.sources import huggingface
from crawlers.sources.huggingface import HuggingFace, HuggingFaceQuery, is_path, reference_of
from tests.conftest import stored_bytes
from tests.simulators.civitai import tiny_lora
from tests.simulators.hub import Hub

CARD = {
    "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "instance_prompt": "a photo of sks dog",
    "widget": [{"text": "sks dog in a bucket", "output": {"url": "image_0.png"}}, "not an object"],
    "license": "creativeml-openrail-m",
}  # fmt: skip
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.PatientRetry, "unit", 0.01)


def commit(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


def publish(hub: Hub, number: int, **options: Any) -> bytes:
    content = options.pop("content", None) or tiny_lora(number)
    files = options.pop("files", None) or {WEIGHTS: content}
    day = f"2026-03-{1 + number % 28:02d}T00:00:{number // 28:02d}.000Z"
    hub.publish(
        f"user{number % 3}/lora-{number}", options.pop("commit", commit(number)), files,
        last_modified=options.pop("last_modified", day), tags=options.pop("tags", ["lora", "diffusers"]),
        card=options.pop("card", CARD), **options,
    )  # fmt: skip
    return content


def source(hub: Hub, catalog: Catalog, token: str | None = None, **query: Any) -> HuggingFace:
    key = Token(token) if token else None
    return HuggingFace(catalog, HuggingFaceQuery(**query), hub.url, key, requests_per_second=0)


def crawl(hub: Hub, workspace: Workspace, download: bool = True, limit: int | None = None, **options: Any) -> Counts:
    catalog = Catalog(workspace)
    return Crawl(source(hub, catalog, **options), catalog, download, limit).run()


def rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    return {row["item_id"]: row for row in workspace.rows("SELECT * FROM checkpoints")}


def test_files_arrive_with_what_the_card_says(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        content = publish(hub, 1)
        publish(hub, 2, tags=["text-generation"])
        assert crawl(hub, workspace).states == {"stored": 1}
        assert hub.counts["cdn-with-authorization"] == 0
        page = f"{hub.url.rstrip('/')}/user1/lora-1"
    [row] = rows(workspace).values()
    assert (row["item_id"], row["version_id"]) == (f"huggingface:user1/lora-1:{WEIGHTS}", commit(1))
    assert row["checkpoint_sha256"] == row["claimed_sha256"] == hashlib.sha256(content).hexdigest()
    assert (row["uploader"], row["license"], row["page_url"]) == ("user1", "creativeml-openrail-m", page)
    assert (row["base_model"], row["base_model_source"], row["family"]) == (CARD["base_model"], "base_model", "sd1")
    found = workspace.rows("SELECT caption, source FROM captions ORDER BY rank")
    assert found == [
        {"caption": "a photo of sks dog", "source": "instance_prompt"},
        {"caption": "sks dog in a bucket", "source": "widget"},
    ]  # fmt: skip
    assert stored_bytes(workspace, row["identity"]) == content


def test_pages_bursts_and_a_second_run(workspace: Workspace) -> None:
    with Hub.serve(page_size=40, burst_429_every=25) as hub:
        for number in range(150):
            publish(hub, number, content=tiny_lora(0))
        first = crawl(hub, workspace, download=False)
        assert hub.counts["429"] > 0
        assert (first.states, len(rows(workspace))) == ({"listed": 150}, 150)
        asked = hub.counts["paths-info"]
        again = crawl(hub, workspace, download=False)
        assert (again.new, hub.counts["paths-info"]) == (0, asked)
        publish(hub, 200, last_modified="2026-04-01T00:00:00.000Z")
        third = crawl(hub, workspace, download=False)
        assert (third.new, third.items < 20) == (1, True)


def test_a_page_that_fails_for_ever_does_not_end_the_crawl(workspace: Workspace) -> None:
    with Hub.serve(page_size=10) as hub:
        for number in range(60):
            publish(hub, number, content=tiny_lora(0))
        hub.broken = {"lastModified": ("user0/lora-30", 400)}
        counts = crawl(hub, workspace, download=False)
        assert hub.counts["broken-page"] > 0
        assert (len(rows(workspace)), counts.passed_over) == (60, 1)
        assert "the listing by last_modified ends early (HTTP 400" in next(iter(counts.reasons))
        [state] = [json.loads(path.read_text())["state"] for path in (workspace.root / "crawls").iterdir()]
        assert "last_modified" in state["passed_over"][0]["what"]
        assert state["complete_until"].startswith("2026-03-28")
        hub.broken = {"lastModified": ("user0/lora-27", 400)}  # on the first page
        with pytest.raises(CrawlError, match="HTTP 400"):
            crawl(hub, Workspace(workspace.root.parent / "other"), download=False)


def test_an_interrupted_crawl_loses_nothing_and_asks_nothing_twice(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        for number in range(120):
            publish(hub, number, content=tiny_lora(0))
        crawl(hub, workspace, download=False, limit=50)
        assert (len(rows(workspace)), hub.counts["paths-info"]) == (50, 50)
        crawl(hub, workspace, download=False)
        assert (len(rows(workspace)), hub.counts["paths-info"]) == (120, 120)


def test_a_new_commit_fetches_only_a_changed_file(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        content = publish(hub, 1)
        crawl(hub, workspace)
        publish(hub, 1, content=content, commit=commit(77), last_modified="2026-05-01T00:00:00.000Z")
        fetched = hub.counts["cdn"]
        crawl(hub, workspace)
        [row] = rows(workspace).values()
        assert (row["version_id"], row["state"], hub.counts["cdn"]) == (commit(77), "stored", fetched)
        publish(hub, 1, content=tiny_lora(5), commit=commit(78), last_modified="2026-05-02T00:00:00.000Z")
        crawl(hub, workspace)
        [row] = rows(workspace).values()
        assert row["checkpoint_sha256"] == hashlib.sha256(tiny_lora(5)).hexdigest()


def test_gated_and_private_and_unsafe_are_clear_records(workspace: Workspace) -> None:
    with Hub.serve(token="hf_good") as hub:
        publish(hub, 1, gated="manual", token_users=["hf_good"])
        publish(hub, 2, security={WEIGHTS: "unsafe"})
        publish(hub, 3)
        crawl(hub, workspace)
        found = {key.split(":")[1]: row for key, row in rows(workspace).items()}
        assert found["user1/lora-1"]["state"] == "failed"
        assert "ask for access on its page" in found["user1/lora-1"]["reason"]
        assert (found["user2/lora-2"]["state"], found["user0/lora-3"]["state"]) == ("refused", "stored")
        catalog = Catalog(workspace)
        items = catalog.items([found["user1/lora-1"]])
        assert Crawl(source(hub, catalog, "hf_good"), catalog).take(items, again=True).states == {"stored": 1}
    for path in workspace.root.rglob("*"):
        assert not path.is_file() or b"hf_good" not in path.read_bytes()


def test_pickles_are_named_and_never_fetched(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        publish(hub, 1, files={"pytorch_lora_weights.bin": b"\x80\x04"})
        publish(hub, 2, files={WEIGHTS: b"PK\x03\x04" + b"\0" * 200})
        assert crawl(hub, workspace).states == {"refused": 2}
        assert hub.counts["resolve"] == 1
    assert not list((workspace.root / "checkpoints").glob("*.safetensors"))


def test_several_files_of_one_model_are_items_of_their_own(workspace: Workspace) -> None:
    files = {f"step-{number}/x.safetensors": tiny_lora(number) for number in range(12)} | {WEIGHTS: tiny_lora(99)}
    with Hub.serve() as hub:
        publish(hub, 1, files=files)
        assert crawl(hub, workspace).states == {"stored": 13}
    assert f"huggingface:user1/lora-1:{WEIGHTS}" in rows(workspace)


ODD_NAMES = [
    "style #1.safetensors", "100%.safetensors", "a%20b.safetensors", "what?.safetensors", "a&b=c;d+e.safetensors",
    "one/two/three/four/five/six/seven.safetensors", ".hidden/\u00fcber \u732b.safetensors", "colon: x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_arrive_whatever_their_names(workspace: Workspace, name: str) -> None:
    with Hub.serve() as hub:
        publish(hub, 1, files={name: tiny_lora(1)})
        assert crawl(hub, workspace).states == {"stored": 1}
        catalog = Catalog(workspace)
        assert crawl(hub, workspace).new == 0
        asked = Crawl(source(hub, catalog), catalog, False).refresh(catalog.find().to_pylist())
        assert asked.states == {}
    [row] = rows(workspace).values()
    assert row["item_id"] == f"huggingface:user1/lora-1:{name}"
    assert row["checkpoint_sha256"] == hashlib.sha256(tiny_lora(1)).hexdigest()
    assert catalog.entry(row["item_id"]).path.is_file()


@pytest.mark.parametrize("name", ["", "a//b", "../x", "a/./b", "a\nb", "x" * 1001, "/etc/x", "a\u202eb"])
def test_paths_that_are_none_are_passed_over(name: str) -> None:
    assert not is_path(name)


def test_deleted_models_are_marked_and_kept(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        publish(hub, 1)
        publish(hub, 2)
        crawl(hub, workspace)
        hub.remove("user1/lora-1")
        catalog = Catalog(workspace)
        found = catalog.find("source = 'huggingface'").to_pylist()
        Crawl(source(hub, catalog), catalog, False).refresh(found)
    states = {row["model_id"]: row["state"] for row in rows(workspace).values()}
    assert states == {"user1/lora-1": "gone", "user2/lora-2": "stored"}


def test_queries_reach_the_hub(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        for number in range(6):
            publish(hub, number)
        since = datetime(2026, 3, 4, tzinfo=UTC)
        crawl(hub, workspace, download=False, author="user1", since=since)
    assert {row["model_id"] for row in rows(workspace).values()} == {"user1/lora-4"}


def test_a_wrong_token_and_a_hub_that_is_away_stop_the_crawl(workspace: Workspace) -> None:
    with Hub.serve(token="hf_good") as hub:
        publish(hub, 1)
        with pytest.raises(CrawlError, match="401") as caught:
            crawl(hub, workspace, token="hf_wr0ng")
        assert "wr0ng" not in str(caught.value)
    catalog = Catalog(workspace)
    with pytest.raises(FetchError, match="cannot be had"):
        source(hub, catalog).one("user1/lora-1")


def test_references_people_paste() -> None:
    sha = commit(1)
    assert reference_of("https://huggingface.co/o/n") == {"model_id": "o/n"}
    assert reference_of(f"https://huggingface.co/o/n/tree/{sha}") == {"model_id": "o/n", "revision": sha}
    assert reference_of(f"o/n@{sha}") == {"model_id": "o/n", "revision": sha}
    assert reference_of("o/n") == {"model_id": "o/n"}
    for text in ("https://evil.example/o/n", "just-a-name", "", "a/b/c", "../etc/passwd"):
        assert reference_of(text) is None


def test_an_endpoint_must_be_a_url(workspace: Workspace) -> None:
    for endpoint in ("hub", "http://hub.example", "https://user@hub.example"):
        with pytest.raises(CrawlError):
            HuggingFace(Catalog(workspace), endpoint=endpoint)


def test_a_broken_card_costs_only_its_claims(workspace: Workspace, tmp_path: Path) -> None:
    card = {"base_model": 5, "instance_prompt": ["x"], "widget": "text", "license": {"a": 1}}
    with Hub.serve() as hub:
        publish(hub, 1, card=card)
        assert crawl(hub, workspace).states == {"stored": 1}
    [row] = rows(workspace).values()
    assert (row["base_model"], row["family_source"]) == (None, "shapes")


def peft_lora(rank: int = 4, seed: int = 0) -> bytes:
    """An adapter as PEFT saves it: its alpha is in no tensor."""
    random = np.random.default_rng(seed)
    stem = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    sides = {"lora_A": random.standard_normal((rank, 64)), "lora_B": random.standard_normal((64, rank))}
    return save({f"{stem}.{side}.weight": values.astype(np.float16) for side, values in sides.items()})


def configuration(rank: int, alpha: int) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["to_q"]}).encode()


def test_the_configuration_of_a_peft_file_comes_with_it(workspace: Workspace) -> None:
    files = {
        "adapter_model.safetensors": peft_lora(), "adapter_config.json": configuration(4, 16),
        "step-100/adapter_model.safetensors": peft_lora(seed=1), "step-100/adapter_config.json": configuration(4, 4),
        "bare/adapter_model.safetensors": peft_lora(seed=2),
    }  # fmt: skip
    with Hub.serve() as hub:
        publish(hub, 1, files=files)
        assert crawl(hub, workspace).states == {"stored": 3}
    store, found = Catalog(workspace).store, {}
    for item_id, row in rows(workspace).items():
        path = store.fetch(row["identity"])
        assert path is not None
        checkpoint = open_checkpoint(path)
        assert checkpoint.identity == row["identity"]  # as whoever audits it sees it
        found[item_id.split(":", 2)[2]] = inspect(path).alphas
    assert found == {
        "adapter_model.safetensors": {16.0: 1}, "step-100/adapter_model.safetensors": {4.0: 1},
        "bare/adapter_model.safetensors": {},
    }  # fmt: skip
    assert [one for one in verify(workspace) if "checkpoints/" in one.where] == []
    for row in rows(workspace).values():
        store.remove(row["identity"])
    assert list((workspace.root / "checkpoints").glob("*.json")) == []


@pytest.mark.parametrize(
    ("config", "reason"), [(b"{", "adapter_config.json"), (b" " * (1 << 20) + b" {}", "answers more than")]
)
def test_a_configuration_that_cannot_be_read_refuses_its_file(workspace: Workspace, config: bytes, reason: str) -> None:
    with Hub.serve() as hub:
        publish(hub, 1, files={"adapter_model.safetensors": peft_lora(), "adapter_config.json": config})
        assert crawl(hub, workspace).states == {"refused": 1}
    [row] = rows(workspace).values()
    assert reason in row["reason"]
    assert row["identity"] is None


def test_every_adapter_of_a_repository_is_an_item(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"styles/{number:02d}.safetensors": tiny_lora(number) for number in range(12)}
    with Hub.serve() as hub:
        publish(hub, 1, files=files)
        assert crawl(hub, workspace).states == {"stored": 12}
        monkeypatch.setattr(huggingface, "FILES_A_MODEL", 10)
        publish(hub, 2, files=files)
        counts = crawl(hub, workspace)
        assert counts.states == {"stored": 10}
        assert "huggingface model user2/lora-2: 2 of its files are passed over" in counts.reasons


def test_a_gguf_file_that_is_none_is_refused(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        publish(hub, 1, files={"lora-q8.gguf": b"GGUF" + bytes(100)})
        assert crawl(hub, workspace).states == {"refused": 1}
    [row] = rows(workspace).values()
    assert "is a GGUF file of version 0" in row["reason"]
