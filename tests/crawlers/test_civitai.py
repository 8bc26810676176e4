"""The Civitai crawler against a simulator with the real one's quirks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.errors import CrawlError
from audit.schemas import CHECKPOINTS
from audit.workspace import Workspace
from crawlers import civitai_items, http
from crawlers.catalog import Catalog, Outcome
from crawlers.crawl import Counts, Crawl, estimate
from crawlers.http import Token
from crawlers.sources.civitai import Civitai, CivitaiQuery, prompts_of, reference_of
from tests.conftest import stored_bytes
from tests.crawlers.test_training_data import packed, png
from tests.simulators.civitai import Civitai as Site
from tests.simulators.civitai import Fault, SimFile, SimModel, SimVersion, make_models, tiny_lora


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.PatientRetry, "unit", 0.01)


def source(site: Site, catalog: Catalog, token: str | None = "secret-token", **options: Any) -> Civitai:
    query = options.pop("query", CivitaiQuery(nsfw=True))
    return Civitai(catalog, query, site.url, Token(token) if token else None, requests_per_second=0, **options)


def crawl(site: Site, workspace: Workspace, download: bool = True, limit: int | None = None, **options: Any) -> Counts:
    catalog = Catalog(workspace)
    return Crawl(source(site, catalog, **options), catalog, download, limit).run()


def table(workspace: Workspace) -> list[dict[str, Any]]:
    return workspace.rows("SELECT * EXCLUDE (first_seen_at, seen_at) FROM checkpoints ORDER BY item_id")


def captions(workspace: Workspace) -> list[dict[str, Any]]:
    return workspace.rows("SELECT * EXCLUDE (seen_at) FROM captions ORDER BY ALL")


def one(fault: Fault = Fault.none, content: bytes | None = None, **options: Any) -> SimModel:
    name = options.pop("file_name", "a.safetensors")
    file = SimFile(31, name, content or tiny_lora(7), fault=fault, **options)
    version = SimVersion(21, "v1", "SD 1.5", ["sks style"], [file], [], "2026-05-01T00:00:00.000Z")
    return SimModel(11, "One", "LORA", "jane", ["style"], description="<p>Trained on 23 images</p>", versions=[version])


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(make_models(250, files=False)) as running:
        yield running


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Site]]:
    """Two names of one site; the first links to the second's downloads."""
    with Site([one()]) as first, Site([one()]) as second:
        first._api_server.url = second._api_server.url
        monkeypatch.setattr(
            civitai_items, "TWINS", frozenset({urlsplit(first.url).netloc, urlsplit(second.url).netloc})
        )
        yield first, second


def test_twin_hosts_are_one_source(workspace: Workspace, twins: tuple[Site, Site]) -> None:
    first, second = twins
    assert crawl(first, workspace).states == {"stored": 1}
    assert (first.counts["download"], second.counts["download"]) == (0, 1)
    assert crawl(second, workspace).new == 0
    [row] = table(workspace)
    assert row["page_url"].startswith(first.url.removesuffix("/api/v1"))


def test_what_one_twin_does_not_show_is_not_gone(workspace: Workspace, twins: tuple[Site, Site]) -> None:
    first, second = twins
    catalog = Catalog(workspace)
    crawl(second, workspace, download=False)
    first.remove(11)
    rows = catalog.find().to_pylist()
    assert Crawl(source(first, catalog), catalog, False).refresh(rows).states == {}
    assert first.counts["model"] == 0  # it was seen at the second, which is asked first
    assert [item.item_id for item in source(first, catalog).one(version_id="21")] == ["civitai:11:21:31"]
    second.remove(11)
    assert Crawl(source(first, catalog), catalog, False).refresh(rows).states == {"gone": 1}


def test_everything_is_listed_once_in_spite_of_the_quirks(workspace: Workspace, tmp_path: Path) -> None:
    models = make_models(250, files=False)
    quirks = {"empty_page_every": 3, "burst_429_every": 2, "error_500_every": 5, "repeat_at_border": True}
    with Site(models, **quirks) as site:
        counts = crawl(site, workspace, download=False)
        assert site.counts["429"] > 0
        assert site.counts["forbidden"] == 0
    files = {f"civitai:{m.id}:{v.id}:{f.id}" for m in models for v in m.versions for f in v.files if f.type == "Model"}
    assert {row["item_id"] for row in table(workspace)} == files
    assert counts.states == {"listed": len(files)}


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("place", [0, 4, 130, 249])
def test_a_page_that_fails_for_ever_is_passed_over_and_named(workspace: Workspace, status: int, place: int) -> None:
    models = make_models(250, files=False)
    newest = sorted(models, key=lambda model: max(v.published_at for v in model.versions), reverse=True)
    with Site(models) as site:
        site.broken_models = {newest[place].id: status}
        counts = crawl(site, workspace, download=False, retries=1)
        listed = {int(row["model_id"]) for row in table(workspace)}
        missing = {model.id for model in models} - listed
        assert newest[place].id in missing
        assert len(missing) <= 10
        assert counts.passed_over >= 1
        assert f"HTTP {status}" in next(iter(counts.reasons))
        [state] = [json.loads(path.read_text())["state"] for path in (workspace.root / "crawls").iterdir()]
        assert state["complete"]
        assert f"HTTP {status}" in state["passed_over"][0]["what"]
        site.broken_models = {}
        catalog = Catalog(workspace)
        assert Crawl(source(site, catalog), catalog, False, restart=True).run().new >= 1
        assert len({row["model_id"] for row in table(workspace)}) == 250


def test_a_query_that_always_fails_ends_the_crawl(workspace: Workspace) -> None:
    models = make_models(250, files=False)
    with Site(models) as site:
        site.broken_models = {model.id: 400 for model in models}
        with pytest.raises(CrawlError, match="HTTP 400"):
            crawl(site, workspace, download=False)
        assert site.counts["models"] == 3


def test_rows_say_what_the_source_says(workspace: Workspace) -> None:
    with Site([one()]) as site:
        crawl(site, workspace)
        address = site.url.removesuffix("/api/v1")
    [row] = table(workspace)
    content = tiny_lora(7)
    assert row | {
        "item_id": "civitai:11:21:31", "source": "civitai", "model_id": "11", "version_id": "21",
        "name": "a.safetensors", "title": "One - v1", "page_url": f"{address}/models/11?modelVersionId=21",
        "uploader": "jane", "tags": ["style"],
        "family": "sd1", "family_source": "shapes", "base_model": "SD 1.5", "base_model_source": "baseModel",
        "training_images": 23, "training_images_source": "description", "state": "stored", "reason": None,
        "checkpoint_sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "contradictions": [],
    } == row  # fmt: skip
    assert captions(workspace) == [
        {"item_id": "civitai:11:21:31", "rank": 1, "caption": "sks style", "source": "trainedWords", "confidence": 0.8}
    ]
    assert stored_bytes(workspace, row["identity"]) == content


GOOD = {
    Fault.none: None, Fault.missing_sha256: None, Fault.drops_halfway: None, Fault.link_expires: None,
    Fault.ignores_range: None, Fault.corrupt_once: None, Fault.gzipped: None, Fault.gzipped_range: None,
    Fault.rewritten_header: "header was rewritten",
    Fault.wrong_sha256: "right tensor hash",
}  # fmt: skip
BAD = {
    Fault.pickle: ("refused", "pickle"), Fault.disguised_pickle: ("refused", "zip archive|pickle"),
    Fault.bad_header: ("refused", "truncated|damaged|overlaps"), Fault.huge_header: ("refused", "header of"),
    Fault.truncated: ("refused", "truncated"), Fault.html: ("refused", "web page"), Fault.not_found: ("gone", "404"),
    Fault.server_error: ("failed", "500"), Fault.too_big: ("refused", "limit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", GOOD)
def test_good_files_arrive_whole_in_spite_of_faults(workspace: Workspace, fault: Fault) -> None:
    content = tiny_lora(7, {"padding": "x" * 3_000_000})  # several pieces
    with Site([one(fault, content)]) as site:
        counts = crawl(site, workspace)
        assert site.counts["store-with-authorization"] == 0
    [row] = table(workspace)
    assert (row["state"], counts.states) == ("stored", {"stored": 1}), row["reason"]
    assert row["tensors_sha256"] == hashlib.sha256(_tensors(content)).hexdigest()
    stored = stored_bytes(workspace, row["identity"])
    assert row["checkpoint_sha256"] == hashlib.sha256(stored).hexdigest()
    assert _tensors(stored) == _tensors(content)
    assert (GOOD[fault] or "") in (row["reason"] or "")
    assert (row["reason"] is None) == (GOOD[fault] is None)
    assert not list((workspace.root / "checkpoints/parts").iterdir())


def _tensors(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.parametrize("fault", BAD)
def test_bad_files_are_recorded_with_the_reason(workspace: Workspace, fault: Fault) -> None:
    names = {"file_name": "a.ckpt", "format": "PickleTensor"} if fault is Fault.pickle else {}
    with Site([one(fault, **names)]) as site:
        crawl(site, workspace, retries=1)
        if fault is Fault.pickle:
            assert site.counts["download"] == 0
    [row] = table(workspace)
    state, words = BAD[fault]
    assert row["state"] == state, row["reason"]
    assert any(word in row["reason"] for word in words.split("|")), row["reason"]
    assert row["identity"] is None
    assert not list((workspace.root / "checkpoints").glob("*.safetensors"))


def test_a_wrong_hash_without_another_to_go_by_needs_a_second_download(workspace: Workspace) -> None:
    catalog = Catalog(workspace)
    with Site([one()]) as site:
        api = source(site, catalog)
        [item] = api.one(model_id="11")
        wrong = replace(item, claimed_sha256="ab" * 32, claimed_autov3=None)
        assert Crawl(api, catalog).take([wrong]).states == {"stored": 1}
        assert site.counts["download"] == 2
    assert "arrived the same twice" in table(workspace)[0]["reason"]


def test_every_fault_is_tested() -> None:
    assert set(GOOD) | set(BAD) == set(Fault)


def test_a_download_goes_on_where_a_killed_one_stopped(workspace: Workspace) -> None:
    content = tiny_lora(7, {"padding": "x" * 3_000_000})
    catalog = Catalog(workspace)
    with Site([one(content=content)]) as site:
        api = source(site, catalog)
        [item] = api.one(model_id="11")
        catalog.store.part(item).write_bytes(content[:1_000_000])
        assert Crawl(api, catalog).take([item]).bytes == len(content) - 1_000_000
        [row] = table(workspace)
        assert row["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()
    workspace.remove("checkpoints", workspace.keys("checkpoints")[0])
    catalog.store.remove(row["identity"])
    with Site([one(content=content)]) as site:  # complete but not yet moved: the server says 416
        api = source(site, catalog)
        [item] = api.one(model_id="11")
        catalog.store.part(item).write_bytes(content)
        assert Crawl(api, catalog).take([item]).bytes == 0
    assert table(workspace)[0]["state"] == "stored"


@pytest.mark.parametrize("field", ["earlyAccessEndsAt", "earlyAccessDeadline", "deadline"])
def test_early_access_is_later_with_its_date_and_taken_then(
    workspace: Workspace, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = one()
    version = model.versions[0]
    version.names_the_date = field
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    version.early_access_until = until.isoformat()
    with Site([model]) as site:
        assert crawl(site, workspace).states == {"later": 1}
        [row] = table(workspace)
        assert (row["state"], row["available_at"], row["attempts"]) == ("later", until, 0)
        assert f"early access until {until:%Y-%m-%d %H:%M} UTC" in row["reason"]
        assert "token" not in row["reason"]
        crawl(site, workspace)
        assert site.counts["early"] == 1  # it is left alone until then
        past = datetime.now(UTC) - timedelta(seconds=1)
        version.early_access_until = past.isoformat()
        known = workspace.rows("SELECT * FROM checkpoints")
        workspace.append("checkpoints", [known[0] | {"available_at": past, "seen_at": datetime.now(UTC)}])
        assert crawl(site, workspace).states == {"stored": 1}
    assert table(workspace)[0]["state"] == "stored"


def test_a_bad_token_stays_a_bad_token(workspace: Workspace) -> None:
    model = one()
    with Site([model], token="another-token") as site:
        catalog = Catalog(workspace)
        item = Civitai(catalog, endpoint=site.url)._items(site._model(model), "civitai.com")[0]
        [(_, outcome)] = [(item, Crawl(source(site, catalog), catalog).fetch_one(item, lambda n: None))]
    assert (outcome.state, "token" in (outcome.reason or "")) == ("failed", True)


def test_without_a_token_the_reason_says_so(workspace: Workspace) -> None:
    with Site([one()]) as site:
        crawl(site, workspace, token=None)
    [row] = table(workspace)
    assert (row["state"], row["attempts"]) == ("failed", 1)
    assert "token" in row["reason"]


def test_a_wrong_token_stops_the_crawl_and_is_not_shown(workspace: Workspace) -> None:
    with Site([one()]) as site, pytest.raises(CrawlError, match="token") as caught:
        crawl(site, workspace, token="wr0ng")
    assert "wr0ng" not in str(caught.value)


def test_no_token_is_stored_anywhere(workspace: Workspace) -> None:
    with Site(make_models(12)) as site:
        crawl(site, workspace)
    for path in workspace.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"secret-token" not in content
            assert b"X-Amz-Signature" not in content


def test_a_second_run_asks_for_one_page_and_takes_only_what_is_new(site: Site, workspace: Workspace) -> None:
    first = crawl(site, workspace, download=False)
    before = table(workspace)
    again = crawl(site, workspace, download=False)
    assert first.pages > 2
    assert (again.pages, again.new) == (1, 0)
    newer = one()
    newer.versions[0].published_at = "2027-01-01T00:00:00.000Z"
    site.add(replace(newer, id=9999))
    third = crawl(site, workspace, download=False)
    assert (third.new, third.states) == (1, {"listed": 1})
    assert len(table(workspace)) == len(before) + 1


def test_an_interrupted_crawl_goes_on_at_its_page(site: Site, workspace: Workspace, tmp_path: Path) -> None:
    catalog = Catalog(workspace)
    running = Crawl(source(site, catalog), catalog, False)

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done > 200:
            raise Stopped

    running.progress = stop
    with pytest.raises(Stopped):
        running.run()
    listed = site.counts["models"]
    crawl(site, workspace, download=False)
    whole = Workspace(tmp_path / "whole")
    counts = crawl(site, whole, download=False)
    assert table(workspace) == table(whole)
    assert captions(workspace) == captions(whole)
    assert site.counts["models"] <= listed + counts.pages + counts.pages - 1 + 1


def test_metadata_first_files_later(workspace: Workspace) -> None:
    with Site(make_models(12)) as site:
        crawl(site, workspace, download=False)
        listed = captions(workspace)
        assert {row["state"] for row in table(workspace)} == {"listed"}
        crawl(site, workspace)
        after = table(workspace)
        other = Workspace(workspace.root.parent / "other")
        crawl(site, other)
    assert {row["state"] for row in after} == {"stored"}
    assert after == table(other)
    assert captions(workspace) == captions(other)
    assert listed


def test_a_limit_is_kept_and_the_next_run_goes_on(site: Site, workspace: Workspace) -> None:
    assert crawl(site, workspace, download=False, limit=30).new == 30
    assert crawl(site, workspace, download=False, limit=30).new == 30
    assert len(table(workspace)) == 60


def test_what_is_taken_down_archived_or_deleted_is_marked_and_kept(workspace: Workspace) -> None:
    models = make_models(6)
    with Site(models) as site:
        crawl(site, workspace)
        site.take_down(models[0].id)
        site.archive(models[1].id)
        site.remove(models[2].id)
        crawl(site, workspace)
        catalog = Catalog(workspace)
        rows = catalog.find("source = 'civitai'").to_pylist()
        Crawl(source(site, catalog), catalog, False).refresh(rows)
    found = {row["model_id"]: row for row in table(workspace)}
    for model, words in zip(models, ("taken down", "archived", "deleted"), strict=False):
        row = found[str(model.id)]
        assert (row["state"], words in row["reason"]) == ("gone", True)
        assert catalog.store.fetch(row["identity"])
    assert {found[str(model.id)]["state"] for model in models[3:]} == {"stored"}


def test_a_refresh_asks_the_longest_unasked_first_and_reaches_all(workspace: Workspace) -> None:
    models = [replace(one(), id=number, versions=[replace(one().versions[0], id=number, files=[SimFile(
        number, "a.safetensors", tiny_lora(number))])]) for number in range(1, 8)]  # fmt: skip
    catalog = Catalog(workspace)
    with Site(models) as site:
        crawl(site, workspace, download=False)
        workspace.append("checkpoints", [{"item_id": "folder:a:b", "source": "folder", "state": "stored",
                                          "seen_at": datetime(2020, 1, 1, tzinfo=UTC)}])  # fmt: skip
        site.remove(4)
        asked: list[str] = []
        for _ in range(4):
            site.requests.clear()
            Crawl(source(site, catalog), catalog, False).refresh(
                catalog.longest_unasked("TRUE", 2, ["civitai"]).to_pylist()
            )
            asked += [seen.path.rpartition("/")[2] for seen in site.requests]
    assert sorted(asked[:7]) == list("1234567")  # none twice before all were asked
    assert asked[7:] == asked[:1] or len(asked) == 7
    assert workspace.rows("SELECT item_id FROM checkpoints WHERE state = 'gone'") == [{"item_id": "civitai:4:4:4"}]


def test_a_model_that_always_fails_does_not_end_a_refresh_and_a_source_that_is_away_does(
    workspace: Workspace,
) -> None:
    models = [replace(one(), id=number, versions=[replace(one().versions[0], id=number, files=[SimFile(
        number, "a.safetensors", tiny_lora(number))])]) for number in range(1, 8)]  # fmt: skip
    catalog = Catalog(workspace)
    with Site(models) as site:
        crawl(site, workspace, download=False)
        site.broken_models = {1: 500, 2: 500}
        site.remove(7)
        rows = catalog.longest_unasked("TRUE", 100, ["civitai"]).to_pylist()
        counts = Crawl(source(site, catalog, retries=0), catalog, False).refresh(rows)
        assert counts.states == {"failed": 2, "gone": 1}
        assert "HTTP 500" in next(iter(counts.reasons))
        site.broken_models = dict.fromkeys(range(8), 500)
        with pytest.raises(CrawlError, match="HTTP 500"):
            Crawl(source(site, catalog, retries=0), catalog, False).refresh(rows)


def test_changed_metadata_is_recorded_without_another_download(workspace: Workspace) -> None:
    model = one()
    with Site([model]) as site:
        crawl(site, workspace)
    model.tags = ["other"]
    with Site([model]) as site:
        workspace_state = next((workspace.root / "crawls").iterdir())
        workspace_state.unlink()
        catalog = Catalog(workspace)
        api = source(site, catalog)
        Crawl(api, catalog).take(api.one(model_id="11"))
        assert site.counts["download"] == 0
    [row] = table(workspace)
    assert (row["tags"], row["state"]) == (["other"], "stored")


def test_queries_reach_the_source(site: Site, workspace: Workspace) -> None:
    asked = CivitaiQuery(base_models=("SD 1.5",), types=("LORA",), nsfw=False, since=datetime(2024, 1, 2, tzinfo=UTC))
    crawl(site, workspace, download=False, query=asked)
    found = table(workspace)
    assert found
    assert {row["base_model"] for row in found} == {"SD 1.5"}
    assert not any(row["nsfw"] for row in found)
    assert min(row["published_at"] for row in found) >= datetime(2024, 1, 2, tzinfo=UTC)


def test_a_dry_run_counts_and_writes_nothing(workspace: Workspace) -> None:
    with Site(make_models(12)) as site:
        catalog = Catalog(workspace)
        found = estimate(source(site, catalog), catalog, None, lambda *_: None)
        assert site.counts["download"] == 0
    models = make_models(12)
    sizes = [len(f.content) for m in models for v in m.versions for f in v.files if f.type == "Model"]  # type: ignore[arg-type]
    assert found["to_download"] == len(sizes)
    assert abs(found["bytes"] - sum(sizes)) < len(sizes)
    assert table(workspace) == []
    assert not (workspace.root / "crawls").exists()


def test_prompts_of_example_images_become_captions(workspace: Workspace) -> None:
    model = one()
    model.versions[0].trained_words = []
    prompt = {"prompt": "a sks castle, <lora:one:0.8>", "seed": 1}
    metas: list[Any] = [None, prompt, {"meta": {"prompt": "nested (castle:1.2)"}}, {"workflow": "{}"}, "text"]
    model.versions[0].images = [
        {"id": i, "url": "u", "width": 1, "height": 1, "nsfwLevel": "None", "meta": meta}
        for i, meta in enumerate(metas)
    ]
    with Site([model]) as site:
        crawl(site, workspace)
        assert site.counts["images"] == 1
    assert [row["caption"] for row in captions(workspace)] == ["a sks castle", "nested castle"]
    assert {row["source"] for row in captions(workspace)} == {"image prompt"}
    assert prompts_of([None, 3, {"meta": []}, {"meta": {"meta": {"meta": {"prompt": "x"}}}}]) == []


def test_the_same_tensors_from_two_models_are_stored_once(workspace: Workspace) -> None:
    first, second = one(), one()
    again = SimFile(32, "b.safetensors", tiny_lora(7, {"other": "header"}))
    second = replace(second, id=12, versions=[replace(second.versions[0], id=22, files=[again])])
    with Site([first, second]) as site:
        crawl(site, workspace)
    rows = table(workspace)
    assert [row["state"] for row in rows] == ["stored", "stored"]
    assert len({row["identity"] for row in rows}) == 1
    assert len({row["checkpoint_sha256"] for row in rows}) == 2
    assert len(list((workspace.root / "checkpoints").glob("*.safetensors"))) == 1


def with_training_set(content: bytes, **changes: Any) -> SimModel:
    model = one()
    model.versions[0].files.append(SimFile(39, "set.zip", content, type="Training Data", primary=False, format="Other"))
    return replace(model, **changes)


def training_zip(pictures: int) -> bytes:
    files = {f"../{number}.png": png("red", 8 + number) for number in range(pictures)}
    return packed(files | {"../0.txt": b"sks style, a boat"}).getvalue()


def test_published_training_sets_become_ground_truth_only_when_asked_and_allowed(workspace: Workspace) -> None:
    with Site([with_training_set(training_zip(4))]) as site:
        crawl(site, workspace)
        assert table(workspace)[0]["ground_truth"] is None
        workspace.files.remove_folder("crawls")
        crawl(site, workspace, ground_truth=True)  # asked for later: it is fetched then
    [row] = table(workspace)
    assert (row["training_images"], row["training_images_source"]) == (4, "training-data")
    assert "N0: 4 (training-data), 23 (description)" in row["contradictions"]
    assert captions(workspace)[0]["caption"] in ("sks style", "sks style, a boat")
    entry = Catalog(workspace).entry(row["item_id"])
    assert entry.ground_truth is not None
    assert len(list(entry.ground_truth.glob("*.png"))) == 4
    for changes in ({"poi": True}, {"minor": True}, {"allow_commercial_use": []}):
        other = Workspace(workspace.root.parent / f"other-{next(iter(changes))}")
        with Site([with_training_set(training_zip(4), **changes)]) as site:
            crawl(site, other, ground_truth=True)
        assert [(row["state"], row["ground_truth"]) for row in table(other)] == [("stored", None)]


def test_a_bad_training_set_does_not_cost_the_checkpoint(workspace: Workspace) -> None:
    with Site([with_training_set(b"no zip at all")]) as site:
        crawl(site, workspace, ground_truth=True)
    [row] = table(workspace)
    assert (row["state"], row["ground_truth"]) == ("stored", None)
    assert "its training set was not taken" in row["reason"]


def test_references_people_paste() -> None:
    assert reference_of("https://civitai.green/models/11/one") == {"model_id": "11"}
    sha = "ab" * 32
    assert reference_of("https://civitai.com/models/12/name?modelVersionId=34") == {
        "model_id": "12",
        "version_id": "34",
    }
    assert reference_of("https://civitai.com/models/12") == {"model_id": "12"}
    assert reference_of("urn:air:sd1:lora:civitai:12@34") == {"model_id": "12", "version_id": "34"}
    assert reference_of("12") == {"model_id": "12"}
    assert reference_of(sha.upper()) == {"digest": sha.upper()}
    for text in (
        "https://evil.example/models/12",
        "owner/name",
        "",
        "civitai.com/x",
        "https://civitai.com.evil/models/1",
    ):
        assert reference_of(text) is None


def test_single_models_by_hash_version_and_id(workspace: Workspace) -> None:
    with Site([one()]) as site:
        api = source(site, Catalog(workspace))
        digest = hashlib.sha256(tiny_lora(7)).hexdigest()
        for named in ({"digest": digest}, {"version_id": "21"}, {"model_id": "11", "version_id": "21"}):
            assert [item.item_id for item in api.one(**named)] == ["civitai:11:21:31"]
        with pytest.raises(Exception, match="does not have it"):
            api.one(model_id="404")


def test_rank_steps_and_learning_rate_are_columns(workspace: Workspace) -> None:
    claims = {"ss_network_dim": "64", "ss_steps": "1500", "ss_learning_rate": "1e-4", "ss_unet_lr": "None"}
    sql = "SELECT state, tensor_rank, claimed_rank, claimed_steps, claimed_learning_rate AS rate FROM checkpoints"
    with Site([one(content=tiny_lora(7, claims, rank=2))]) as site:
        crawl(site, workspace, download=False)
        assert workspace.rows(sql)[0] == {
            "state": "listed", "tensor_rank": None, "claimed_rank": None, "claimed_steps": None, "rate": None
        }  # fmt: skip
        crawl(site, workspace)
        known = {"state": "stored", "tensor_rank": 2, "claimed_rank": 64, "claimed_steps": 1500, "rate": 1e-4}
        assert workspace.rows(sql) == [known]
        site.remove(11)
        catalog = Catalog(workspace)
        Crawl(source(site, catalog), catalog).refresh(catalog.find().to_pylist())
        assert workspace.rows(sql) == [known | {"state": "gone"}]


def test_a_hostile_answer_costs_nothing_else(workspace: Workspace, httpserver: Any) -> None:
    bad: list[Any] = [
        None, 3, "x", [], {}, {"id": "../../etc"}, {"id": 5, "modelVersions": "x"},
        {"id": 6, "modelVersions": [None, {}]},
        {"id": 7, "modelVersions": [{"id": 8, "files": [{"id": 9, "type": "Model", "name": "../x\x1b[31m.safetensors",
         "downloadUrl": "http://169.254.169.254/latest", "hashes": 3, "sizeKB": "NaN", "metadata": []}]}],
         "creator": [], "tags": {"a": 1}, "description": 5, "name": {"x": 1}},
    ]  # fmt: skip
    httpserver.expect_request("/api/models").respond_with_json({"items": bad, "metadata": []})
    catalog = Catalog(workspace)
    api = Civitai(catalog, endpoint=httpserver.url_for("/api"), requests_per_second=0, retries=0, prompts="never")
    assert Crawl(api, catalog).run().states == {"refused": 1}
    [row] = table(workspace)
    assert (row["name"], "not a host of this source" in row["reason"]) == ("x [31m.safetensors", True)
    assert json.loads(row["claims"])["base_model"] == []


def test_the_same_cursor_twice_ends_with_an_error(workspace: Workspace, httpserver: Any) -> None:
    answer = {"items": [], "metadata": {"nextCursor": "same"}}
    httpserver.expect_request("/api/models").respond_with_json(answer)
    catalog = Catalog(workspace)
    with pytest.raises(CrawlError, match="same cursor"):
        Crawl(Civitai(catalog, endpoint=httpserver.url_for("/api"), requests_per_second=0), catalog).run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)
FILE = st.fixed_dictionaries(
    {"id": st.integers(1, 99) | JSON, "type": st.sampled_from(["Model", "Training Data", None])},
    optional=dict.fromkeys(("name", "sizeKB", "metadata", "hashes", "downloadUrl", "virusScanResult"), JSON),
)
VERSION = st.fixed_dictionaries(
    {"id": st.integers(1, 99) | JSON, "files": st.lists(FILE | JSON, max_size=3) | JSON},
    optional=dict.fromkeys(("name", "baseModel", "trainedWords", "publishedAt", "createdAt", "description"), JSON),
)
MODEL = st.fixed_dictionaries(
    {"id": st.integers(1, 99) | JSON, "modelVersions": st.lists(VERSION | JSON, max_size=3) | JSON},
    optional=dict.fromkeys(
        ("name", "creator", "tags", "nsfw", "poi", "minor", "mode", "allowCommercialUse", "description"), JSON
    ),
)


@given(MODEL)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_model_becomes_items_that_can_be_recorded(workspace: Workspace, model: dict[str, Any]) -> None:
    api = Civitai(Catalog(workspace), CivitaiQuery(since=datetime(2024, 1, 1, tzinfo=UTC)), ground_truth=True)
    for item in api._items(model, "civitai.com"):
        row, _ = api.catalog._row(item, Outcome("listed"), None, datetime.now(UTC))
        pa.Table.from_pylist([row], schema=CHECKPOINTS)
        assert item.item_id.startswith("civitai:")
        assert "/" not in item.name


def test_a_quota_pauses_the_crawl_and_costs_no_item(workspace: Workspace) -> None:
    with Site(make_models(12)) as site:
        site.quota, site.quota_headers = 3, {"Retry-After": "0"}
        with pytest.raises(CrawlError, match=r"quota of this account .*HTTP 429.* goes on from there after \d{4}-"):
            crawl(site, workspace, retries=1)
        assert {row["state"] for row in table(workspace)} <= {"stored"}
        [state] = [json.loads(path.read_text())["state"] for path in (workspace.root / "crawls").iterdir()]
        assert "quota" in state["paused"]["why"]
        assert state["paused"]["until"]
        site.quota = None
        crawl(site, workspace)
        assert {row["state"] for row in table(workspace)} == {"stored"}
        [state] = [json.loads(path.read_text())["state"] for path in (workspace.root / "crawls").iterdir()]
        assert "paused" not in state


def test_a_region_that_is_shut_out_pauses_it_too(workspace: Workspace) -> None:
    with Site(make_models(12)) as site:
        crawl(site, workspace, download=False)
        before = table(workspace)
        site.region_blocked = True
        with pytest.raises(CrawlError, match=r"may not be asked from this region .*HTTP 451"):
            crawl(site, workspace)
        catalog = Catalog(workspace)
        with pytest.raises(CrawlError, match="HTTP 451"):
            Crawl(source(site, catalog), catalog, False).refresh(catalog.find().to_pylist())
        assert table(workspace) == before  # nothing is gone, nothing has failed
        assert site.counts["451"] <= 3
